from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import Config
from pipeline.data.dataset import open_dataset
from pipeline.data.loader import Loader, Prefetcher, RankBatch, permute, share, training_loader, validation_loader
from pipeline.data.objectives import causal
from pipeline.errors import UserError

CONTEXT = 32


def settings(*, micro_batch: int = 4, seed: int = 5, context: int = CONTEXT) -> Config:
    model = {"context_length": context}
    train = {"steps": 200, "batch_tokens": context, "micro_batch": micro_batch}
    return Config.model_validate({"seed": seed, "model": model, "train": train})


def loader(dataset: Path, *, rank: int = 0, world_size: int = 1, micro_batch: int = 4, seed: int = 5) -> Loader:
    chosen = settings(micro_batch=micro_batch, seed=seed)
    return training_loader(open_dataset(dataset), chosen, rank=rank, world_size=world_size)


def labels_of(batch: RankBatch) -> list[list[int]]:
    return [row for part in batch.micro_batches for row in part.labels.tolist()]


@pytest.mark.parametrize("n", [*range(1, 301), 2**16 - 1, 2**16, 2**16 + 1])
def test_permutation_is_a_bijection(n: int) -> None:
    result = permute(np.arange(n), n=n, key=99)
    assert sorted(result.tolist()) == list(range(n))


def test_permutation_depends_on_key_and_mixes() -> None:
    n = 10_000
    first, second = permute(np.arange(n), n=n, key=1), permute(np.arange(n), n=n, key=2)
    assert (first == second).mean() < 0.01
    # ranks of neighbours are uncorrelated in a shuffle; the bound is five standard errors
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 5 / np.sqrt(n)
    assert np.array_equal(permute(np.array([17, 4]), n=n, key=1), first[[17, 4]])


def test_shares_cover_everything_once() -> None:
    for total in range(20):
        for parts in range(1, 8):
            pieces = [list(share(total, part=part, parts=parts)) for part in range(parts)]
            assert [i for piece in pieces for i in piece] == list(range(total))
            assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


def test_rows_are_windows_of_the_token_stream(dataset: Path) -> None:
    split = open_dataset(dataset).split("train")
    stream = np.concatenate(
        [np.fromfile(path, dtype="<u2") for path in sorted(dataset.glob("train-*.bin"))]
    )  # read apart from our reader
    assert len(stream) == split.n_tokens
    batch = loader(dataset).batch(0, 6)
    for part, windows in zip(batch.micro_batches, batch.windows, strict=True):
        for row, window in enumerate(windows.tolist()):
            begin = window * CONTEXT
            assert part.inputs["tokens"][row].tolist() == stream[begin : begin + CONTEXT].tolist()
            assert part.labels[row].tolist() == stream[begin + 1 : begin + CONTEXT + 1].tolist()


def test_each_window_exactly_once_per_epoch_in_a_new_order(dataset: Path) -> None:
    one = loader(dataset)
    n = one.windows.full_rows
    epochs = [np.concatenate(one.batch(epoch * n, n).windows) for epoch in range(3)]
    for windows in epochs:
        assert sorted(windows.tolist()) == list(range(n))
    assert (epochs[0] != epochs[1]).any()
    assert (epochs[1] != epochs[2]).any()
    across = np.concatenate(one.batch(n - 3, 6).windows)  # a batch that crosses into the next epoch
    assert across.tolist() == [*epochs[0][-3:].tolist(), *epochs[1][:3].tolist()]


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 4), (1, 5), (2, 3), (3, 1), (3, 4), (5, 1), (8, 8)])
def test_same_rows_for_any_ranks_and_micro_batches(dataset: Path, world_size: int, micro_batch: int) -> None:
    whole = labels_of(loader(dataset, micro_batch=16).batch(7, 16))
    ranks = [loader(dataset, rank=r, world_size=world_size, micro_batch=micro_batch) for r in range(world_size)]
    batches = [one.batch(7, 16) for one in ranks]
    rows = [row for batch in batches for row in labels_of(batch) if set(row) != {-100}]
    assert rows == whole
    counts = {len(batch.micro_batches) for batch in batches}
    assert len(counts) == 1, "ranks with different numbers of micro-batches would wait for each other for ever"
    assert all(len(part.labels) <= micro_batch for batch in batches for part in batch.micro_batches)


def test_batches_depend_on_seed_and_data_alone(dataset: Path) -> None:
    first, again, other = loader(dataset), loader(dataset), loader(dataset, seed=6)
    assert labels_of(first.batch(40, 8)) == labels_of(again.batch(40, 8))
    assert labels_of(first.batch(40, 8)) != labels_of(other.batch(40, 8))


def test_validation_covers_every_token_once(dataset: Path) -> None:
    opened = open_dataset(dataset)
    split = opened.split("val")
    counted: Counter[int] = Counter()
    targets = []
    for rank in range(3):
        part = validation_loader(opened, settings(micro_batch=2), rank=rank, world_size=3)
        assert part is not None
        batch = part.batch(0, part.windows.all_rows)
        targets += [label for row in labels_of(batch) for label in row if label != -100]
        counted.update(np.concatenate(batch.windows).tolist())
    assert targets == split.tokens(1, split.n_tokens).tolist()
    assert set(counted.values()) == {1}


def test_document_mask_and_cross_document_targets() -> None:
    windows = np.array([[5, 6, 9, 7, 8, -100]])
    documents = np.array([[3, 3, 3, 4, 4, -1]])
    plain = causal(windows, documents, document_mask=False, cross_document_targets=True)
    assert plain.labels.tolist() == [[6, 9, 7, 8, -100]]
    assert set(plain.inputs) == {"tokens"}
    masked = causal(windows, documents, document_mask=True, cross_document_targets=False)
    assert masked.labels.tolist() == [[6, 9, -100, 8, -100]]
    assert masked.inputs["documents"].tolist() == [[3, 3, 3, 4, 4]]
    assert masked.targets == 3


def test_sources_name_the_documents_of_a_window(dataset: Path) -> None:
    one = loader(dataset)
    split = open_dataset(dataset).split("train")
    window = 11
    numbers = sorted({int(d) for d in split.document_of(window * CONTEXT, (window + 1) * CONTEXT + 1)})
    rows = [split.describe(number).row for number in numbers]
    assert [int(text.rsplit("row ", 1)[1]) for text in one.sources(np.array([window]))] == rows


def test_prefetching_gives_the_same_batches_and_passes_errors_on(dataset: Path) -> None:
    one = loader(dataset)
    with Prefetcher(one, first_row=8, rows=4) as ahead:
        batches = [batch for batch, _ in zip(ahead, range(3), strict=False)]
    assert [labels_of(b) for b in batches] == [labels_of(one.batch(8 + 4 * i, 4)) for i in range(3)]

    def broken(rows: np.ndarray) -> np.ndarray:
        raise OSError(f"row {rows[0]} cannot be read")

    failing = Loader(one.windows, settings(), order=broken, rank=0, world_size=1)
    with (
        Prefetcher(failing, first_row=0, rows=4) as ahead,
        pytest.raises(OSError, match="row 0 cannot be read"),
    ):
        next(iter(ahead))


def test_too_little_text_is_refused(dataset: Path) -> None:
    with pytest.raises(UserError, match="one window needs"):
        training_loader(open_dataset(dataset), settings(context=10**6), rank=0, world_size=1)


def test_labels_are_int64_and_on_the_host(dataset: Path) -> None:
    part = loader(dataset).batch(0, 4).micro_batches[0]
    assert part.labels.dtype == torch.int64
    assert part.targets == part.labels.numel()
