"""Long strings of JSON without ever making them whole: a text of 200 MB is 800 MB as a string of Python.

In: the bytes of one JSON value. Out: the same value with short names in place of its long strings, and each of these
as a `LongText`, which is decoded a part at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import orjson
import xxhash

LONG_BYTES = 2**20
"""Strings of JSON from this length on are decoded by parts, if the record that holds them is long."""
SKELETON_BYTES = 16 * 2**20
"""What may be beside the long strings of a record: objects of Python take up to 30 times what is written of them."""
SHOWN_CHARACTERS = 20

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(")?', re.DOTALL)
_PART = re.compile(
    rb"(?:[\x00-\x21\x23-\x5b\x5d-\x7f]{1,1024}+|[\xc0-\xff][\x80-\xbf]*+|[\x80-\xbf]"
    rb"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\.){1,1024}+",
    re.DOTALL,
)
"""At most 1 MiB of a string that ends within no character: neither its bytes, nor its escape, nor its two escapes."""


class ManyPartsError(Exception):
    """A record that holds too much beside its long strings to be parsed within bounds."""


class LongText:
    """The string of JSON between two quotes of `record`, at [start, stop)."""

    def __init__(self, record: bytes, start: int, stop: int) -> None:
        self._record, self._start, self._stop = record, start, stop

    def parts(self) -> Iterator[str]:
        """Its characters, some at a time; raises `ValueError` where it is no JSON."""
        place = self._start
        while place < self._stop:
            match = _PART.match(self._record, place, self._stop)
            if match is None:
                raise ValueError(f"no JSON string at byte {place}")
            yield string_of(b'"%s"' % match.group())
            place = match.end()

    def head(self) -> str:
        """How it begins."""
        return next(self.parts())

    def __repr__(self) -> str:
        """Its beginning."""
        return f"{self.head()[:SHOWN_CHARACTERS]!r}..."


def string_of(content: bytes) -> str:
    """The string that some JSON stands for, quotes included; bad bytes and lone surrogates stay as surrogates.

    Raises `ValueError` for what is no string of JSON.
    """
    try:
        text: str = orjson.loads(content)
    except orjson.JSONDecodeError:
        text = json.loads(content.decode(errors="surrogateescape"))
    return text


def without_long_strings(record: bytes) -> tuple[bytes, dict[str, LongText]]:
    """`record` with a name in place of each string of over `LONG_BYTES`, and these strings by their names.

    Raises `ValueError` for a string that does not end, `ManyPartsError` where over `SKELETON_BYTES` would be left.
    Whether a long string is sound shows when it is read.
    """
    mark = xxhash.xxh3_128_hexdigest(record)  # a record that holds it, escaped or not, cannot be made by chance
    kept: list[bytes] = []
    longs: dict[str, LongText] = {}
    copied, left = 0, len(record)
    for match in _STRING.finditer(record):
        if match.group(1) is None:
            raise ValueError(f"the string at byte {match.start()} does not end")
        if match.end() - match.start() > LONG_BYTES:
            name = f"long string {len(longs)} of {mark}"
            longs[name] = LongText(record, match.start() + 1, match.end() - 1)
            kept += [record[copied : match.start()], b'"%s"' % name.encode()]
            copied = match.end()
            left -= match.end() - match.start()
    if left > SKELETON_BYTES:
        raise ManyPartsError(f"record over {SKELETON_BYTES} bytes beside its long strings")
    kept.append(record[copied:])
    return b"".join(kept), longs
