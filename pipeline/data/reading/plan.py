"""Sources to units of work: where to cut, as a pure function of the sources and the rules.

In: sources in order. Out: units of about 64 MB of text, each a list of pieces. Planning reads metadata and, of each
large file, the places where it is cut, never whole files; the number of workers never enters. A table or an array is
one unit, for where its rows begin is known only to who read what is before them. A compressed file that is larger than
a unit becomes a stream unit, and `cut_stream` makes plain files of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.reading.bytestream import BLOCK_BYTES, CutFinder, open_stream
from pipeline.data.reading.formats import Piece, Source, TextRules
from pipeline.data.reading.readers import column_bytes, require_column
from pipeline.errors import UserError

_COMPRESSION_RATIO = 4
"""Expected text bytes of a compressed byte: decides whether a file is cut as a stream, and feeds the progress bar."""
_FIRST_LOOK_BYTES = 2**16


@dataclass(frozen=True)
class Unit:
    """Work for one task: pieces in order, about `TextRules.unit_bytes` of text.

    A unit with `stream` is one source to be cut by `cut_stream`, a unit with `part` a result of that.
    """

    number: int
    pieces: tuple[Piece, ...]
    part: int | None = None
    stream: bool = False

    @property
    def name(self) -> str:
        """`00012`; part 3 of it is `00012-0003`. Names sort as units and parts do."""
        return f"{self.number:05d}" + ("" if self.part is None else f"-{self.part:04d}")

    @property
    def size(self) -> int:
        """Expected bytes of text."""
        return sum(piece.size for piece in self.pieces)


def plan_units(sources: Sequence[Source], rules: TextRules) -> tuple[Unit, ...]:
    """Cut sources into pieces and group these, in order, into units of about `rules.unit_bytes`.

    Raises `UserError` for a parquet file without the text column and for a file that cannot be opened.
    """
    groups: list[list[Piece]] = []
    streams: set[int] = set()
    filled = rules.unit_bytes + 1
    empty: list[Piece] = []  # files that hold nothing are counted where there is work: they begin no unit
    for index, source in enumerate(sources):
        if not source.size:
            empty += [Piece(source, index, 0, 0, 0)] if source.kind == "text" else []
            continue
        stream = _is_stream(source, rules)
        for piece in _cut(source, index, rules):
            if stream or filled + piece.size > rules.unit_bytes:
                groups.append([])
                filled = 0
            if not stream:
                groups[-1] += empty
                empty = []
            groups[-1].append(piece)
            filled += piece.size
        if stream:
            streams.add(len(groups) - 1)  # nothing joins it: it is over the size of a unit
    if empty and (not groups or len(groups) - 1 in streams):
        groups.append([])
    if empty:
        groups[-1] += empty
    return tuple(Unit(number, tuple(pieces), stream=number in streams) for number, pieces in enumerate(groups))


def cut_stream(unit: Unit, rules: TextRules, *, into: Callable[[int], Path]) -> Iterator[Unit]:
    """Read the source of a stream unit once; part k goes to the plain file `into(k)` and is then yielded.

    Parts are what a plain file of that content would be cut into. Where the source is damaged, the part begun is the
    last one: its piece says what is wrong, and reading it ends with that; `UserError` where no part is begun. A part
    whose file cannot be written (`OSError`) is removed.
    """
    (piece,) = unit.pieces
    source, start, number = piece.source, 0, 0
    with open_stream(source.file, source.compression, name=source.name, drop_bom=False) as stream:
        parts = _LineParts(stream, source, rules)
        while parts.more():
            path, damage = into(number), ""
            try:
                with path.open("wb") as file:
                    try:
                        parts.write(file)
                    except UserError as error:
                        damage = str(error)
                    size = file.tell()
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            whole = number == 0 and size <= rules.unit_bytes  # a part that is cut off is larger
            plain = replace(source, path=str(path), compression="")
            part = Piece(plain, piece.index, 0, size, size, offset=start, whole=whole, damage=damage)
            yield Unit(unit.number, (part,), part=number)
            if damage:
                return
            start, number = start + size, number + 1


class _LineParts:
    """Parts of a stream, cut where `CutFinder` says."""

    def __init__(self, stream: BufferedReader, source: Source, rules: TextRules) -> None:
        self._stream, self._source, self._rules = stream, source, rules
        self._start = 0
        self._rest = b""

    def more(self) -> bool:
        """Whether there is another part."""
        self._rest = self._rest or self._stream.read1(BLOCK_BYTES)
        return bool(self._rest)

    def write(self, file: IO[bytes]) -> None:
        """Write the next part; what is there before damage is in it."""
        finder, position = _finder(self._source, self._rules, self._start), self._start
        block, self._rest = self._rest, b""
        while block:
            skip = finder.position - position
            cut = finder.find(block[skip:]) if skip < len(block) else None
            if cut is not None:
                file.write(block[: cut - position])
                self._start, self._rest = cut, block[cut - position :]
                return
            file.write(block)
            position += len(block)
            block = self._stream.read1(BLOCK_BYTES)


def _is_stream(source: Source, rules: TextRules) -> bool:
    large = source.size * _COMPRESSION_RATIO > rules.unit_bytes
    return bool(source.compression) and source.kind in ("text", "jsonl") and large


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
    except (OSError, pa.ArrowException):
        yield Piece(source, index, 0, 0, source.size)
        return
    require_column(names, source.name, rules.key)
    groups = metadata.num_row_groups
    sizes = [column_bytes(metadata.row_group(number), rules.key) for number in range(groups)]
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
