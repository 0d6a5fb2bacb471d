"""The parts of a unit: what cannot be cut by looking here and there is read once, and written as it is read.

In: a `Unit`, and how much of it is done. Out: the records of each of its parts in order, and what was counted of them.
A part depends on nothing but the unit and the rules, so a killed unit goes on with the part that it was at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from pipeline.data.reading.formats import Document, Rejected, TextRules
from pipeline.data.reading.plan import Unit
from pipeline.data.reading.readers import PieceRows, promised_rows, read_piece
from pipeline.errors import UserError


class DamagedInputError(UserError):
    """A unit's input cannot be read to its end; others are not concerned."""


class PartCounts(NamedTuple):
    """Of the records of one part: rows of each source, characters replaced, inputs that ended before their end."""

    rows: dict[int, int]
    replaced: int
    failed: tuple[str, ...]


class PartReader:
    """The records of a unit's pieces, part by part, from where it is begun, and what was counted of them.

    A part ends after `unit_bytes` of text, between two rows; a unit of pieces that were cut is one part.

    One record is read ahead, so that what happens between two parts is counted with the first, whenever the second is
    read.
    """

    def __init__(self, unit: Unit, rules: TextRules, *, allow_failed: bool) -> None:
        self.unit = unit
        self._rules, self._allow_failed = rules, allow_failed
        self._limit = rules.unit_bytes if unit.may_be_any_size else None
        self._ends: dict[int, int] = {}  # of each source: how many rows have been read
        self._starts = dict(unit.begun.rows)  # and how many of them are those of earlier parts
        self._replaced, self._failed = 0, list[str]()
        self._records = self._all()
        skipped = sum(1 for _ in islice(self._records, unit.begun.records))
        self._next = next(self._records, None)
        if unit.begun.parts and skipped == unit.begun.records:  # fewer: damage that came since is still to be told
            self._ends, self._replaced, self._failed = {}, 0, []  # counted with the parts that are done

    @property
    def ended(self) -> bool:
        """Whether no record is left."""
        return self._next is None

    def part(self) -> Iterator[Document | Rejected]:
        """The records of the next part; their rows count from its beginning."""
        size, place = 0, None
        while record := self._next:
            before, place = place, (record.source, record.row)
            if self._limit is not None and size >= self._limit and place != before:
                return
            size += len(record.content) if isinstance(record, Document) else len(record.reason)
            start = self._starts.get(record.source, 0)
            yield record._replace(row=record.row - start) if start else record
            self._ends[record.source] = record.row + 1
            self._next = next(self._records, None)

    def end_part(self) -> PartCounts:
        """What there is to tell of a part when all its records are taken."""
        rows = {source: max(end - self._starts.get(source, 0), 0) for source, end in self._ends.items()}
        counts = PartCounts(rows, self._replaced, tuple(self._failed))
        self._starts.update(self._ends)
        self._ends, self._replaced, self._failed = {}, 0, []
        return counts

    def where(self, source: int, row: int) -> str:
        """A row of the part, for a person to find."""
        piece = next(piece for piece in self.unit.pieces if piece.index == source)
        counted = f" counted from {piece.start}" if piece.start else ""
        return f"{piece.source.name}, row {row + self._starts.get(source, 0)}{counted}"

    def _all(self) -> Iterator[Document | Rejected]:
        """All records in order. Raises `DamagedInputError`, or goes on with the next piece if that is allowed."""
        rows: Counter[int] = Counter()
        for piece in self.unit.pieces:
            first = last = rows[piece.index]
            records = read_piece(piece, self._rules, first=first)
            try:
                while True:
                    record = next(records)
                    last = record.row + 1
                    yield record
            except StopIteration as end:
                counted: PieceRows = end.value
            except UserError as error:
                if not self._allow_failed:
                    raise DamagedInputError(str(error)) from None
                self._failed.append(str(error))
                # rows of the source that follow are counted from the end of the piece, or of what was read of it
                counted = PieceRows(max(last - first, promised_rows(piece)), 0)
            self._replaced += counted.replaced
            rows[piece.index] += counted.rows
            self._ends[piece.index] = rows[piece.index]
