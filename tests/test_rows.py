"""Plans of rows against the documents themselves, laid out the naive way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.dataset import TokenSplit
from pipeline.data.loading.packing import best_fit
from pipeline.data.loading.rows import IGNORED, PADDING, Concat, Pack, Plan, Rows
from pipeline.data.shards import DocumentInfo

T = 8
APART = 100_000
LENGTHS = [1, 2, 3, T - 1, T, T + 1, T + 2, 2 * T, 2 * T + 1, 10 * T, 10 * T + 3]


class ListedPart:
    """Documents in memory: token i of document d of all parts is 100,000 d + i, so that each tells where it is from."""

    def __init__(self, lengths: Sequence[int], *, keep: Sequence[bool] | None, first: int) -> None:
        self.lengths = np.array(lengths, np.int32)
        self.keep = None if keep is None else np.array(keep, np.bool_)
        self.n_documents, self.n_tokens = len(lengths), sum(lengths)
        ids = [np.arange(length) + APART * (first + number) for number, length in enumerate(lengths)]
        self.tokens: npt.NDArray[np.int32] = np.concatenate([*ids, np.zeros(0)]).astype(np.int32)
        self._starts = np.concatenate(([0], np.cumsum(self.lengths)))

    def starts(self, first: int, stop: int) -> npt.NDArray[np.int64]:
        return self._starts[first:stop]

    def document_at(self, token: int) -> int:
        return int(np.flatnonzero(self._starts <= token)[-1])

    def describe(self, document: int) -> DocumentInfo:
        return DocumentInfo(source="list", row=document, tokens=int(self.lengths[document]), text_bytes=0)


def make_split(parts: Sequence[tuple[Sequence[int], Sequence[bool] | None]]) -> tuple[TokenSplit, list[list[int]]]:
    """A split and the documents that are kept in it, as lists of ids."""
    listed, documents, first = [], [], 0
    for lengths, keep in parts:
        listed.append(ListedPart(lengths, keep=keep, first=first))
        for number, length in enumerate(lengths):
            if keep is None or keep[number]:
                documents.append([APART * (first + number) + i for i in range(length)])
        first += len(lengths)
    return TokenSplit(listed, text_bytes=1, dtype=np.dtype(np.int32), vocab_size=2**31), documents


@st.composite
def splits(draw: st.DrawFn) -> tuple[TokenSplit, list[list[int]]]:
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        lengths = draw(st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=8))
        sizes = {"min_size": len(lengths), "max_size": len(lengths)}
        parts.append((lengths, draw(st.none() | st.lists(st.booleans(), **sizes))))
    return make_split(parts)


def read_all(plan: Plan, epoch: int = 0, *, documents: bool = True) -> Rows:
    return plan.read(np.arange(plan.all_rows), np.full(plan.all_rows, epoch), documents=documents)


def check_spans(plan: Plan, rows: Rows, epoch: int) -> None:
    """What `spans` says is what the arrays hold: no more, no less."""
    stream = plan.split.tokens(0, plan.split.n_tokens)
    for row in range(plan.all_rows):
        expected = np.zeros((4, plan.context_length), np.int64)
        expected[1], expected[2] = IGNORED, PADDING
        for span in plan.spans(row, epoch):
            place = slice(span.place, span.place + span.length)
            expected[0, place] = stream[span.start : span.start + span.length]
            expected[1, place] = stream[span.start + 1 : span.start + 1 + span.length]
            expected[2, place] = span.document
            expected[3, place] = range(span.length)
        assert rows.tokens[row].tolist() == expected[0].tolist()
        assert rows.labels[row].tolist() == expected[1].tolist()
        assert rows.documents is not None
        assert rows.documents[row].tolist() == expected[2].tolist()
        if rows.positions is not None:
            real = rows.documents[row] != PADDING
            assert rows.positions[row][real].tolist() == expected[3][real].tolist()
            assert rows.positions[row].max() < plan.context_length


@given(splits())
@settings(max_examples=60)
def test_concat_lays_documents_end_to_end(made: tuple[TokenSplit, list[list[int]]]) -> None:
    split, documents = made
    plan = Concat(split, context_length=T)
    stream = [token for document in documents for token in document]
    owner = [number for number, document in enumerate(documents) for _ in document]
    pairs = [*pairwise(stream)]
    assert plan.rows == len(pairs) // T
    assert plan.all_rows == -(-len(pairs) // T)
    assert (plan.targets, plan.dropped) == (plan.rows * T, len(pairs) % T)
    rows = read_all(plan)
    for row in range(plan.all_rows):
        inside = pairs[row * T : (row + 1) * T]
        empty = T - len(inside)
        assert rows.tokens[row].tolist() == [a for a, _ in inside] + [0] * empty
        assert rows.labels[row].tolist() == [b for _, b in inside] + [IGNORED] * empty
        assert rows.documents is not None
        assert rows.documents[row].tolist() == owner[row * T : row * T + len(inside)] + [PADDING] * empty
        assert rows.crossing is not None
        crossing = [owner[i] != owner[i + 1] for i in range(row * T, row * T + len(inside))]
        assert rows.crossing[row, : len(inside)].tolist() == crossing
    assert rows.positions is None
    check_spans(plan, rows, 0)
    plain = read_all(plan, documents=False)
    assert plain.documents is plain.crossing is None
    assert np.array_equal(plain.tokens, rows.tokens)
    assert np.array_equal(plain.labels, rows.labels)


@given(splits(), st.sampled_from([1, 3, T, 3 * T]), st.integers(0, 2**63))
@settings(max_examples=60)
def test_pack_teaches_every_pair_once(made: tuple[TokenSplit, list[list[int]]], context: int, key: int) -> None:
    split, documents = made
    plan = Pack(split, context_length=context, key=key)
    pairs = [pair for document in documents for pair in pairwise(document)]
    assert plan.targets == len(pairs)
    assert plan.rows == plan.all_rows
    for epoch in (0, 1):
        rows = read_all(plan, epoch)
        taught = rows.labels != IGNORED
        found = zip(rows.tokens[taught].tolist(), rows.labels[taught].tolist(), strict=True)
        assert sorted(found) == sorted(pairs)
        assert rows.documents is not None
        assert (taught == (rows.documents != PADDING)).all()
        assert (rows.tokens[~taught] == 0).all()
        check_spans(plan, rows, epoch)


def test_pieces_are_cut_at_the_context_and_stay_whole() -> None:
    split, _ = make_split([([10 * T + 3, 3, T + 1], None)])
    plan = Pack(split, context_length=T, key=1)
    lengths = Counter(span.length for row in range(plan.rows) for span in plan.spans(row, 0))
    assert lengths == {T: 11, 2: 2}  # 10 T + 2 pairs, 2 pairs, T pairs
    assert {span.start % T for row in range(plan.rows) for span in plan.spans(row, 0) if span.document == 0} == {0}


def test_any_rows_of_any_epochs_in_any_order() -> None:
    split, _ = make_split([([*LENGTHS, *LENGTHS], None), (LENGTHS, [True, False] * 5 + [True])])
    for plan in (Pack(split, context_length=T, key=4), Concat(split, context_length=T)):
        epochs = [read_all(plan, epoch) for epoch in range(3)]
        generator = np.random.default_rng(1)
        rows, numbers = generator.integers(0, plan.rows, 40), generator.integers(0, 3, 40)
        mixed = plan.read(rows, numbers, documents=True)
        for place, (row, number) in enumerate(zip(rows.tolist(), numbers.tolist(), strict=True)):
            for name in ("tokens", "labels", "documents", "positions"):
                whole, part = getattr(epochs[number], name), getattr(mixed, name)
                assert (whole is part is None) or np.array_equal(whole[row], part[place])


def test_documents_meet_new_neighbours_each_epoch() -> None:
    generator = np.random.default_rng(2)
    split, _ = make_split([(generator.integers(2, 40, size=4000).tolist(), None)])
    plan = Pack(split, context_length=64, key=9)

    def neighbours(plan: Plan, epoch: int) -> set[tuple[int, int]]:
        documents = read_all(plan, epoch).documents
        assert documents is not None
        return {pair for row in documents for pair in pairwise(np.unique(row[row != PADDING]).tolist())}

    first, second = neighbours(plan, 0), neighbours(plan, 1)
    assert len(first & second) < len(first) / 20
    assert neighbours(plan, 0) == first
    assert len(first & neighbours(Pack(split, context_length=64, key=10), 0)) < len(first) / 20


def naive_best_fit(lengths: list[int], size: int) -> Counter[tuple[int, ...]]:
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        room = [size - sum(row) for row in rows]
        fits = [number for number, left in enumerate(room) if left >= length]
        if fits:
            rows[min(fits, key=lambda number: room[number])].append(length)
        else:
            rows.append([length])
    return Counter(tuple(row) for row in rows)


@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 40))
@settings(max_examples=100)
def test_rows_are_those_of_best_fit_decreasing(lengths: list[int], size: int) -> None:
    """Piece by piece; among rows with equal room either may choose another one, so shapes agree but for those."""
    counts = np.bincount(lengths, minlength=size + 1).tolist()
    found: Counter[tuple[int, ...]] = Counter()
    for runs, number in best_fit(counts, size=size):
        found[tuple(length for length, slots in runs for _ in range(slots))] += number
    naive = naive_best_fit(lengths, size)
    assert sum(found.values()) == sum(naive.values())
    pieces = Counter(length for row, number in found.items() for length in row * number)
    assert pieces == Counter(lengths)

    def filled(rows: Counter[tuple[int, ...]]) -> Counter[int]:
        return sum((Counter({sum(row): number}) for row, number in rows.items()), Counter())

    assert filled(found) == filled(naive)


def test_little_padding_on_lengths_as_they_occur() -> None:
    generator = np.random.default_rng(5)
    lengths = np.maximum(generator.lognormal(np.log(400), 1.0, size=20_000), 1).astype(int)
    split = TokenSplit(
        [ListedPart(lengths.tolist(), keep=None, first=0)], text_bytes=1, dtype=np.dtype(np.int32), vocab_size=2**31
    )
    for context in (256, 1024, 2048):
        plan = Pack(split, context_length=context, key=1)
        assert plan.targets == int((lengths - 1).sum())
        assert plan.targets / (plan.rows * context) > 0.99


@pytest.mark.parametrize(("context", "longest"), [(300, 2000), (2048, 8000), (70_000, 99_000)])
def test_nothing_is_lost_at_real_sizes(context: int, longest: int) -> None:
    """Lengths beyond one and two bytes: their sort keys are of the smallest type that holds them."""
    generator = np.random.default_rng(6)
    lengths = [*generator.integers(1, longest, size=60), *[600] * 20, 256, 512, 464, 66_000, 65_536 + 600]
    split, documents = make_split([(lengths, None)])
    plan = Pack(split, context_length=context, key=3)
    rows = read_all(plan, 1)
    taught = rows.labels != IGNORED
    assert np.array_equal(rows.labels[taught], rows.tokens[taught] + 1)
    expected = np.concatenate([document[:-1] for document in documents])
    assert np.array_equal(np.sort(rows.tokens[taught]), np.sort(expected))


@pytest.mark.parametrize("plan", [Concat, Pack])
@pytest.mark.parametrize("lengths", [[], [1], [1, 1]])
def test_splits_without_pairs(plan: type[Plan], lengths: list[int]) -> None:
    split, _ = make_split([(lengths, None)])
    made = Pack(split, context_length=T, key=1) if plan is Pack else Concat(split, context_length=T)
    assert made.targets == 0
    assert made.rows == 0
    if plan is Pack:
        assert made.all_rows == 0


def test_rows_are_chosen_and_joined() -> None:
    split, _ = make_split([(LENGTHS, None)])
    for plan in (Pack(split, context_length=T, key=4), Concat(split, context_length=T)):
        whole = read_all(plan)
        order = np.random.default_rng(0).permutation(len(whole))
        joined = Rows.join([whole[order[:5]], whole[order[5:]]], [order[:5], order[5:]])
        for name in ("tokens", "labels", "documents", "positions", "crossing"):
            old, new = getattr(whole, name), getattr(joined, name)
            assert (old is new is None) or np.array_equal(old, new)
    mixed = [read_all(Pack(split, context_length=T, key=4)), read_all(Concat(split, context_length=T))]
    with pytest.raises(AssertionError, match="different kinds of plans"):
        Rows.join(mixed, [np.arange(len(part)) for part in mixed])
