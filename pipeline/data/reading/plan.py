"""Sources to units of work: where to cut, as a pure function of the sources and the rules.

In: sources in order. Out: units of about 64 MB of text, each a list of pieces. Planning reads metadata and, of each
large file, the places where it is cut, never whole files; the number of workers never enters. A table or an array is
one piece, and so is a compressed file, for where its records begin is known only to who read what is before them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import pyarrow.parquet as pq

from pipeline.data.reading.bytestream import BLOCK_BYTES, CutFinder
from pipeline.data.reading.formats import Piece, Source, TextRules
from pipeline.data.reading.readers import DAMAGE, column_bytes, require_column
from pipeline.errors import UserError

_COMPRESSION_RATIO = 4
"""Expected text bytes of a compressed byte: decides what shares a unit, and feeds the progress bar."""
_FIRST_LOOK_BYTES = 2**16


@dataclass(frozen=True)
class Begun:
    """What is done of a unit: its first `parts` parts hold `records` of its records and `rows` of each source."""

    parts: int = 0
    records: int = 0
    rows: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Unit:
    """Work for one task: pieces in order, about `TextRules.unit_bytes` of text, or one source that cannot be cut."""

    number: int
    pieces: tuple[Piece, ...]
    begun: Begun = Begun()

    @property
    def name(self) -> str:
        """`00012`. Names sort as units do, up to 100,000 of them."""
        return f"{self.number:05d}"

    @property
    def size(self) -> int:
        """Expected bytes of text."""
        return sum(piece.size for piece in self.pieces)

    @property
    def may_be_any_size(self) -> bool:
        """Whether it holds sources that are not cut, so that it may have more text than a unit should."""
        return any(piece.source.compression or piece.source.kind in ("csv", "json") for piece in self.pieces)


def plan_units(sources: Sequence[Source], rules: TextRules) -> tuple[Unit, ...]:
    """Cut sources into pieces and group these, in order, into units of about `rules.unit_bytes`.

    Raises `UserError` for a parquet file without the text column and for a file that cannot be opened.
    """
    groups: list[list[Piece]] = []
    filled = rules.unit_bytes + 1
    empty: list[Piece] = []  # files that hold nothing are counted where there is work: they begin no unit
    for index, source in enumerate(sources):
        if not source.size:
            empty += [Piece(source, index, 0, 0, 0)] if source.kind == "text" else []
            continue
        for piece in _cut(source, index, rules):
            if filled + piece.size > rules.unit_bytes:
                groups.append([])
                filled = 0
            groups[-1] += [*empty, piece]
            filled += piece.size
            empty = []
    if empty and not groups:
        groups.append([])
    if empty:
        groups[-1] += empty
    return tuple(Unit(number, tuple(pieces)) for number, pieces in enumerate(groups))


def _cut(source: Source, index: int, rules: TextRules) -> Iterator[Piece]:
    """The pieces of one source, which holds something."""
    if source.kind == "saved":
        yield from _cut_rows(source, index, rules)
    elif source.kind == "parquet":
        yield from _cut_row_groups(source, index, rules)
    elif source.compression:
        yield Piece(source, index, 0, source.size, source.size * _COMPRESSION_RATIO)
    elif source.size <= rules.unit_bytes or source.kind in ("json", "csv"):
        yield Piece(source, index, 0, source.size, source.size)
    else:
        for start, stop in _cut_bytes(source, rules):
            yield Piece(source, index, start, stop, stop - start, whole=False)


def _cut_rows(source: Source, index: int, rules: TextRules) -> Iterator[Piece]:
    rows = source.rows
    step = max(1, rules.unit_bytes * rows // source.size)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield Piece(source, index, start, stop, source.size * (stop - start) // rows, whole=step >= rows)


def _cut_row_groups(source: Source, index: int, rules: TextRules) -> Iterator[Piece]:
    """Row groups, joined up to a unit. A file whose metadata is unreadable is a piece that says so when it is read."""
    try:
        with pq.ParquetFile(source.file) as file:
            metadata, names = file.metadata, file.schema_arrow.names
    except DAMAGE:
        yield Piece(source, index, 0, 0, source.size)
        return
    require_column(names, source.name, rules.key)
    groups = metadata.num_row_groups
    sizes = [column_bytes(metadata, number, rules.key) for number in range(groups)]
    start, size = 0, 0
    for number in range(groups):
        if number > start and size + sizes[number] > rules.unit_bytes:
            yield Piece(source, index, start, number, size, whole=False)
            start, size = number, 0
        size += sizes[number]
    if groups:
        yield Piece(source, index, start, groups, size, whole=start == 0)


def _cut_bytes(source: Source, rules: TextRules) -> Iterator[tuple[int, int]]:
    """Ranges of a plain file that end where records do."""
    try:
        with source.file.open("rb", buffering=0) as file:
            start = 0
            while start < source.size:
                stop = _next_cut(file, source.size, _finder(source, rules, start))
                yield start, stop
                start = stop
    except OSError as error:
        raise UserError(f"cannot read {source.name}: {error.strerror or error}") from None


def _next_cut(file: IO[bytes], size: int, finder: CutFinder) -> int:
    """Where the finder cuts, or `size`. The first look is short: most often the end of a record is near."""
    look = _FIRST_LOOK_BYTES
    file.seek(finder.position)
    while block := file.read(min(look, max(size - finder.position, 0))):
        cut = finder.find(block)
        if cut is not None:
            return min(cut, size)
        look = BLOCK_BYTES
    return size


def _finder(source: Source, rules: TextRules, start: int) -> CutFinder:
    separated = source.kind == "text" and rules.separator is not None
    delimiter = rules.separator.encode() if separated and rules.separator else b"\n"
    flexible = source.kind == "text" and not separated
    return CutFinder(start, size=rules.unit_bytes, delimiter=delimiter, flexible=flexible)
