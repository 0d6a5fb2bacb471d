"""Blends: exact shares, nothing repeated or lost, the same rows however they are split."""

from __future__ import annotations

import math
import random
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import Config
from pipeline.config_data import SourceConfig
from pipeline.data.loading.blend import HAND, Blend, Phase, PhaseSource, counts
from pipeline.data.loading.loader import Loader, RankBatch
from pipeline.data.loading.sources import TrainingData, open_sources, unique_names
from pipeline.errors import UserError
from tests.support import make_dataset

CONTEXT = 32


def source(digest: str, weight: float) -> PhaseSource:
    return PhaseSource(name=digest, digest=digest, settings=SourceConfig(path=digest, weight=weight))


def phase(row: int, **weights: float) -> Phase:
    return Phase(row=row, sources=tuple(source(digest, weight) for digest, weight in weights.items()))


def located(blend: Blend, rows: int | np.ndarray) -> list[tuple[str, int]]:
    """Digest and number of each of `rows`, or of the first so many."""
    order = list(dict.fromkeys(digest for one in blend.phases for digest in one.shares()))
    owners, numbers = blend.locate(np.arange(rows) if isinstance(rows, int) else rows)
    return [(order[owner], number) for owner, number in zip(owners.tolist(), numbers.tolist(), strict=True)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three datasets of different sizes; the second has no validation split."""
    folder = tmp_path_factory.mktemp("blend")
    sizes = ((90, 0.2), (60, 0.0), (40, 0.2))
    return [
        make_dataset(folder / f"part-{seed}", documents=documents, seed=seed, val=val)
        for seed, (documents, val) in enumerate(sizes)
    ]


def settings(folders: list[Path], *, plan: str = "concat", micro_batch: int = 4, **train: Any) -> Config:
    weights = (5, 2.5, 0.3)
    sources = [{"path": str(path), "weight": weight} for path, weight in zip(folders, weights, strict=False)]
    train = {"steps": 200, "batch_tokens": 8 * CONTEXT, "micro_batch": micro_batch, **train}
    data = {"sources": sources, "plan": plan, "document_mask": plan == "pack"}
    return Config.model_validate({"seed": 5, "data": data, "model": {"context_length": CONTEXT}, "train": train})


def blend_of(data: TrainingData) -> Blend:
    return data.blend([Phase(row=0, sources=data.described())])


def rows_of(batch: RankBatch) -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of each row that has targets."""
    found = []
    for part in batch.micro_batches:
        found += list(zip(part.inputs["tokens"].tolist(), part.labels.tolist(), strict=True))
    return [(tokens, labels) for tokens, labels in found if set(labels) != {-100}]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
def test_counts_are_whole_never_fall_and_stay_near_the_ideal(size: int) -> None:
    """Against exact fractions; the bounds are those that the docstring promises."""
    generator = random.Random(size)
    for kind in range(4):
        weights = sorted(Fraction(repr(generator.random() ** (1, 8, 40, 0)[kind] + 1e-12)) for _ in range(size))
        shares = [weight / sum(weights) for weight in weights]
        scale = math.lcm(*(share.denominator for share in shares))
        whole = [int(share * scale) for share in shares]
        before = [0] * size
        harmonic = sum(1 / n for n in range(1, size))
        for rows in [*range(700), 10**6, 10**6 + 1, 10**15, 10**15 + 1]:
            found = counts(whole, rows)
            assert sum(found) == rows
            assert min(b - a for a, b in zip(before, found, strict=True)) >= 0
            off = [count - rows * share for count, share in zip(found, shares, strict=True)]
            assert max(off) < 1
            assert min(off) == 0 or -min(off) < harmonic
            before = found


def test_shares_are_decimals_and_their_order_and_scale_mean_nothing() -> None:
    first = phase(0, a=0.7, b=0.3)
    assert first.shares() == {"b": Fraction(3, 10), "a": Fraction(7, 10)}
    assert phase(0, b=3.0, a=7.0).shares() == first.shares()
    assert located(Blend([phase(0, b=3, a=7)], {}, seed=1), 900) == located(Blend([first], {}, seed=1), 900)
    assert located(Blend([first], {}, seed=2), 900) != located(Blend([first], {}, seed=1), 900)


@pytest.mark.parametrize(
    "weights", [{"a": 1}, {"a": 0.7, "b": 0.3}, {"a": 0.9, "b": 0.099, "c": 0.001}, {"a": 1, "b": 1e-9}]
)
def test_shares_hold_in_every_hand_and_over_a_thousand_steps(weights: dict[str, float]) -> None:
    total = sum(weights.values())
    for seed in range(8):
        blend = Blend([phase(0, **weights)], {}, seed=seed)
        names = [name for name, _ in located(blend, 8000)]
        for name, weight in weights.items():
            wanted = weight / total
            for batch in (2, 4, 8):
                for steps, tolerance in ((1000, 0.001), (997, 0.002)):  # the second may end inside a hand
                    rows = steps * batch
                    assert abs(names[:rows].count(name) / rows - wanted) < tolerance
            for end in range(8, 8000, 8):
                assert abs(names[:end].count(name) - end * wanted) < 2


def test_hands_are_shuffled() -> None:
    """No pattern: every arrangement of a hand as often as any other, hands independent of each other."""
    blend = Blend([phase(0, a=0.75, b=0.25)], {}, seed=3)
    names = "".join(name for name, _ in located(blend, 28 * 200 * HAND))
    hands = Counter(names[start : start + HAND] for start in range(0, len(names), HAND))
    assert len(hands) == 28  # places of 2 among 8
    assert max(abs(count - 200) for count in hands.values()) < 5 * math.sqrt(200)
    pairs = Counter((names[n - HAND : n], names[n : n + HAND]) for n in range(HAND, len(names), HAND))
    assert len(pairs) == pytest.approx(28**2 * (1 - math.exp(-28 * 200 / 28**2)), abs=10)


def test_nothing_is_repeated_or_lost_through_phases() -> None:
    """Rows of each dataset come as 0, 1, 2, ... whatever happens to the blend, also where a phase begins in a block."""
    phases = [
        phase(0, a=0.7, b=0.3),
        phase(1000, a=0.2, b=0.8),
        phase(1007, a=0.5, c=0.5),  # without b
        phase(2301, a=0.1, b=0.6, c=0.3),  # with b again
        phase(4000, b=1.0),
    ]
    blend = Blend(phases, {}, seed=7)
    found = located(blend, 4600)
    for name in "abc":
        numbers = [number for digest, number in found if digest == name]
        assert numbers == list(range(len(numbers)))
    assert {digest for digest, _ in found[1007:2301]} == {"a", "c"}
    assert {digest for digest, _ in found[4000:]} == {"b"}
    for row in (0, 1, 255, 256, 999, 1000, 1003, 1007, 2300, 2301, 3999, 4000, 4599):
        assert blend.taken(row) == {name: Counter(d for d, _ in found[:row])[name] for name in "abc"}
    early = Blend(phases[:2], {}, seed=7)
    assert located(early, 1007) == found[:1007], "later phases change nothing of earlier ones"
    scattered = np.random.default_rng(1).integers(0, 4600, 300)
    assert located(blend, scattered) == [found[row] for row in scattered.tolist()]


@pytest.mark.parametrize("plan", ["concat", "pack"])
def test_one_dataset_has_the_order_that_it_has_alone(folders: list[Path], plan: str) -> None:
    data = open_sources(settings(folders[:1], plan=plan))
    rows = np.arange(3 * data.sources[0].plan.rows)
    alone = data.sources[0].rows(seed=5).read(rows, documents=True)
    blended = blend_of(data).read(rows, documents=True)
    assert np.array_equal(blended.tokens, alone.tokens)
    assert np.array_equal(blended.labels, alone.labels)


@pytest.mark.parametrize("plan", ["concat", "pack"])
def test_a_row_is_the_same_read_alone_or_among_others(folders: list[Path], plan: str) -> None:
    data = open_sources(settings(folders, plan=plan))
    blend = data.blend([Phase(row=0, sources=data.described()), Phase(row=300, sources=data.described()[::-1][:2])])
    rows = np.random.default_rng(2).integers(0, 700, 64)
    together = blend.read(rows, documents=True)
    assert together.documents is not None
    for place, row in enumerate(rows.tolist()):
        alone = blend.read(np.array([row]), documents=True)
        assert together.tokens[place].tolist() == alone.tokens[0].tolist()
        assert together.labels[place].tolist() == alone.labels[0].tolist()
        held = {int(document) for document in together.documents[place] if document >= 0}
        assert held == {origin.span.document for origin in blend.describe(row)}


@pytest.mark.parametrize("plan", ["concat", "pack"])
@pytest.mark.parametrize(
    ("world_size", "micro_batch", "batch"), [(1, 1, 48), (2, 4, 16), (3, 5, 12), (8, 2, 24), (8, 3, 4)]
)
def test_same_rows_for_any_ranks_micro_batches_and_batches(
    folders: list[Path], plan: str, world_size: int, micro_batch: int, batch: int
) -> None:
    data = open_sources(settings(folders, plan=plan))
    reference = rows_of(Loader(blend_of(data), settings(folders, plan=plan), rank=0, world_size=1).batch(40, 48))
    assert len(reference) == 48
    config = settings(folders, plan=plan, micro_batch=micro_batch)
    found = []
    for first in range(40, 88, batch):
        for rank in range(world_size):
            found += rows_of(Loader(blend_of(data), config, rank=rank, world_size=world_size).batch(first, batch))
    assert found == reference


def test_a_ramp_takes_the_same_rows_in_other_portions(folders: list[Path]) -> None:
    stages = [{"steps": 3, "batch_tokens": 2 * CONTEXT}, {"steps": 2, "batch_tokens": 5 * CONTEXT}]
    ramped = settings(folders, batch_ramp=stages)
    loader = Loader(blend_of(open_sources(ramped)), ramped, rank=0, world_size=1)
    sizes, found = [], []
    for step in range(1, 8):
        rows = rows_of(loader.batch(*ramped.rows_of_step(step)))
        sizes.append(len(rows))
        found += rows
    assert sizes == [2, 2, 2, 5, 5, 8, 8]
    assert found == rows_of(loader.batch(0, 32))


def test_every_row_of_a_dataset_once_per_epoch(folders: list[Path]) -> None:
    """Through what `describe` says: epoch after epoch of the smallest dataset, none of its rows twice."""
    data = open_sources(settings(folders[1:]))
    small = data.sources[1]
    blend = blend_of(data)
    seen: dict[int, list[int]] = {}
    for row in range(1200):
        origins = blend.describe(row)
        if origins[0].dataset == small.name:
            seen.setdefault(origins[0].epoch, []).append(origins[0].row)
    assert len(seen) > 1
    for epoch in range(len(seen) - 1):
        assert sorted(seen[epoch]) == list(range(small.plan.rows))
    assert seen[0] != seen[1]


def test_a_dataset_of_an_earlier_phase_is_named_when_it_is_gone(folders: list[Path]) -> None:
    data = open_sources(settings(folders[:1]))
    gone = PhaseSource(name="old", digest="0" * 64, settings=SourceConfig(path="data/old"))
    blend = data.blend([Phase(row=0, sources=(gone,)), Phase(row=10, sources=data.described())])
    assert len(blend.read(np.arange(10, 20), documents=False)) == 10
    assert blend.missing(np.arange(20)) == [gone]
    with pytest.raises(UserError, match=r"row 3 is of old, which is no part of the blend any more \(data/old\)"):
        blend.describe(3)


def test_datasets_that_do_not_fit_together_are_refused(folders: list[Path], tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "other", tokenizer="chars")
    with pytest.raises(UserError) as caught:
        open_sources(settings([folders[0], other]))
    for word in ("one tokenizer", "part-0: tokenizer ", "other: tokenizer ", "257 tokens"):
        assert word in str(caught.value)
    (tmp_path / "copy").symlink_to(folders[0])
    with pytest.raises(UserError, match="hold the same data"):
        open_sources(settings([folders[0], tmp_path / "copy"]))
    huge = settings(folders).model_dump()
    huge["model"]["context_length"] = huge["train"]["batch_tokens"] = 2**20
    with pytest.raises(UserError, match=r"part-0 has \d+ training tokens, one row needs 1048577: .* data.plan to pack"):
        open_sources(Config.model_validate(huge))


def test_data_without_a_pair_is_told_as_it_is(tmp_path: Path) -> None:
    np.full(500, 256, np.uint16).tofile(tmp_path / "ends.bin")
    about = {"path": str(tmp_path / "ends.bin"), "tokenizer": "bytes", "dtype": "uint16", "plan": "pack"}
    config = Config.model_validate({**settings([tmp_path]).model_dump(), "data": about})
    with pytest.raises(UserError, match="has 500 training tokens, but no document of two or more"):
        open_sources(config)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nano", "is data of another tool, .*name the tokenizer"),
        ("nano/train.bin", "is data of another tool"),
        ("nano/*.bin", "is data of another tool"),
        ("megatron", "is data of another tool"),
        ("megatron.idx", "is data of another tool"),
        ("text.jsonl", "is a file, wanted a folder: python data_prep.py .*text.jsonl --output"),
        ("other", "no dataset folder"),
        ("unfinished", "is not complete"),
    ],
)
def test_what_is_no_dataset_is_told_apart(tmp_path: Path, path: str, message: str) -> None:
    for folder in ("nano", "unfinished"):
        (tmp_path / folder).mkdir()
    names = ("nano/train.bin", "megatron.bin", "megatron.idx", "text.jsonl", "unfinished/train-00000.bin")
    for name in names:
        (tmp_path / name).write_bytes(b"\1\0\2\0")
    with pytest.raises(UserError, match=message):
        open_sources(settings([tmp_path / path]))


def test_validation_is_each_val_split_once(folders: list[Path]) -> None:
    config = settings(folders)
    data = open_sources(config)
    validation = data.validation(config, rank=0, world_size=1)
    assert [one.name for one in validation] == ["part-0", "part-2"]
    for one, number in zip(validation, (0, 2), strict=True):
        labels = [label for _, row in rows_of(one.loader.batch(0, one.plan.all_rows)) for label in row if label >= 0]
        split = data.sources[number].dataset.split("val")
        assert labels == split.tokens(1, split.n_tokens).tolist()


def test_the_seed_is_in_the_order_of_rows_and_in_what_is_packed_together(folders: list[Path]) -> None:
    values = settings(folders[:1], plan="pack").model_dump()
    plans, orders = [], []
    for seed in (5, 6):
        data = open_sources(Config.model_validate({**values, "seed": seed}))
        plans.append([data.sources[0].plan.spans(row, 0) for row in range(20)])
        orders.append([origins[0].row for origins in map(blend_of(data).describe, range(20))])
    assert plans[0] != plans[1]
    assert orders[0] != orders[1]


def test_names_tell_datasets_apart() -> None:
    assert unique_names(["data/web", "data/code"]) == ["web", "code"]
    assert unique_names(["a/web", "b/web", "c"]) == ["a/web", "b/web", "c"]
    assert unique_names(["a/x/web", "b/x/web"]) == ["a/x/web", "b/x/web"]
    assert unique_names(["one"]) == ["one"]


@pytest.mark.parametrize("plan", ["concat", "pack"])
def test_data_of_other_tools_joins_a_blend(folders: list[Path], tmp_path: Path, plan: str) -> None:
    """Bare ids, as nanoGPT's prepare.py writes them, beside a dataset of ours; both of one tokenizer."""
    split = open_sources(settings(folders[:1])).sources[0].dataset.split("train")
    ids = split.tokens(0, split.n_tokens).astype(np.uint16)[100:]
    ids[: len(ids) * 3 // 4].tofile(tmp_path / "train.bin")
    ids[len(ids) * 3 // 4 :].tofile(tmp_path / "val.bin")
    config = settings(folders[1:2], plan=plan).model_dump()
    config["data"]["sources"] += ({"path": str(tmp_path), "tokenizer": "bytes", "dtype": "uint16"},)
    data = open_sources(Config.model_validate(config))
    raw = data.sources[1]
    assert raw.dataset.split("train").n_tokens == len(ids) * 3 // 4
    seen = {origin.dataset for row in range(60) for origin in blend_of(data).describe(row)}
    assert seen == {folders[1].name, tmp_path.name}
    (one,) = data.validation(Config.model_validate(config), rank=0, world_size=1)
    assert one.name == tmp_path.name
    config["data"]["sources"][1]["dtype"] = None
    with pytest.raises(UserError, match="dtype"):
        open_sources(Config.model_validate(config))
