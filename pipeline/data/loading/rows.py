"""How the documents of a split become rows of T positions, and the rows themselves.

In: a `TokenSplit` and row numbers. Out: `Rows`, arrays of tokens and labels. A plan is a pure function of row and
epoch: `Concat` lays documents end to end and cuts every T tokens, `Pack` fits whole documents together.
Letters: B rows, T positions of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.data.dataset import TokenSplit
from pipeline.data.loading.packing import pack_shapes
from pipeline.data.order import Indices, mix_keys, permute
from pipeline.data.shards import DocumentInfo

IGNORED = -100  # as a label: nothing to predict here
PADDING = -1  # as a document: none


@dataclass(frozen=True)
class Span:
    """Tokens [start, start + length) of the split's stream, of one document, are inputs at `place` and after it.

    Their labels are the tokens one later.
    """

    document: int
    start: int
    length: int
    place: int


@dataclass(frozen=True)
class Origin:
    """Where a span comes from: its dataset, the epoch and row of that dataset's plan, and its document."""

    dataset: str
    epoch: int
    row: int
    span: Span
    info: DocumentInfo


@dataclass(frozen=True)
class Rows:
    """B rows of T positions.

    tokens (B, T), 0 where there is none. labels (B, T), -100 where there is nothing to predict. documents (B, T), None
    when not asked for: equal within a document, -1 on padding. positions (B, T), from 0 in each span; None: 0..T-1.
    crossing (B, T): which labels begin another document than their token's; None: none does, or not asked for.
    """

    tokens: Indices
    labels: Indices
    documents: Indices | None
    positions: Indices | None
    crossing: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        """B."""
        return len(self.tokens)

    def __getitem__(self, chosen: slice | Indices) -> Rows:
        """Some of these rows, in the order given."""
        return Rows(
            tokens=self.tokens[chosen],
            labels=self.labels[chosen],
            documents=None if self.documents is None else self.documents[chosen],
            positions=None if self.positions is None else self.positions[chosen],
            crossing=None if self.crossing is None else self.crossing[chosen],
        )

    @staticmethod
    def join(parts: Sequence[Rows], places: Sequence[Indices]) -> Rows:
        """The rows of `parts`, at least one, each at its place; `places`, (rows of the part,) each, cover 0..B-1.

        The parts come from plans of one kind and were asked for alike.
        """
        names = [field.name for field in fields(Rows)]
        return Rows(**{name: _joined([getattr(part, name) for part in parts], places) for name in names})


def _joined(arrays: Sequence[NDArray[Any] | None], places: Sequence[Indices]) -> Any:
    given = [array for array in arrays if array is not None]
    assert len(given) in (0, len(arrays)), "rows of different kinds of plans cannot be joined"
    if not given:
        return None
    rows = sum(len(at) for at in places)
    joined = np.empty((rows, *given[0].shape[1:]), dtype=given[0].dtype)
    for array, at in zip(given, places, strict=True):
        joined[at] = array
    return joined


class Plan(Protocol):
    """The rows of one split. `rows` full ones an epoch, `targets` in them; `all_rows` with a last partial one."""

    split: TokenSplit
    context_length: int
    rows: int
    all_rows: int
    targets: int

    def read(self, rows: Indices, epochs: Indices, *, documents: bool) -> Rows:
        """Rows number `rows` of `epochs`, both (B,). `documents`: also tell which document each position is of.

        Errors: an id outside the vocabulary.
        """

    def spans(self, row: int, epoch: int) -> list[Span]:
        """What lies where in a row."""


class Concat:
    """Documents end to end; row r holds tokens [rT, rT + T], so each token but the first is a target once an epoch.

    `dropped` targets at the end of an epoch do not fill a row; `all_rows` counts the partial row that holds them.
    """

    def __init__(self, split: TokenSplit, *, context_length: int) -> None:
        self.split = split
        self.context_length = context_length
        targets = max(split.n_tokens - 1, 0)
        self.rows = targets // context_length
        self.all_rows = -(-targets // context_length)
        self.targets = self.rows * context_length
        self.dropped = targets - self.targets

    def read(self, rows: Indices, epochs: Indices, *, documents: bool) -> Rows:
        """As `Plan.read`; every epoch has the same rows."""
        return _in_vocabulary(self._read(rows, documents=documents), self, numbers=rows, epochs=epochs)

    def _read(self, rows: Indices, *, documents: bool) -> Rows:
        T = self.context_length
        starts = rows * T
        lengths = np.minimum(starts + T, self.split.n_tokens - 1) - starts
        ids = np.empty((len(rows), T + 1), dtype=self.split.dtype)
        for row, found in enumerate(self.split.ranges(starts, starts + lengths + 1)):
            ids[row, : len(found)] = found
        tokens, labels = ids[:, :-1].astype(np.int64), ids[:, 1:].astype(np.int64)
        for row in np.flatnonzero(lengths < T).tolist():
            tokens[row, lengths[row] :], labels[row, lengths[row] :] = 0, IGNORED
        if not documents:
            return Rows(tokens, labels, documents=None, positions=None)
        numbers = np.full((len(rows), T + 1), PADDING, dtype=np.int64)
        for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            numbers[row, : length + 1] = self.split.document_of(start, start + length + 1)
        crossing = numbers[:, 1:] != numbers[:, :-1]
        numbers = np.where(labels == IGNORED, PADDING, numbers[:, :-1])
        return Rows(tokens, labels, documents=numbers, positions=None, crossing=crossing)

    def spans(self, row: int, epoch: int) -> list[Span]:
        """As `Plan.spans`."""
        start = row * self.context_length
        numbers = self.split.document_of(start, min(start + self.context_length, self.split.n_tokens - 1))
        edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
        return [Span(int(numbers[a]), start + a, b - a, place=a) for a, b in pairwise(edges)]


class Pack:
    """Whole documents, fitted together: every token but a document's first is a target once an epoch.

    A document of n tokens has n - 1 pairs of a token and the next one; they are cut into pieces of T pairs and a rest,
    and the pieces packed into rows. Which piece of its length takes a slot is drawn anew each epoch from `key`, so
    documents meet new neighbours. Memory: 12 bytes per document beside the split's own 4 (16 from 2^32 documents on).
    """

    def __init__(self, split: TokenSplit, *, context_length: int, key: int) -> None:
        self.split = split
        self.context_length = context_length
        self.key = key
        self._starts = np.concatenate(([0], np.cumsum(split.lengths, dtype=np.int64)))  # first token of each document
        whole, rest = np.divmod(np.maximum(split.lengths - 1, 0), context_length)
        self._long = np.flatnonzero(whole)  # documents with pieces of T pairs
        self._whole_before = np.concatenate(([0], np.cumsum(whole[self._long], dtype=np.int64)))
        self._counts = np.bincount(rest, minlength=context_length + 1)
        without = int(self._counts[0])  # documents without a rest
        self._counts[[0, context_length]] = 0, self._whole_before[-1]
        # few bits make this a radix sort
        by_rest = np.argsort(rest.astype(np.uint16) if context_length <= 2**16 else rest, kind="stable")[without:]
        self._by_rest = by_rest.astype(np.uint32 if len(whole) <= 2**32 else np.int64)
        self._first_rest = np.cumsum(self._counts) - self._counts
        self._shapes = pack_shapes(self._counts, size=context_length)
        self.rows = self.all_rows = int(self._shapes.first_row[-1])
        self.targets = int(self._counts @ np.arange(context_length + 1))

    def read(self, rows: Indices, epochs: Indices, *, documents: bool) -> Rows:
        """As `Plan.read`; no label begins a document."""
        slots = self._slots(rows, epochs)
        shape = (len(rows), self.context_length)
        tokens, labels, positions = (np.empty(shape, dtype=np.int64) for _ in range(3))
        flat_tokens, flat_labels, flat_positions = tokens.reshape(-1), labels.reshape(-1), positions.reshape(-1)
        count = np.arange(self.context_length)
        held = slots.document != PADDING
        columns = (slots.place.tolist(), slots.length.tolist(), held.tolist())
        found = self.split.ranges(slots.start, slots.start + np.where(held, slots.length + 1, 0))
        for place, length, full, ids in zip(*columns, found, strict=True):
            stop = place + length
            flat_positions[place:stop] = count[:length]
            flat_tokens[place:stop] = ids[:-1] if full else 0
            flat_labels[place:stop] = ids[1:] if full else IGNORED
        numbers = np.repeat(slots.document, slots.length).reshape(shape) if documents else None
        made = Rows(tokens, labels, documents=numbers, positions=positions)
        return _in_vocabulary(made, self, numbers=rows, epochs=epochs)

    def spans(self, row: int, epoch: int) -> list[Span]:
        """As `Plan.spans`."""
        slots = self._slots(np.array([row]), np.array([epoch]))
        columns = (slots.document.tolist(), slots.start.tolist(), slots.length.tolist(), slots.place.tolist())
        return [Span(*values) for values in zip(*columns, strict=True) if values[0] != PADDING]

    def _slots(self, rows: Indices, epochs: Indices) -> _Slots:
        shapes = self._shapes
        shape = np.searchsorted(shapes.first_row, rows, side="right") - 1
        runs_of_row = shapes.first_run[shape + 1] - shapes.first_run[shape]
        run = _ranges(shapes.first_run[shape], runs_of_row)
        row = np.repeat(np.arange(len(rows)), runs_of_row)  # the row of each run
        slots = shapes.slots[run]
        earlier = (rows - shapes.first_row[shape])[row]  # rows of the same shape
        ordinal = _ranges(shapes.ordinal[run] + earlier * slots, slots)
        length = np.repeat(shapes.length[run], slots)
        place = np.cumsum(length) - length  # the lengths of every row sum to T
        document, start = np.full(len(length), PADDING, dtype=np.int64), np.zeros(len(length), dtype=np.int64)
        held = np.repeat(shapes.ordinal[run] >= 0, slots)
        document[held], start[held] = self._pieces(ordinal[held], length[held], epochs[np.repeat(row, slots)[held]])
        return _Slots(document, start, length=length, place=place)

    def _pieces(self, ordinal: Indices, length: Indices, epoch: Indices) -> tuple[Indices, Indices]:
        """Document and first token of the piece in slot number `ordinal` of its length, all (slots,)."""
        number = permute(ordinal, n=self._counts[length], key=mix_keys(self.key, epoch, length))
        document, start = np.empty_like(number), np.empty_like(number)
        whole = length == self.context_length
        at = np.searchsorted(self._whole_before, number[whole], side="right") - 1
        document[whole] = self._long[at]
        start[whole] = self._starts[self._long[at]] + (number[whole] - self._whole_before[at]) * self.context_length
        rest = ~whole
        document[rest] = self._by_rest[self._first_rest[length[rest]] + number[rest]]
        start[rest] = self._starts[document[rest] + 1] - 1 - length[rest]  # a rest is the end of its document
        return document, start


@dataclass(frozen=True)
class _Slots:
    """Slots of some rows in order, padding among them: document, start as in `Span`; place counts through all rows."""

    document: Indices
    start: Indices
    length: Indices
    place: Indices


def _in_vocabulary(read: Rows, plan: Plan, *, numbers: Indices, epochs: Indices) -> Rows:
    """`read`, which is rows `numbers` of `epochs`. Errors: an id that a device would fail on, and not say why.

    Costs a hundredth of reading.
    """
    size = plan.split.vocab_size
    tokens = read.tokens.view(np.uint64)  # in which negative ids are large; labels may be -100, and most are tokens too
    if not tokens.size or (tokens.max() < size and read.labels.max() < size and read.labels.min() >= IGNORED):
        return read
    for row, epoch in zip(numbers.tolist(), epochs.tolist(), strict=True):
        for span in plan.spans(row, epoch):
            plan.split.checked_tokens(span.start, span.start + span.length + 1)
    raise AssertionError("rows hold an id that their spans do not")


def _ranges(starts: Indices, counts: Indices) -> Indices:
    """The numbers [starts[i], starts[i] + counts[i]) of all i, end to end."""
    shifts: Indices = starts - (np.cumsum(counts) - counts)
    return np.arange(int(counts.sum()), dtype=np.int64) + np.repeat(shifts, counts)
