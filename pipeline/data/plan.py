"""Sources to units of work: where to cut, as a pure function of the sources and the rules.

In: sources in order. Out: units of about 64 MB of text, each a list of pieces. Cutting reads metadata, and once each
file that is larger than a unit; the number of workers never enters.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.formats import BOM, Piece, Source, TextRules, chunk_end
from pipeline.errors import UserError

_COMPRESSION_RATIO = 4
"""Expected text bytes of a compressed byte, for the size of units and the progress bar only."""


@dataclass(frozen=True)
class Unit:
    """Work for one task: pieces in order, about `TextRules.unit_bytes` of text."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Expected bytes of text."""
        return sum(piece.size for piece in self.pieces)


def plan_units(sources: Sequence[Source], rules: TextRules) -> tuple[Unit, ...]:
    """Cut sources into pieces and group these, in order, into units of about `rules.unit_bytes`."""
    groups: list[list[Piece]] = []
    filled = 0
    for index, source in enumerate(sources):
        for piece in _cut(source, index, rules):
            if not groups or filled + piece.size > rules.unit_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(piece)
            filled += piece.size
    return tuple(Unit(number, tuple(pieces)) for number, pieces in enumerate(groups))


def _cut(source: Source, index: int, rules: TextRules) -> Iterator[Piece]:
    """The pieces of one source."""
    if source.size == 0:
        return
    if source.kind in ("hub", "saved"):
        yield from _cut_rows(source, index, rules)
    elif source.kind == "parquet":
        yield from _cut_row_groups(source, index, rules)
    elif source.compression:
        yield Piece(source, index, 0, source.size, 0, source.size * _COMPRESSION_RATIO)
    elif source.size <= rules.unit_bytes or source.kind in ("json", "csv"):
        yield Piece(source, index, 0, source.size, 0, source.size)
    elif source.kind == "jsonl":
        yield from _cut_bytes(source, index, rules, _records_until(b"\n", rules.unit_bytes))
    elif rules.separator is not None:
        yield from _cut_bytes(source, index, rules, _records_until(rules.separator.encode(), rules.unit_bytes))
    else:
        yield from _cut_bytes(source, index, rules, _chunks_until(rules.unit_bytes))


def _cut_rows(source: Source, index: int, rules: TextRules) -> Iterator[Piece]:
    rows = source.rows
    step = max(1, rules.unit_bytes * rows // source.size)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield Piece(source, index, start, stop, start, source.size * (stop - start) // rows)


def _cut_row_groups(source: Source, index: int, rules: TextRules) -> Iterator[Piece]:
    try:
        metadata = pq.ParquetFile(source.name).metadata
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {source.name}: {error}; the file is damaged or incomplete") from None
    columns = [metadata.schema.column(number).path.split(".")[0] for number in range(metadata.num_columns)]
    text = columns.index(rules.key) if rules.key in columns else 0
    row = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        yield Piece(source, index, number, number + 1, row, int(group.column(text).total_uncompressed_size))
        row += group.num_rows


_Step = Callable[[mmap.mmap, int], tuple[int, int]]
"""From a map and a position to the end of the piece that begins there and the records in it."""


def _cut_bytes(source: Source, index: int, rules: TextRules, step: _Step) -> Iterator[Piece]:
    """Byte ranges that end where records end. Rows before a piece are counted, which reads the file once."""
    with Path(source.name).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start, row = (len(BOM) if content[:3] == BOM else 0), 0
        while start < len(content):
            stop, records = step(content, start)
            yield Piece(source, index, start, stop, row, stop - start)
            start, row = stop, row + records


def _records_until(delimiter: bytes, size: int) -> _Step:
    def step(content: mmap.mmap, start: int) -> tuple[int, int]:
        found = content.find(delimiter, start + size)
        stop = len(content) if found < 0 else found + len(delimiter)
        return stop, content[start:stop].count(delimiter)

    return step


def _chunks_until(size: int) -> _Step:
    def step(content: mmap.mmap, start: int) -> tuple[int, int]:
        stop, chunks = start, 0
        while stop < len(content) and stop - start < size:
            stop, chunks = chunk_end(content, stop, len(content)), chunks + 1
        return stop, chunks

    return step
