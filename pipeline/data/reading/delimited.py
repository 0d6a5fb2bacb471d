"""Streams of bytes to their records: separated texts, elements of a JSON array, rows of CSV.

In: a buffered stream. Out: each record in order, or `Overlong` for one of more than `limit` bytes, of which only the
beginning was ever held. JSON is not parsed here beyond what tells where an element ends.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from typing import NamedTuple

from pipeline.data.reading.bytestream import BLOCK_BYTES
from pipeline.errors import UserError

HEAD_BYTES = 1024


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


_JSON_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+(")?|[\[{]++|[\]},]', re.DOTALL)


def json_elements(stream: io.BufferedReader, limit: int, *, name: str) -> Iterator[bytes | Overlong]:
    """The elements of an array whose opening bracket was read, as they are written, sound or not.

    Raises `UserError` with the offset where an element begins that does not end (after those before it were yielded),
    and for anything that follows the array.
    """
    gathered = _Gathered(limit)
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
                depth += match.end() - match.start()
            elif depth and token in b"]}":
                depth -= 1
            elif not depth and token in b",]":
                last = window[begin : match.start()]
                position += size + len(last) + 1
                if token == 0x2C or count or not blank or last.strip():
                    gathered.add(last)
                    yield gathered.take()
                    count += 1
                begin, size, blank = match.end(), 0, True
                if token == 0x5D:
                    _nothing_more(stream, window[begin:], name, position)
                    return
        rest = window[begin:]
        size, blank = size + len(rest), blank and not rest.strip()
        gathered.add(rest)
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


class BadRow(NamedTuple):
    """A row that is no CSV, why, and how it begins."""

    reason: str
    head: str


class _TooLongError(Exception):
    """A row goes over the limit."""


class _Lines:
    """The lines of a table, from which `csv` makes rows; raises `_TooLongError` when those of one row are too long."""

    def __init__(self, stream: io.BufferedReader, limit: int) -> None:
        self._text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
        self._limit = limit
        self.position = self._size = self._quotes = 0  # where the row begins; its bytes and quotes so far
        self.head = ""
        self._line = ""

    def begin_row(self) -> None:
        """What comes next is a row of its own."""
        self.position += self._size
        self._size = self._quotes = 0
        self.head = ""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._read(self._limit - self._size + 1)
        if not line:
            raise StopIteration
        if self._size > self._limit:
            raise _TooLongError
        return line

    def skip_row(self) -> bool:
        """Read on to the end of the row, block by block; False if it does not end."""
        while self._quotes % 2 or not self._line.endswith(("\n", "\r")):
            if not self._read(BLOCK_BYTES):
                return not self._quotes % 2
        return True

    def _read(self, size: int) -> str:
        self._line = line = self._text.readline(size)
        self._size += len(line) if line.isascii() else len(line.encode(errors="surrogateescape"))
        self._quotes += line.count('"')
        if len(self.head) < HEAD_BYTES:
            self.head += line[:HEAD_BYTES]
        return line


def csv_rows(stream: io.BufferedReader, limit: int, *, name: str) -> Iterator[list[str] | Overlong | BadRow]:
    """The fields of each row that holds something; bad bytes stay as surrogates.

    What a row is, the csv module says, which is strict. Raises `UserError` with row and offset for one whose quotes do
    not end, after those before it were yielded: where the rows after it begin cannot be told.
    """
    csv.field_size_limit(2**31 - 1)  # the limit is one on rows; a C long bounds this one
    lines, row = _Lines(stream, limit), 0
    reader = csv.reader(lines, strict=True)
    while True:
        lines.begin_row()
        found: list[str] | Overlong | BadRow
        try:
            found = next(reader)
        except StopIteration:
            return
        except _TooLongError:
            found = Overlong(lines.head.encode(errors="surrogateescape")[:HEAD_BYTES])
            ends = lines.skip_row()
        except csv.Error as error:
            found, ends = BadRow(f"malformed CSV: {error}", lines.head), "end of data" not in str(error)
        else:
            ends = True
        if not ends:
            where = f"row {row - 1}" if row else "the header"
            raise UserError(
                f"cannot read {name} past byte {lines.position} of its text: {where} begins there and has a quote that "
                "does not end; the file is incomplete, or the quote must be closed or doubled"
            )
        if found:
            row += 1
            yield found
