"""Batches as a pure function of (seed, data, row): nothing to save, nothing to replay.

In: a `TokenSplit` and a row number. Out: this rank's micro-batches of the global batch that starts there.
A row is a window of T + 1 tokens; windows overlap by one token, so each token is a target exactly once per
epoch. Row g of training is window `permutation(g mod n)` of epoch `g div n`, whatever the number of ranks,
the micro-batch or the planned length of the run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.data.dataset import Dataset, TokenSplit
from pipeline.data.objectives import IGNORED, Batch, make_batch
from pipeline.errors import UserError
from pipeline.seeds import named_seed

Indices = NDArray[np.int64]
PREFETCHED = 2  # steps read ahead: one hides the reading, the second its jitter


def permute(indices: Indices, *, n: int, key: int) -> Indices:
    """Where a keyed bijection of 0..n-1 sends `indices`: a shuffle in O(1) memory.

    A Feistel network over the smallest power of two that holds n (at least 16, so that tiny n are mixed
    too), walked until the result is below n again (Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains"). `(n - 1).bit_length()` is exact where a floating-point logarithm is not.
    """
    bits = max((n - 1).bit_length(), 4)
    result = _feistel(indices.astype(np.uint64), bits=bits, key=key)
    while (outside := result >= n).any():
        result[outside] = _feistel(result[outside], bits=bits, key=key)
    return result.astype(np.int64)


def _feistel(values: NDArray[np.uint64], *, bits: int, key: int, rounds: int = 6) -> NDArray[np.uint64]:
    """Unbalanced network: an even number of rounds brings the two halves back to their widths."""
    left_bits, right_bits = bits // 2, bits - bits // 2
    left, right = values >> np.uint64(right_bits), values & np.uint64((1 << right_bits) - 1)
    for number in range(rounds):
        mask = np.uint64((1 << left_bits) - 1)
        left, right = right, left ^ (_mix(right, key=named_seed(key, "round", number)) & mask)
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


def _mix(values: NDArray[np.uint64], *, key: int) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele et al. 2014) of value + key; unsigned arithmetic wraps by intent."""
    mixed = values + np.uint64(key)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def share(total: int, *, part: int, parts: int) -> range:
    """Contiguous share number `part` of 0..total-1 among `parts`; sizes differ by at most one."""
    return range(total * part // parts, total * (part + 1) // parts)


class Windows:
    """A split seen as rows of `context_length` + 1 tokens."""

    def __init__(self, split: TokenSplit, *, context_length: int) -> None:
        self.split = split
        self.context_length = context_length
        self.targets = max(split.n_tokens - 1, 0)
        self.full_rows = self.targets // context_length
        self.all_rows = -(-self.targets // context_length)

    def tokens(self, rows: Indices) -> Indices:
        """Token ids (len(rows), T + 1); -100 beyond the end of the data."""
        return self._gather(rows, self.split.tokens)

    def documents(self, rows: Indices) -> Indices:
        """The number of the document of each of those tokens."""
        return self._gather(rows, self.split.document_of)

    def _gather(self, rows: Indices, read: Callable[[int, int], NDArray[Any]]) -> Indices:
        width = self.context_length + 1
        gathered = np.full((len(rows), width), IGNORED, dtype=np.int64)
        for place, row in enumerate(rows.tolist()):
            start = row * self.context_length
            stop = min(start + width, self.split.n_tokens)
            gathered[place, : stop - start] = read(start, stop)
        return gathered


@dataclass(frozen=True)
class RankBatch:
    """One rank's part of a global batch: its micro-batches, and where their rows came from."""

    first_row: int
    micro_batches: list[Batch]
    windows: list[Indices]


class Loader:
    """Rows of one split, cut into global batches, ranks and micro-batches.

    Every rank gets the same number of micro-batches, computed and not discovered; where the rows do not
    divide, sizes differ by one, and a rank left without rows gets one that has no targets.
    """

    def __init__(
        self,
        windows: Windows,
        config: Config,
        *,
        order: Callable[[Indices], Indices],
        rank: int,
        world_size: int,
    ) -> None:
        self.windows = windows
        self.config = config
        self.order = order
        self.rank = rank
        self.world_size = world_size
        self.micro_batch = config.train.micro_batch

    def accumulation(self, rows: int) -> int:
        """Micro-batches per rank for a global batch of `rows`."""
        per_rank = -(-rows // self.world_size)
        return -(-per_rank // self.micro_batch)

    def batch(self, first_row: int, rows: int) -> RankBatch:
        """This rank's part of the global batch of rows [first_row, first_row + rows)."""
        mine = share(rows, part=self.rank, parts=self.world_size)
        count = self.accumulation(rows)
        micro_batches, sources = [], []
        for number in range(count):
            part = share(len(mine), part=number, parts=count)
            numbers = first_row + mine.start + np.arange(part.start, part.stop, dtype=np.int64)
            windows = self.order(numbers)
            micro_batches.append(self._assemble(windows))
            sources.append(windows)
        return RankBatch(first_row=first_row, micro_batches=micro_batches, windows=sources)

    def _assemble(self, windows: Indices) -> Batch:
        rows = windows if len(windows) else np.zeros(1, dtype=np.int64)
        tokens = self.windows.tokens(rows)
        if not len(windows):
            tokens[:, 1:] = IGNORED
        data = self.config.data
        asked = data.document_mask or not data.cross_document_targets  # finding documents costs as much as reading
        documents = self.windows.documents(rows) if asked else None
        return make_batch(tokens, documents, objective=self.config.objective, data=data)

    def sources(self, windows: Indices) -> list[str]:
        """The documents that these windows touch, as "source, row N"; to name what a step trained on."""
        found = np.unique(self.windows.documents(windows))
        described = (self.windows.split.describe(document) for document in found[found >= 0].tolist())
        return [f"{info.source}, row {info.row}" for info in described]


def training_loader(dataset: Dataset, config: Config, *, rank: int, world_size: int) -> Loader:
    """Rows of the train split in an order drawn from (seed, data digest), a new one each epoch.

    The last partial window of an epoch is left out. Errors: a split with less than one full window.
    """
    context_length = config.model.context_length
    windows = Windows(dataset.split("train"), context_length=context_length)
    n = windows.full_rows
    if n == 0:
        raise UserError(
            f"{dataset.path} has {windows.split.n_tokens} training tokens, one window needs {context_length + 1}: "
            f"prepare more text or lower model.context_length"
        )

    def order(rows: Indices) -> Indices:
        shuffled = np.empty_like(rows)
        for epoch in np.unique(rows // n).tolist():
            inside = rows // n == epoch
            key = named_seed(config.seed, "order", dataset.data_digest, epoch)
            shuffled[inside] = permute(rows[inside] % n, n=n, key=key)
        return shuffled

    return Loader(windows, config, order=order, rank=rank, world_size=world_size)


def validation_loader(dataset: Dataset, config: Config, *, rank: int, world_size: int) -> Loader | None:
    """Rows of the val split as they stand, the last one padded: every token once. None: there is no such split."""
    windows = Windows(dataset.split("val"), context_length=config.model.context_length)
    if windows.targets == 0:
        return None
    return Loader(windows, config, order=lambda rows: rows, rank=rank, world_size=world_size)


class Prefetcher:
    """Reads global batches ahead on a thread; an error there is raised where its batch is taken."""

    def __init__(self, loader: Loader, *, first_row: int, rows: int) -> None:
        self.loader = loader
        self.rows = rows
        self.next_row = first_row
        self.wait_seconds = 0.0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead: deque[Future[RankBatch]] = deque()

    def __iter__(self) -> Iterator[RankBatch]:
        """Batches without end; `wait_seconds` is what the last one kept its taker waiting."""
        while True:
            while len(self._ahead) <= PREFETCHED:
                self._ahead.append(self._thread.submit(self.loader.batch, self.next_row, self.rows))
                self.next_row += self.rows
            began = perf_counter()
            batch = self._ahead.popleft().result()
            self.wait_seconds = perf_counter() - began
            yield batch

    def __enter__(self) -> Self:
        """Begin; the thread ends with the block."""
        return self

    def __exit__(self, *error: object) -> None:
        """Stop reading ahead."""
        self._thread.shutdown(wait=True, cancel_futures=True)
