"""The same rows for any ranks and micro-batches, each once per epoch; and read ahead, the same again."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import Config
from pipeline.data.dataset import open_dataset
from pipeline.data.loading.loader import Fixed, Loader, Prefetcher, RankBatch, Shuffled
from pipeline.data.loading.rows import IGNORED, Concat, Origin, Pack, Plan, Rows
from pipeline.data.order import Indices
from pipeline.errors import UserError

CONTEXT = 32
PLANS = ["concat", "pack"]


def settings(*, micro_batch: int = 4, **data: bool) -> Config:
    train = {"steps": 200, "batch_tokens": CONTEXT, "micro_batch": micro_batch}
    model = {"context_length": CONTEXT}
    return Config.model_validate({"data": {"path": "x", **data}, "model": model, "train": train})


def make_plan(dataset: Path, kind: str = "concat", *, split: str = "train") -> Plan:
    stream = open_dataset(dataset).split("train" if split == "train" else "val")
    if kind == "concat":
        return Concat(stream, context_length=CONTEXT)
    return Pack(stream, context_length=CONTEXT, key=1)


def shuffled(dataset: Path, kind: str = "concat", *, seed: int = 5) -> Shuffled:
    return Shuffled(make_plan(dataset, kind), name="words", seed=seed, data_digest=open_dataset(dataset).data_digest)


def make_loader(
    dataset: Path, kind: str = "concat", *, rank: int = 0, world_size: int = 1, micro_batch: int = 4, seed: int = 5
) -> Loader:
    source = shuffled(dataset, kind, seed=seed)
    return Loader(source, settings(micro_batch=micro_batch), rank=rank, world_size=world_size)


def taught(batch: RankBatch) -> list[list[int]]:
    """Labels of all rows that have any."""
    rows = [row for part in batch.micro_batches for row in part.labels.tolist()]
    return [row for row in rows if set(row) != {IGNORED}]


def test_rows_are_windows_of_the_token_stream(dataset: Path) -> None:
    files = sorted(dataset.glob("train-*.bin"))
    stream = np.concatenate([np.fromfile(path, dtype="<u2") for path in files])  # read apart from our reader
    batch = make_loader(dataset).batch(0, 6)
    for part, numbers in zip(batch.micro_batches, batch.rows, strict=True):
        windows, epochs = shuffled(dataset).locate(numbers)
        assert set(epochs.tolist()) == {0}
        for row, window in enumerate(windows.tolist()):
            begin = window * CONTEXT
            assert part.inputs["tokens"][row].tolist() == stream[begin : begin + CONTEXT].tolist()
            assert part.labels[row].tolist() == stream[begin + 1 : begin + CONTEXT + 1].tolist()


@pytest.mark.parametrize("kind", PLANS)
def test_each_row_exactly_once_per_epoch_in_a_new_order(dataset: Path, kind: str) -> None:
    source = shuffled(dataset, kind)
    n = source.plan.rows
    places, epochs = source.locate(np.arange(3 * n))
    assert epochs.tolist() == [epoch for epoch in range(3) for _ in range(n)]
    orders = places.reshape(3, n)
    for order in orders:
        assert sorted(order.tolist()) == list(range(n))
    assert (orders[0] != orders[1]).mean() > 0.9
    assert (orders[1] != orders[2]).mean() > 0.9
    assert source.locate(np.array([2 * n + 1, 3]))[0].tolist() == [orders[2, 1], orders[0, 3]]


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize(
    ("world_size", "micro_batch"), [(1, 4), (1, 5), (2, 3), (3, 1), (3, 4), (5, 1), (8, 8), (20, 2)]
)
def test_same_rows_for_any_ranks_and_micro_batches(dataset: Path, kind: str, world_size: int, micro_batch: int) -> None:
    n = shuffled(dataset, kind).plan.rows
    whole = make_loader(dataset, kind, micro_batch=16).batch(n - 7, 16)  # across an epoch's end
    assert len(taught(whole)) == 16
    size = {"world_size": world_size, "micro_batch": micro_batch}
    batches = [make_loader(dataset, kind, rank=rank, **size).batch(n - 7, 16) for rank in range(world_size)]
    assert [row for batch in batches for row in taught(batch)] == taught(whole)
    assert [row for batch in batches for rows in batch.rows for row in rows.tolist()] == list(range(n - 7, n + 9))
    counts = {len(batch.micro_batches) for batch in batches}
    assert len(counts) == 1, "ranks with different numbers of micro-batches would wait for each other for ever"
    parts = [part for batch in batches for part in batch.micro_batches]
    assert all(1 <= len(part.labels) <= micro_batch for part in parts)
    assert sum(part.targets for part in parts) == sum(part.targets for part in whole.micro_batches)


@pytest.mark.parametrize("kind", PLANS)
def test_batches_depend_on_seed_and_data_alone(dataset: Path, kind: str) -> None:
    first, again, other = (make_loader(dataset, kind), make_loader(dataset, kind), make_loader(dataset, kind, seed=6))
    assert taught(first.batch(40, 8)) == taught(again.batch(40, 8))
    assert taught(first.batch(40, 8)) != taught(other.batch(40, 8))


@pytest.mark.parametrize("kind", PLANS)
def test_validation_covers_every_target_once(dataset: Path, kind: str) -> None:
    plan = make_plan(dataset, kind, split="val")
    split = plan.split
    found: list[int] = []
    for rank in range(3):
        loader = Loader(Fixed(plan, name="words"), settings(micro_batch=2), rank=rank, world_size=3)
        found += [label for row in taught(loader.batch(0, plan.all_rows)) for label in row if label != IGNORED]
    stream = split.tokens(0, split.n_tokens)
    if kind == "concat":
        assert found == stream[1:].tolist()
    else:
        starts = np.concatenate(([0], np.cumsum(split.lengths)[:-1]))
        assert Counter(found) == Counter(np.delete(stream, starts).tolist())


def test_the_first_packed_rows_of_a_validation_are_a_sample_of_all(dataset: Path) -> None:
    """Rows are planned whole pieces of long documents first; in that order `eval.tokens` would see only those."""
    plan = Pack(open_dataset(dataset).split("train"), context_length=128, key=1)
    fixed = Fixed(plan, name="words")
    pieces = [len(fixed.describe(row)) for row in range(plan.all_rows)]
    as_planned = [len(plan.spans(row, 0)) for row in range(plan.all_rows)]
    half = len(pieces) // 2
    assert max(as_planned[:half]) == 1 < np.mean(as_planned), "or this proves nothing"
    assert sorted(pieces) == sorted(as_planned)
    assert np.mean(pieces[:half]) == pytest.approx(np.mean(pieces), rel=0.05)


@pytest.mark.parametrize("kind", PLANS)
def test_documents_are_read_when_settings_need_them(dataset: Path, kind: str) -> None:
    source = shuffled(dataset, kind)
    plain = Loader(source, settings(), rank=0, world_size=1).batch(0, 4).micro_batches[0]
    assert "documents" not in plain.inputs
    masked = Loader(source, settings(document_mask=True), rank=0, world_size=1).batch(0, 4).micro_batches[0]
    split = source.plan.split
    for row, numbers in enumerate(masked.inputs["documents"].numpy()):
        spans = [(o.span.document, o.span.place, o.span.length) for o in source.describe(row)]
        expected = np.full(CONTEXT, -1)
        for document, place, length in spans:
            expected[place : place + length] = document
        assert numbers.tolist() == expected.tolist()
    assert masked.targets == plain.targets
    cut = Loader(source, settings(cross_document_targets=False), rank=0, world_size=1).batch(0, 64)
    whole = Loader(source, settings(), rank=0, world_size=1).batch(0, 64)
    firsts = sum(part.targets for part in whole.micro_batches) - sum(part.targets for part in cut.micro_batches)
    assert firsts == 0 if kind == "pack" else 0 < firsts < split.n_documents


@pytest.mark.parametrize("kind", PLANS)
def test_rows_tell_where_they_come_from(dataset: Path, kind: str) -> None:
    loader = make_loader(dataset, kind)
    n = shuffled(dataset, kind).plan.rows
    row = n + 11
    found = loader.source.describe(row)
    split = shuffled(dataset, kind).plan.split
    place, epoch = shuffled(dataset, kind).locate(np.array([row]))
    assert {(origin.dataset, origin.epoch, origin.row) for origin in found} == {("words", 1, int(place[0]))}
    assert epoch.tolist() == [1]
    part = loader.batch(row, 1).micro_batches[0]
    tokens = part.inputs["tokens"][0]
    for origin in found:
        span = origin.span
        assert origin.info == split.describe(span.document)
        held = tokens[span.place : span.place + span.length].tolist()
        assert held == split.tokens(span.start, span.start + span.length).tolist()
        assert set(split.document_of(span.start, span.start + span.length).tolist()) == {span.document}
    assert sum(origin.span.length for origin in found) == part.targets
    named = [f"{origin.info.source}, row {origin.info.row}" for origin in found]
    assert loader.sources(np.array([row, row])) == list(dict.fromkeys(named))


def test_labels_are_int64_and_on_the_host(dataset: Path) -> None:
    part = make_loader(dataset).batch(0, 4).micro_batches[0]
    assert part.labels.dtype == part.inputs["tokens"].dtype == torch.int64
    assert part.targets == part.labels.numel()


def growing(step: int) -> tuple[int, int]:
    """Step s takes s rows, after those of the steps before it."""
    return step * (step - 1) // 2, step


def test_reading_ahead_gives_the_same_batches_of_changing_size(dataset: Path) -> None:
    loader = make_loader(dataset)
    with Prefetcher(loader, schedule=growing, first_step=3, device=torch.device("cpu")) as ahead:
        batches = [batch for batch, _ in zip(ahead, range(6), strict=False)]
    assert [taught(batch) for batch in batches] == [taught(loader.batch(*growing(step))) for step in range(3, 9)]


class Scripted:
    """A source that notes what is read and does as it is told."""

    def __init__(self, error: Callable[[], Exception] | None = None, *, at: int = -1, seconds: float = 0.0) -> None:
        self.error, self.at, self.seconds = error, at, seconds
        self.seen: list[int] = []
        self.done = threading.Event()

    def read(self, rows: Indices, *, documents: bool) -> Rows:
        time.sleep(self.seconds)
        self.seen.append(int(rows[0]))
        if len(self.seen) == 3:
            self.done.set()
        if self.error is not None and rows[0] >= self.at:
            raise self.error()
        ids = np.repeat(rows[:, None], CONTEXT, axis=1)
        return Rows(ids, ids, documents=None, positions=None)

    def describe(self, row: int) -> list[Origin]:
        return []


def ahead_of(source: Scripted) -> Prefetcher:
    loader = Loader(source, settings(), rank=0, world_size=1)
    return Prefetcher(loader, schedule=lambda step: (4 * step, 4), first_step=0)


def test_at_most_three_steps_are_read_ahead() -> None:
    source = Scripted()
    with ahead_of(source) as ahead:
        batches = iter(ahead)
        next(batches)
        assert source.done.wait(5)
        time.sleep(0.05)
        assert source.seen == [0, 4, 8]
        next(batches)
    assert source.seen == [0, 4, 8, 12][: len(source.seen)]


def test_waiting_is_measured() -> None:
    source = Scripted(seconds=0.06)
    with ahead_of(source) as ahead:
        batches = iter(ahead)
        next(batches)
        assert ahead.wait_seconds > 0.05  # nothing was read when it was asked for
        time.sleep(0.2)
        next(batches)
        assert ahead.wait_seconds < 0.03


def test_an_error_is_raised_where_its_batch_is_taken_and_names_its_rows() -> None:
    def missing() -> OSError:
        return FileNotFoundError(2, "No such file or directory", "data/words/train-00007.bin")

    with ahead_of(Scripted(missing, at=8)) as ahead:
        batches = iter(ahead)
        assert [next(batches).first_row for _ in range(2)] == [0, 4]
        with pytest.raises(UserError, match=r"rows 8 to 11 \(step 2\) cannot be read: .*train-00007.bin"):
            next(batches)
    with ahead_of(Scripted(lambda: ValueError("odd"), at=4)) as ahead:
        batches = iter(ahead)
        next(batches)
        with pytest.raises(ValueError, match="odd") as caught:
            next(batches)
        assert caught.value.__notes__ == ["while reading rows 4 to 7 of step 1"]


def test_leaving_ends_the_thread() -> None:
    before = threading.active_count()
    with ahead_of(Scripted(seconds=0.02)) as ahead:
        next(iter(ahead))
    assert threading.active_count() == before
