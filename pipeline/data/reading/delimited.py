"""Streams of bytes to their records: separated texts, elements of a JSON array, rows of CSV.

In: a buffered stream. Out: the bytes of each record in order, or `Overlong` for one of more than `limit` bytes, of
which only the beginning was ever held. Nothing is parsed here beyond what tells where a record ends.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Generator, Iterable, Iterator
from typing import NamedTuple

from pipeline.data.reading.bytestream import BLOCK_BYTES
from pipeline.errors import UserError

HEAD_BYTES = 1024
_UNTANGLED = 100
"""So many rows at most are taken out of a tangled one, or joined to one begun in it: each may cost a new reading."""
Fragments = Iterator[tuple[bytes, bool]]
"""Pieces of records in order, and whether the record ends with each."""


class Overlong(NamedTuple):
    """A record over the limit, and how it begins."""

    head: bytes


class _Gathered:
    """The record so far, in the fragments that blocks left of it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._fragments: list[bytes] = []
        self.size = 0

    def add(self, fragment: bytes) -> None:
        self.size += len(fragment)
        self._fragments.append(fragment)
        if self.size > self._limit:
            self._fragments = [b"".join(self._fragments)[:HEAD_BYTES]]

    def take(self) -> bytes | Overlong:
        """The record; the next one begins."""
        content, over = b"".join(self._fragments), self.size > self._limit
        self._fragments, self.size = [], 0
        return Overlong(content[:HEAD_BYTES]) if over else content


def skip_line(stream: io.BufferedReader) -> None:
    """Read on to the next line, block by block."""
    while (block := stream.readline(BLOCK_BYTES)) and not block.endswith(b"\n"):
        pass


def separated(stream: io.BufferedReader, separator: bytes, limit: int) -> Iterator[bytes | Overlong]:
    """What lies between separators, possibly nothing; no record after a separator that ends the stream."""
    gathered, carry = _Gathered(limit), b""
    keep = len(separator) - 1  # the end of a block may be the beginning of a separator
    while block := stream.read1(BLOCK_BYTES):
        first, *others = (carry + block).split(separator)
        if others:
            gathered.add(first)
            yield gathered.take()
            first = others.pop()
            for record in others:
                yield record if len(record) <= limit else Overlong(record[:HEAD_BYTES])
        cut = max(len(first) - keep, 0)
        gathered.add(first[:cut])
        carry = first[cut:]
    gathered.add(carry)
    if gathered.size:
        yield gathered.take()


def _records(fragments: Fragments, limit: int) -> Iterator[bytes | Overlong]:
    gathered = _Gathered(limit)
    for fragment, ends in fragments:
        gathered.add(fragment)
        if ends:
            yield gathered.take()


_JSON_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+(")?|[\[\]{},]', re.DOTALL)


def json_elements(stream: io.BufferedReader, limit: int, *, name: str) -> Iterator[bytes | Overlong]:
    """The elements of an array whose opening bracket was read, as they are written, sound or not.

    Raises `UserError` with the offset where an element begins that does not end (after those before it were yielded),
    and for anything that follows the array.
    """
    return _records(json_fragments(stream, name=name), limit)


def json_fragments(stream: io.BufferedReader, *, name: str) -> Fragments:
    """The same in fragments, without the commas between them."""
    depth, count = 0, 0
    position, size, blank = 1, 0, True  # of the element: where it begins, its bytes so far, whether all are white
    prefix = b""  # opens the string anew that the block before left open
    while block := stream.read1(BLOCK_BYTES):
        window, begin = prefix + block, len(prefix)
        prefix = b""
        for match in _JSON_TOKEN.finditer(window):
            token = window[match.start()]
            if token == 0x22:
                if match.group(1) is None:
                    prefix = b'"' if match.end() == len(window) else b'"\\'
            elif token in b"[{":
                depth += 1
            elif depth and token in b"]}":
                depth -= 1
            elif not depth and token in b",]":
                last = window[begin : match.start()]
                position += size + len(last) + 1
                if token == 0x2C or count or not blank or last.strip():
                    yield last, True
                    count += 1
                begin, size, blank = match.end(), 0, True
                if token == 0x5D:
                    _nothing_more(stream, window[begin:], name, position)
                    return
        rest = window[begin:]
        size, blank = size + len(rest), blank and not rest.strip()
        yield rest, False
    raise UserError(
        f"cannot read {name}: element {count} begins at byte {position} of the array and does not end; "
        "the file is damaged or incomplete"
    )


def _nothing_more(stream: io.BufferedReader, rest: bytes, name: str, position: int) -> None:
    while not rest.strip():
        rest = stream.read1(BLOCK_BYTES)
        if not rest:
            return
    raise UserError(
        f"{name} is not valid JSON: more follows the array, which ends at byte {position}; "
        "wanted one array of objects (one object a line belongs into a .jsonl file)"
    )


_CSV_FIELD = re.compile(rb'(?:"(?:[^"]++|"")*+(")?)?[^,\r\n]*+(,|\r\n|\r|\n)?')


def csv_records(stream: io.BufferedReader, limit: int, *, name: str) -> Iterator[bytes | Overlong]:
    """Rows with their line ends, blank ones too. Line ends within quotes belong to the row.

    Raises `UserError` with row and offset for one whose quotes do not end, after those before it were yielded: whether
    a quote too many is in it, or the file was cut within a text, cannot be told, nor then what is a row after it.
    """
    return _records(csv_fragments(stream, name=name), limit)


def csv_fragments(stream: io.BufferedReader, *, name: str) -> Fragments:
    """The same in fragments."""
    prefix, after_return = b"", False  # `prefix` stands for the field that the block before left open
    rows, position, size = -1, 0, 0  # that hold something, without the header; where this one begins; its bytes so far
    while block := stream.read1(BLOCK_BYTES):
        if after_return and block.startswith(b"\n"):
            block, position = block[1:], position + 1
        window = prefix + block
        place, begin, after_return, prefix = 0, len(prefix), False, b""
        while place < len(window):
            match = _CSV_FIELD.match(window, place)
            assert match is not None, "a field may be empty"
            end = match.group(2)
            if end is None:
                prefix = _open_field(window, match)
            elif end != b",":
                after_return = end == b"\r" and match.end() == len(window)
                size += match.end() - begin
                rows, position, size = rows + (size > len(end)), position + size, 0
                yield window[begin : match.end()], True
                begin = match.end()
            place = match.end()
        size += len(window) - begin
        yield window[begin:], False
    if prefix == b'"':
        where = "the header" if rows < 0 else f"row {rows}"
        raise UserError(
            f"cannot read {name} past byte {position} of its text: {where} begins there and has a quote that does not "
            "end; the file is incomplete, or the quote must be closed or doubled"
        )
    if size:
        yield b"", True


def _open_field(window: bytes, match: re.Match[bytes]) -> bytes:
    """The shortest field that leaves its reader where this unfinished one does."""
    if window[match.start()] != 0x22:
        return b"x"
    if match.group(1) is None:
        return b'"'
    return b'""' if match.end() == match.end(1) else b"x"


def csv_fields(row: bytes) -> list[str]:
    """What the csv module makes of a row; bad bytes stay as surrogates."""
    return next(csv.reader((row.decode(errors="surrogateescape"),)), [])


def is_tangled(row: bytes) -> bool:
    """Whether a row goes over several lines and has text after a closing quote: a quote before it does not close.

    The csv module makes one long text of the rows up to there.
    """
    if b"\n" not in (inner := row.rstrip(b"\r\n")) and b"\r" not in inner:
        return False
    try:
        next(csv.reader((row.decode(errors="surrogateescape"),), strict=True))
    except csv.Error:
        return True
    return False


def csv_rows(records: Iterable[bytes | Overlong], columns: int) -> Iterator[tuple[bytes | Overlong, bool]]:
    """Rows of a table of so many columns, and whether they are sound.

    Of a tangled one, the first line is not, and from the second line on it is read anew, with what follows if need be.
    In one column, a line of a text cannot be told from a row: there the whole is not sound.
    """
    open_row, tries = b"", 0  # begun within a tangled row, and goes on in the next
    for record in records:
        if open_row and (isinstance(record, Overlong) or tries == _UNTANGLED):
            yield open_row, False
            open_row = b""
        if isinstance(record, Overlong) or not (open_row or is_tangled(record)):
            yield record, True
        elif columns < 2:
            yield record, False
        else:
            tries = tries + 1 if open_row else 0
            open_row = yield from _untangled(open_row + record, columns)
    if open_row:
        yield open_row, False


def _untangled(rows: bytes, columns: int) -> Generator[tuple[bytes, bool], None, bytes]:
    """Returns the last of the rows if it does not end."""
    for _ in range(_UNTANGLED):
        at = 0
        try:
            for row in csv_records(io.BufferedReader(io.BytesIO(rows)), len(rows), name=""):
                assert isinstance(row, bytes), "nothing is longer than all"
                if is_tangled(row):
                    break
                at += len(row)
                yield row, len(csv_fields(row)) in (0, columns)
            else:
                return b""
        except UserError:
            return rows[at:]
        line, end, rows = rows[at:].partition(b"\n" if b"\n" in rows[at:] else b"\r")
        yield line + end, False
    yield rows, False
    return b""
