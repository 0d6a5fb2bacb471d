"""Batches as a pure function of (seed, data, row): nothing to save, nothing to replay.

In: a source of rows, numbered from 0 for ever, and a row number. Out: this rank's micro-batches of the global batch
that starts there. Which row comes next depends neither on the number of ranks, nor on the micro-batch, nor on the
planned length of the run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Protocol, Self

import numpy as np
import torch

from pipeline.config import Config
from pipeline.data.loading.objectives import Batch, make_batch
from pipeline.data.loading.rows import IGNORED, Origin, Pack, Plan, Rows
from pipeline.data.order import Indices, permute, share
from pipeline.errors import UserError
from pipeline.seeds import named_seed

PREFETCHED = 2  # steps read ahead: one hides the reading, the second its jitter


class RowSource(Protocol):
    """Rows numbered from 0: for ever in training, once through in validation."""

    def read(self, rows: Indices, *, documents: bool) -> Rows:
        """Rows number `rows` (B,). `documents`: also tell which document each position is of."""

    def describe(self, row: int) -> list[Origin]:
        """Where everything in a row comes from, in order."""


class Shuffled:
    """The rows of one plan, epoch after epoch, each in an order of its own drawn from (seed, data digest, epoch)."""

    def __init__(self, plan: Plan, *, name: str, seed: int, data_digest: str) -> None:
        assert plan.rows > 0, f"{name} does not fill one row"
        self.plan, self.name, self.seed, self.data_digest = plan, name, seed, data_digest

    def read(self, rows: Indices, *, documents: bool) -> Rows:
        """As `RowSource.read`."""
        return self.plan.read(*self.locate(rows), documents=documents)

    def locate(self, rows: Indices) -> tuple[Indices, Indices]:
        """Row of the plan, and epoch, of each of `rows` (B,)."""
        epochs, places = np.divmod(rows, self.plan.rows)
        different, which = np.unique(epochs, return_inverse=True)
        keys = [named_seed(self.seed, "order", self.data_digest, epoch) for epoch in different.tolist()]
        key = np.array(keys, dtype=np.uint64)
        return permute(places, n=self.plan.rows, key=key if len(key) == 1 else key[which]), epochs

    def describe(self, row: int) -> list[Origin]:
        """As `RowSource.describe`."""
        places, epochs = self.locate(np.array([row]))
        return origins(self.plan, name=self.name, row=int(places[0]), epoch=int(epochs[0]))


class Fixed:
    """The rows of one plan, always in the same order, the last one padded: for validation.

    End to end they come as they stand. Packed rows are planned longest documents first, which would make the first few
    of them no sample of the whole: they come in one shuffled order.
    """

    def __init__(self, plan: Plan, *, name: str) -> None:
        self.plan, self.name = plan, name

    def read(self, rows: Indices, *, documents: bool) -> Rows:
        """As `RowSource.read`."""
        return self.plan.read(self._places(rows), np.zeros_like(rows), documents=documents)

    def describe(self, row: int) -> list[Origin]:
        """As `RowSource.describe`."""
        return origins(self.plan, name=self.name, row=int(self._places(np.array([row]))[0]), epoch=0)

    def _places(self, rows: Indices) -> Indices:
        return permute(rows, n=self.plan.all_rows, key=0) if isinstance(self.plan, Pack) else rows


def origins(plan: Plan, *, name: str, row: int, epoch: int) -> list[Origin]:
    """Where everything in a row of `plan` comes from; `name` is what its dataset is called."""
    described = ((span, plan.split.describe(span.document)) for span in plan.spans(row, epoch))
    return [Origin(name, epoch, row=row, span=span, info=info) for span, info in described]


@dataclass(frozen=True)
class RankBatch:
    """One rank's part of a global batch: its micro-batches, and the numbers of their rows."""

    first_row: int
    micro_batches: list[Batch]
    rows: list[Indices]

    def to(self, device: torch.device) -> RankBatch:
        """The same on `device`."""
        return replace(self, micro_batches=[part.to(device) for part in self.micro_batches])


class Loader:
    """Rows of a source, cut into global batches, ranks and micro-batches.

    Every rank gets the same number of micro-batches, computed and not discovered; where the rows do not
    divide, sizes differ by one, and a rank left without rows gets one that has no targets.
    """

    def __init__(self, source: RowSource, config: Config, *, rank: int, world_size: int) -> None:
        self.source = source
        self.config = config
        self.rank = rank
        self.world_size = world_size
        assert isinstance(config.train.micro_batch, int), "auto is settled before batches are cut"
        self.micro_batch = config.train.micro_batch

    def accumulation(self, rows: int) -> int:
        """Micro-batches per rank for a global batch of `rows`."""
        per_rank = -(-rows // self.world_size)
        return -(-per_rank // self.micro_batch)

    def batch(self, first_row: int, rows: int) -> RankBatch:
        """This rank's part of the global batch of rows [first_row, first_row + rows)."""
        mine = share(rows, part=self.rank, parts=self.world_size)
        numbers = first_row + np.arange(mine.start, mine.stop)
        count = self.accumulation(rows)
        parts = [share(len(mine), part=number, parts=count) for number in range(count)]
        data = self.config.data
        asked = data.document_mask or not data.cross_document_targets  # finding documents costs as much as reading
        # all at once: finding rows costs the same for one and for hundreds
        read = self.source.read(numbers if len(mine) else np.array([first_row]), documents=asked)
        return RankBatch(
            first_row=first_row,
            micro_batches=[self._assemble(read, part) for part in parts],
            rows=[numbers[part.start : part.stop] for part in parts],
        )

    def _assemble(self, read: Rows, part: range) -> Batch:
        if len(part):
            rows = read[part.start : part.stop]
        else:
            rows = replace(read[:1], labels=np.full_like(read.labels[:1], IGNORED))
        return make_batch(rows, objective=self.config.objective, data=self.config.data)

    def sources(self, rows: Indices) -> list[str]:
        """The documents that these rows touch, as "source, row N"; to name what a step trained on."""
        found = (origin.info for row in rows.tolist() for origin in self.source.describe(row))
        return list(dict.fromkeys(f"{info.source}, row {info.row}" for info in found))


class Prefetcher:
    """Reads global batches ahead on a thread; an error there is raised where its batch is taken.

    schedule: step -> first row and number of rows of its global batch. device: where batches are wanted. For CUDA they
    are copied ahead too, on a stream of their own, so that neither host nor device waits for a copy.
    """

    def __init__(
        self,
        loader: Loader,
        *,
        schedule: Callable[[int], tuple[int, int]],
        first_step: int,
        device: torch.device | None = None,
    ) -> None:
        self.loader = loader
        self.schedule = schedule
        self.next_step = first_step
        self.wait_seconds = 0.0
        self._device = device if device is not None and device.type == "cuda" else None
        self._stream = None if self._device is None else torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call] # torch's

        # a thread begins with the first device, and its first call there would take memory of it from rank 0
        begin = (lambda: None) if self._device is None else partial(torch.cuda.set_device, self._device)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader", initializer=begin)
        self._ahead: deque[Future[tuple[RankBatch, torch.cuda.Event | None]]] = deque()

    def __iter__(self) -> Iterator[RankBatch]:
        """Batches without end; `wait_seconds` is what the last one kept its taker waiting."""
        while True:
            while len(self._ahead) <= PREFETCHED:
                self._ahead.append(self._thread.submit(self._read, self.next_step))
                self.next_step += 1
            began = perf_counter()
            batch, copied = self._ahead.popleft().result()
            self.wait_seconds = perf_counter() - began
            if copied is not None:
                self._hand_over(batch, copied)
            yield batch

    def __enter__(self) -> Self:
        """Begin; the thread ends with the block."""
        return self

    def __exit__(self, *error: object) -> None:
        """Stop reading ahead."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _read(self, step: int) -> tuple[RankBatch, torch.cuda.Event | None]:
        first_row, rows = self.schedule(step)
        try:
            batch = self.loader.batch(first_row, rows)
        except OSError as error:
            raise UserError(
                f"rows {first_row} to {first_row + rows - 1} (step {step}) cannot be read: {error}; "
                f"see that the disk is there and whole, then run the same command again"
            ) from error
        except Exception as error:
            error.add_note(f"while reading rows {first_row} to {first_row + rows - 1} of step {step}")
            raise
        if self._stream is None or self._device is None:
            return batch, None
        with torch.cuda.stream(self._stream):
            return batch.to(self._device), self._stream.record_event()

    def _hand_over(self, batch: RankBatch, copied: torch.cuda.Event) -> None:
        """Let the taker's stream wait for the copies, and their memory for the taker's stream."""
        taker = torch.cuda.current_stream(self._device)
        taker.wait_event(copied)
        for part in batch.micro_batches:
            for tensor in (part.labels, *part.inputs.values()):
                tensor.record_stream(taker)
