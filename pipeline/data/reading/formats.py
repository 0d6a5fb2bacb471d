"""What a corpus is made of: sources, pieces, records; and the judgement whether what was found is a document.

In: a value found where a text should be. Out: a `Document`, several of them, or `Rejected` with the reason: nothing is
dropped silently.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from pipeline.data.reading.bytestream import MIB, Compression, character_start
from pipeline.errors import UserError, printable

TEXT_CHUNK_BYTES = MIB
"""Documents of a large text file without separators are about this long."""
EXCERPT_CHARACTERS = 200
Kind = Literal["text", "jsonl", "json", "csv", "parquet", "saved"]
EMPTY = "text is empty"
"""The reason for dropping what is no fault: code has empty files, records have empty texts."""
NO_STRING = "text is not a string"
_REMEDIES = {
    "text over ": "--max-doc-bytes N allows longer ones, --long-documents cut keeps them in parts",
    "record over ": "--max-record-bytes N allows longer ones",
    "invalid UTF-8": "--invalid-utf8 replace keeps it with U+FFFD for the bad bytes, iconv converts other encodings",
    "lone surrogate": "--invalid-utf8 replace keeps it with U+FFFD in its place",
    "no key ": "--text-key KEY names another",
}
"""What a flag can do about records that are rejected, by the beginning of the reason."""
_SURROGATES = re.compile("[\ud800-\udfff]")
_REPR = reprlib.Repr()


class Document(NamedTuple):
    """One text, valid UTF-8 and not empty; `row` counts the records of its source from 0 within the unit."""

    content: bytes
    source: int
    row: int


class Rejected(NamedTuple):
    """A record that is no document, why, and how it begins: at most 200 characters, writable as UTF-8."""

    source: int
    row: int
    reason: str
    excerpt: str


Record = Document | Rejected


@dataclass(frozen=True)
class Source:
    """One file, or one saved dataset.

    `name` says where it came from, `path` where its bytes lie if not there; `size` is in bytes, `rows` known for
    datasets only; `fingerprint` changes when the content may have changed; `held_out`: all of it is for validation.
    """

    name: str
    kind: Kind
    compression: Compression
    size: int
    fingerprint: str
    rows: int = 0
    path: str = ""
    held_out: bool = False

    @property
    def file(self) -> Path:
        """Where the bytes lie."""
        return Path(self.path or self.name)


@dataclass(frozen=True)
class Piece:
    """A part of a source: [start, stop) counts bytes of its file, row groups (parquet) or rows (saved datasets).

    `index` is the number of the source among all, `size` the expected bytes of text. `whole`: the piece is all of its
    source; otherwise a text without separators is cut into documents of about 1 MB.
    """

    source: Source
    index: int
    start: int
    stop: int
    size: int
    whole: bool = True


@dataclass(frozen=True)
class TextRules:
    """What is a document: the text under `key` of a record, a whole plain text, or its parts between separators.

    A plain text of more than `unit_bytes` without a separator is cut into documents at newlines. A longer document than
    `max_document_bytes` is rejected, or cut after white space; a record that takes more than `record_bytes` in its
    file, keys and all, is not even parsed. Bytes that are no UTF-8 and lone surrogates make a
    record rejected, or are replaced one by one with U+FFFD. Raises `UserError` for sizes that nothing fits into.
    """

    key: str = "text"
    separator: str | None = None
    unit_bytes: int = 64 * MIB
    max_document_bytes: int = 64 * MIB
    long_documents: Literal["quarantine", "cut"] = "quarantine"
    invalid_utf8: Literal["quarantine", "replace"] = "quarantine"
    max_record_bytes: int | None = None

    def __post_init__(self) -> None:  # noqa: D105 - the class says what it refuses
        if self.unit_bytes < 1 or self.max_document_bytes < 4:  # a character may take 4 bytes
            raise UserError(
                f"wanted units of at least 1 byte and documents of at least 4, got {self.unit_bytes} and "
                f"{self.max_document_bytes}"
            )

    @property
    def record_bytes(self) -> int:
        """The longest record: `max_record_bytes`, else 64 MiB or the longest document, whatever is more.

        Parsed JSON may take 24 times as much memory as it does in the file.
        """
        return max(64 * MIB, self.max_document_bytes) if self.max_record_bytes is None else self.max_record_bytes


@dataclass(frozen=True)
class Fault:
    """Why there is no text, and what is there instead."""

    reason: str
    found: object


class Judge:
    """Turns what was found in the records of one source into documents, and counts what it `replaced` by U+FFFD."""

    def __init__(self, rules: TextRules, source: int) -> None:
        self.rules = rules
        self.source = source
        self.replaced = 0

    def records(self, value: object, row: int) -> Iterable[Record]:
        """Documents of one record, or its rejection."""
        if isinstance(value, str | bytes):
            if not value:
                return self.rejected(row, EMPTY, "")
            try:
                content = value.encode() if isinstance(value, str) else value
                if isinstance(value, bytes) and not value.isascii():
                    value.decode()
            except UnicodeError:
                return self._mended(value, row)
            return self._fitting(content, row)
        if isinstance(value, Fault):
            return self.rejected(row, value.reason, value.found)
        if value is None:
            return self.rejected(row, "text is null", "null")
        return self.rejected(row, NO_STRING, value)

    def overlong(self, row: int, head: bytes) -> list[Record]:
        """The rejection of a record that was never held whole."""
        return self.rejected(row, f"record over {self.rules.record_bytes} bytes", head)

    def rejected(self, row: int, reason: str, found: object) -> list[Record]:
        """A rejection, with the beginning of what was found."""
        return [Rejected(self.source, row, reason, excerpt(found))]

    def _mended(self, value: str | bytes, row: int) -> Iterable[Record]:
        text = value.decode(errors="surrogateescape") if isinstance(value, bytes) else value
        if self.rules.invalid_utf8 == "replace":
            text, count = _SURROGATES.subn("\ufffd", text)
            self.replaced += count
            return self._fitting(text.encode(), row)
        return self.rejected(row, _why_not_utf8(text), value)

    def _fitting(self, content: bytes, row: int) -> Iterable[Record]:
        limit = self.rules.max_document_bytes
        if len(content) <= limit:
            return [Document(content, self.source, row)]
        if self.rules.long_documents == "cut":
            return (Document(part, self.source, row) for part in cut_long(content, limit))
        return self.rejected(row, f"text over {limit} bytes", content)


def _why_not_utf8(text: str) -> str:
    first = _SURROGATES.search(text)
    # U+DC80..U+DCFF stand for bytes that were no UTF-8 (surrogateescape)
    escaped = first is not None and 0xDC80 <= ord(first.group()) <= 0xDCFF
    return "invalid UTF-8" if escaped else "lone surrogate"


def cut_long(content: bytes, limit: int) -> Iterator[bytes]:
    """`content` in parts of at most `limit` bytes, cut after white space in the last eighth, or between characters."""
    start = 0
    while len(content) - start > limit:
        end = start + limit
        near = end - limit // 8
        space = max(content.rfind(white, near, end) for white in (b" ", b"\n", b"\t", b"\r"))
        end = space + 1 if space >= 0 else character_start(content, end)
        yield content[start:end]
        start = end
    yield content[start:]


def excerpt(value: object) -> str:
    """The beginning of a bad record, always writable as UTF-8, and without anything that a terminal would obey."""
    if isinstance(value, bytes):
        text = value[: 4 * EXCERPT_CHARACTERS].decode(errors="backslashreplace")
    else:
        text = value if isinstance(value, str) else _REPR.repr(value)
    return printable(text[:EXCERPT_CHARACTERS])[:EXCERPT_CHARACTERS]


def with_remedy(reason: str) -> str:
    """Why a record was rejected, and the flag that does something about it, if there is one."""
    found = [remedy for begun, remedy in _REMEDIES.items() if reason.startswith(begun)]
    return f"{reason} ({found[0]})" if found else reason


def missing_key(name: str, key: str, found: list[str]) -> UserError:
    """The error for a source whose records lack the text key."""
    return UserError(f"{name} has no key {key!r}; found {', '.join(map(repr, found))}; choose one with --text-key KEY")
