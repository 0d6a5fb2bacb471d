"""Which dataset a row comes from: a blend as a pure function of the row.

In: phases, each saying from which row on which datasets are blended by which weights. Out: for any row its dataset
and the row of that dataset; a `Blend` is a source of rows to the loader. A dataset's rows are taken in its own order,
one after the other through all phases, so new weights repeat none and lose none.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pipeline.config_data import SourceConfig
from pipeline.data.loading.loader import Shuffled
from pipeline.data.loading.rows import Origin, Rows
from pipeline.data.order import Indices, mix_keys
from pipeline.errors import UserError
from pipeline.seeds import named_seed
from pipeline.untrusted import Natural

# Each HAND of rows holds every dataset's exact share, shuffled within, so that at any row a count is off by what one
# hand can hold, and shares are true in short runs of small batches too. A BLOCK is many hands, dealt at once for speed.
HAND = 8
BLOCK = 256


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PhaseSource(_Record):
    """A dataset of a phase: what it is called, the digest it is known by, and how it was given."""

    name: str
    digest: str
    settings: SourceConfig


class Phase(_Record):
    """From row `row` on these datasets are blended, by `settings.weight`."""

    row: Natural
    sources: Annotated[tuple[PhaseSource, ...], Field(min_length=1)]

    def shares(self) -> dict[str, Fraction]:
        """Exact share of each digest, the smallest first; weights are the decimals that were written."""
        weights = {source.digest: Fraction(repr(source.settings.weight)) for source in self.sources}
        total = sum(weights.values())
        return {digest: weights[digest] / total for digest in sorted(weights, key=lambda one: (weights[one], one))}

    def describe(self) -> str:
        """The datasets and their shares in words."""
        shares = self.shares()
        return ", ".join(f"{float(shares[source.digest]):.2%} {source.name}" for source in self.sources)


def continued(phases: Sequence[Phase], sources: Sequence[PhaseSource], *, row: int) -> tuple[Phase, ...]:
    """`phases` with `sources` from `row` on; the last one goes on where datasets and shares are the same."""
    last = phases[-1]
    same = Phase(row=last.row, sources=tuple(sources))  # names and places may have changed all the same
    if same.shares() == last.shares() or row == last.row:
        return (*phases[:-1], same)
    return (*phases, Phase(row=row, sources=tuple(sources)))


def counts(weights: Sequence[int], rows: int) -> list[int]:
    """How many of the first `rows` rows each weight gets: whole numbers that sum to `rows` and never fall.

    Nested: of the m rows that the first j + 1 weights got, the first j get floor(m * their part of it). Each added row
    so goes to exactly one. With weights in ascending order and n of them, a count is above the ideal by less than 1
    and below it by less than 1 + 1/2 + ... + 1/(n - 1), however many rows there are.
    """
    found, left, together = [], rows, sum(weights)
    for weight in reversed(weights):
        inner = left * (together - weight) // together
        found.append(left - inner)
        left, together = inner, together - weight
    return found[::-1]


def _whole(shares: Collection[Fraction]) -> list[int]:
    """The same shares as whole numbers, of any size."""
    common = math.lcm(*(share.denominator for share in shares))
    return [int(share * common) for share in shares]


class Blend:
    """The rows of a run: a `RowSource` over the datasets of all its phases.

    sources: rows of each dataset by digest. Those of earlier phases may be missing; then their rows cannot be read.
    """

    def __init__(self, phases: Sequence[Phase], sources: Mapping[str, Shuffled], *, seed: int) -> None:
        assert phases[0].row == 0, f"the first phase begins at row {phases[0].row}"
        self.phases, self.sources, self.seed = tuple(phases), dict(sources), seed
        self._digests = list(dict.fromkeys(digest for phase in phases for digest in phase.shares()))
        self._shares = [phase.shares() for phase in phases]
        self._weights = [_whole(shares.values()) for shares in self._shares]
        self._block = lru_cache(maxsize=16)(self._deal)  # a batch touches few, the next batch some of the same
        self._before = [dict.fromkeys(self._digests, 0)]  # rows of each dataset taken before each phase
        for number, phase in enumerate(self.phases[1:]):
            self._before.append(self._added(number, phase.row - self.phases[number].row))

    def read(self, rows: Indices, *, documents: bool) -> Rows:
        """As `RowSource.read`."""
        owners, numbers = self.locate(rows)
        places = [np.flatnonzero(owners == owner) for owner in np.unique(owners).tolist()]
        sources = [self.sources[self._digests[owners[at[0]]]] for at in places]
        parts = [source.read(numbers[at], documents=documents) for source, at in zip(sources, places, strict=True)]
        return parts[0] if len(parts) == 1 else Rows.join(parts, places)

    def describe(self, row: int) -> list[Origin]:
        """As `RowSource.describe`."""
        _, numbers = self.locate(np.array([row]))
        return self.source_of(row).describe(int(numbers[0]))

    def missing(self, rows: Indices) -> list[PhaseSource]:
        """Datasets that `rows` (B,) come from and that are not at hand."""
        digests = {self._digests[owner] for owner in np.unique(self.locate(rows)[0]).tolist()} - self.sources.keys()
        known = {source.digest: source for phase in self.phases for source in phase.sources}
        return [known[digest] for digest in sorted(digests)]

    def source_of(self, row: int) -> Shuffled:
        """The dataset of a row. Errors: it was part of an earlier phase and is not at hand."""
        for gone in self.missing(np.array([row])):
            raise UserError(
                f"row {row} is of {gone.name}, which is no part of the blend any more ({gone.settings.path})"
            )
        return self.sources[self._digests[int(self.locate(np.array([row]))[0][0])]]

    def locate(self, rows: Indices) -> tuple[Indices, Indices]:
        """For each of `rows` (B,): the place of its dataset among all digests; its number in it, from 0 for ever."""
        owners, numbers = np.empty_like(rows), np.empty_like(rows)
        phase_of = np.searchsorted([phase.row for phase in self.phases], rows, side="right") - 1
        inside = rows - np.array([phase.row for phase in self.phases])[phase_of]
        blocks = inside // BLOCK
        for phase, block in np.unique(np.stack([phase_of, blocks]), axis=1).T.tolist():
            at = np.flatnonzero((phase_of == phase) & (blocks == block))
            owner, number = self._block(phase, block)
            owners[at], numbers[at] = owner[inside[at] % BLOCK], number[inside[at] % BLOCK]
        return owners, numbers

    def taken(self, row: int) -> dict[str, int]:
        """How many of the rows before `row` came from each dataset, by digest."""
        number = max(number for number, phase in enumerate(self.phases) if phase.row <= row)
        return self._added(number, row - self.phases[number].row)

    def _added(self, phase: int, rows: int) -> dict[str, int]:
        """Rows of each dataset taken before a phase and in its first `rows` rows."""
        total, shares = dict(self._before[phase]), self._shares[phase]
        blocks, rest = divmod(rows, BLOCK)
        for digest, count in zip(shares, counts(self._weights[phase], blocks * BLOCK), strict=True):
            total[digest] += count
        owners, _ = self._block(phase, blocks)
        for digest, count in zip(self._digests, np.bincount(owners[:rest], minlength=len(total)).tolist(), strict=True):
            total[digest] += count
        return total

    def _deal(self, phase: int, block: int) -> tuple[Indices, Indices]:
        """Dataset and number in it of each row of a block, (BLOCK,) both.

        Numbers follow the order of the rows, so that what was taken of a dataset up to any row is all before it.
        """
        shares = self._shares[phase]
        before = [counts(self._weights[phase], row) for row in range(block * BLOCK, (block + 1) * BLOCK + 1, HAND)]
        places = [self._digests.index(digest) for digest in shares]
        sizes = [b - a for hand, after in pairwise(before) for a, b in zip(hand, after, strict=True)]
        dealt = np.repeat(places * (BLOCK // HAND), sizes)
        cards = np.arange(BLOCK)
        drawn = mix_keys(named_seed(self.seed, "mix", self.phases[phase].row, block), cards)
        owners = dealt[np.lexsort((drawn, cards // HAND))]
        numbers = np.empty_like(owners)
        for place, digest, start in zip(places, shares, before[0], strict=True):
            at = np.flatnonzero(owners == place)
            numbers[at] = self._before[phase][digest] + start + np.arange(len(at))
        return owners, numbers
