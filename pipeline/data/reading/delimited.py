"""Streams of bytes to their records: separated texts, elements of a JSON array, rows of CSV.

In: a buffered stream. Out: the bytes of each record in order, or `Overlong` for one of more than `limit` bytes, of
which only the beginning was ever held. Nothing is parsed here beyond what tells where a record ends.
"""

from __future__ import annotations

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
    while block := stream.read(BLOCK_BYTES):
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


_JSON_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+(")?|[\[\]{},]', re.DOTALL)


def json_elements(stream: io.BufferedReader, limit: int, *, name: str) -> Iterator[bytes | Overlong]:
    """The elements of an array whose opening bracket was read, as they are written, sound or not.

    Raises `UserError` with the offset where an element begins that does not end (after those before it were yielded),
    and for anything that follows the array.
    """
    gathered, depth, count = _Gathered(limit), 0, 0
    position, prefix = 1, b""  # `prefix` opens the string anew that the block before left open
    while block := stream.read(BLOCK_BYTES):
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
                gathered.add(window[begin : match.start()])
                begin, size = match.end(), gathered.size
                record = gathered.take()
                position += size + 1
                if token == 0x2C or count or isinstance(record, Overlong) or record.strip():
                    yield record
                    count += 1
                if token == 0x5D:
                    _nothing_more(stream, window[begin:], name, position)
                    return
        gathered.add(window[begin:])
    raise UserError(
        f"cannot read {name}: element {count} begins at byte {position} of the array and does not end; "
        "the file is damaged or incomplete"
    )


def _nothing_more(stream: io.BufferedReader, rest: bytes, name: str, position: int) -> None:
    while not rest.strip():
        rest = stream.read(BLOCK_BYTES)
        if not rest:
            return
    raise UserError(
        f"{name} is not valid JSON: more follows the array, which ends at byte {position}; "
        "wanted one array of objects (one object a line belongs into a .jsonl file)"
    )


_CSV_FIELD = re.compile(rb'(?:"(?:[^"]++|"")*+(")?)?[^,\r\n]*+(,|\r\n|\r|\n)?')


def csv_records(stream: io.BufferedReader, limit: int) -> Iterator[bytes | Overlong]:
    """Rows with their line ends, blank ones too. Line ends within quotes belong to the row."""
    gathered = _Gathered(limit)
    prefix, after_return = b"", False  # `prefix` stands for the field that the block before left open
    while block := stream.read(BLOCK_BYTES):
        if after_return and block.startswith(b"\n"):
            block = block[1:]
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
                gathered.add(window[begin : match.end()])
                begin = match.end()
                yield gathered.take()
            place = match.end()
        gathered.add(window[begin:])
    if gathered.size:
        yield gathered.take()


def _open_field(window: bytes, match: re.Match[bytes]) -> bytes:
    """The shortest field that leaves its reader where this unfinished one does."""
    if window[match.start()] != 0x22:
        return b"x"
    if match.group(1) is None:
        return b'"'
    return b'""' if match.end() == match.end(1) else b"x"
