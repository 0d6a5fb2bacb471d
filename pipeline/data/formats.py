"""Readers of file formats: one piece of one source in, its documents and rejected records out.

A piece is a range of bytes, row groups or rows; reading it is a pure function of the piece, whatever
else is read by whom. Nothing is dropped silently: a record is a `Document`, or `Rejected` with a reason.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError

MIB = 2**20
TEXT_CHUNK_BYTES = MIB
"""Documents of a large text file without separators are about this long."""
EXCERPT_CHARACTERS = 200
BOM = b"\xef\xbb\xbf"
Kind = Literal["text", "jsonl", "json", "csv", "parquet", "hub", "saved"]
Compression = Literal["", "gzip", "zstd"]


@dataclass(frozen=True)
class Source:
    """One file, or one Hugging Face dataset.

    `size` is in bytes, `rows` known for datasets only; `fingerprint` changes when the content may have changed.
    """

    name: str
    kind: Kind
    compression: Compression
    size: int
    fingerprint: str
    rows: int = 0


@dataclass(frozen=True)
class Piece:
    """A part of a source: [start, stop) counts bytes, row groups (parquet) or rows (Hugging Face data).

    `index` is the number of the source among all, `first_row` the row its first record has in the source,
    `size` the expected bytes of text.
    """

    source: Source
    index: int
    start: int
    stop: int
    first_row: int
    size: int


@dataclass(frozen=True)
class Document:
    """One text; `row` counts the records of its source from 0."""

    text: str
    source: int
    row: int


@dataclass(frozen=True)
class Rejected:
    """A record that is no document, why, and how it begins."""

    source: int
    row: int
    reason: str
    excerpt: str


@dataclass(frozen=True)
class TextRules:
    """What is a document: the text under `key` of a record, a whole plain text, or its parts between separators.

    A plain text of more than `unit_bytes` without a separator is cut into documents at newlines.
    """

    key: str = "text"
    separator: str | None = None
    unit_bytes: int = 64 * MIB


def read_piece(piece: Piece, rules: TextRules) -> Iterator[Document | Rejected]:
    """All records of a piece in order. Raises `UserError` naming the file when it is truncated or unreadable."""
    try:
        for row, value in _READERS[piece.source.kind](piece, rules):
            if isinstance(value, _Fault):
                yield Rejected(piece.index, row, value.reason, excerpt(value.found))
            else:
                yield checked(value, piece.index, row)
    except (OSError, EOFError, pa.ArrowException, csv.Error) as error:
        raise UserError(f"cannot read {piece.source.name}: {error}; the file is damaged or incomplete") from None


def keys_of(source: Source) -> list[str] | None:
    """Keys of the first record of a source, or None where there is no record or no key (plain text)."""
    if source.kind == "text" or source.size == 0:
        return None
    try:
        if source.kind == "parquet":
            return list(pq.ParquetFile(source.name).schema_arrow.names)
        piece = Piece(source, 0, 0, source.size, 0, source.size)
        if source.kind == "csv":
            with _text_stream(piece) as stream:
                return next(csv.reader(stream), None)
        records = _json_lines(piece) if source.kind == "jsonl" else _json_values(piece)
        return next((list(record) for _, record in islice(records, 100) if isinstance(record, dict)), None)
    except (OSError, EOFError, pa.ArrowException, csv.Error) as error:
        raise UserError(f"cannot read {source.name}: {error}; the file is damaged or incomplete") from None


@dataclass(frozen=True)
class _Fault:
    reason: str
    found: object


Row = tuple[int, object]
"""Row and what was found there: a text, a `_Fault`, or something that is no text."""


def checked(value: object, source: int, row: int) -> Document | Rejected:
    """Judge what was found where a text should be."""
    if value is None:
        return Rejected(source, row, "text is null", "null")
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return Rejected(source, row, "invalid UTF-8", excerpt(value))
    if not isinstance(value, str):
        return Rejected(source, row, "text is not a string", excerpt(value))
    if not value:
        return Rejected(source, row, "text is empty", "")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # U+DC80..U+DCFF stand for bytes that were no UTF-8 (surrogateescape)
        escaped = 0xDC80 <= ord(value[error.start]) <= 0xDCFF
        return Rejected(source, row, "invalid UTF-8" if escaped else "lone surrogate", excerpt(value))
    return Document(value, source, row)


def excerpt(value: object) -> str:
    """The beginning of a bad record, always writable as UTF-8."""
    if isinstance(value, bytes):
        return value[:EXCERPT_CHARACTERS].decode(errors="backslashreplace")
    text = value if isinstance(value, str) else repr(value)
    return text[:EXCERPT_CHARACTERS].encode(errors="backslashreplace").decode()


def open_bytes(piece: Piece) -> BinaryIO:
    """The bytes of a piece, decompressed, without a byte order mark. The caller closes the stream."""
    path = Path(piece.source.name)
    stream: Any
    if piece.source.compression:
        # Arrow's streams refuse truncated input of both kinds, which the zstandard package does not.
        stream = io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path), "rb"), piece.source.compression), MIB)
    elif piece.start == 0 and piece.stop == piece.source.size:
        stream = path.open("rb")
    else:
        with path.open("rb") as file:
            file.seek(piece.start)
            stream = io.BufferedReader(io.BytesIO(file.read(piece.stop - piece.start)))
    if piece.start == 0 and stream.peek(3)[:3] == BOM:
        stream.read(3)
    return stream  # type: ignore[no-any-return]


def _read_text(piece: Piece, rules: TextRules) -> Iterator[Row]:
    with open_bytes(piece) as stream:
        for row, content in enumerate(_texts(stream, piece, rules), piece.first_row):
            if content:
                yield row, content


def _texts(stream: BinaryIO, piece: Piece, rules: TextRules) -> Iterator[bytes]:
    if rules.separator is not None:
        yield from _separated(stream, rules.separator.encode())
        return
    whole = stream.read(rules.unit_bytes + 1)  # a compressed text shows its length only here
    if piece.source.size > rules.unit_bytes or len(whole) > rules.unit_bytes:
        yield from _chunks(stream, whole)
    else:
        yield whole


def _separated(stream: BinaryIO, separator: bytes) -> Iterator[bytes]:
    """Documents between separators, possibly empty ones; none after a separator that ends the stream."""
    rest = b""
    while block := stream.read(16 * MIB):
        *documents, rest = (rest + block).split(separator)
        yield from documents
    if rest:
        yield rest


def _chunks(stream: BinaryIO, rest: bytes) -> Iterator[bytes]:
    """Documents of about `TEXT_CHUNK_BYTES` of `rest` and then `stream`, cut where `chunk_end` says."""
    window = 2 * TEXT_CHUNK_BYTES + 4
    while rest := rest + stream.read(max(window - len(rest), 0)):
        end = chunk_end(rest, 0, len(rest))
        yield rest[:end]
        rest = rest[end:]


def chunk_end(content: Any, start: int, size: int) -> int:
    """Where a document that begins at `start` ends: after the first newline from 1 MB on, at most about 2 MB.

    `content` is bytes or a map of `size` bytes, of which at least 2 MB + 4 after `start` are there unless it ends
    sooner. Without a newline the cut is before a byte that begins a UTF-8 character.
    """
    if size - start <= TEXT_CHUNK_BYTES:
        return size
    newline = int(content.find(b"\n", start + TEXT_CHUNK_BYTES, start + 2 * TEXT_CHUNK_BYTES))
    if newline >= 0:
        return newline + 1
    end = min(start + 2 * TEXT_CHUNK_BYTES, size)
    while end < size and content[end] & 0xC0 == 0x80 and end < start + 2 * TEXT_CHUNK_BYTES + 3:
        end += 1
    return end


def _read_jsonl(piece: Piece, rules: TextRules) -> Iterator[Row]:
    for row, record in _json_lines(piece):
        yield row, _field(record, rules.key)


def _read_json(piece: Piece, rules: TextRules) -> Iterator[Row]:
    for row, record in _json_values(piece):
        yield row, _field(record, rules.key)


def _field(record: object, key: str) -> object:
    if isinstance(record, _Fault):
        return record
    if not isinstance(record, Mapping):
        return _Fault("not a JSON object", record)
    if key not in record:
        return _Fault(f"no key {key!r}", record)
    return record[key]


def _json_lines(piece: Piece) -> Iterator[Row]:
    """Rows are lines, counted with blank ones, which hold no record."""
    with open_bytes(piece) as stream:
        for row, line in enumerate(stream, piece.first_row):
            if not line.isspace():
                yield row, _parse_line(line)


def _parse_line(line: bytes) -> object:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        pass
    try:  # the slow parser knows NaN, and tells lone surrogates and bad bytes from bad JSON
        return json.loads(line.decode(errors="surrogateescape"))
    except (ValueError, RecursionError):
        return _Fault("malformed JSON", line.rstrip(b"\r\n"))


def _json_values(piece: Piece) -> Iterator[Row]:
    """The elements of an array, or a single object, of a file that is one JSON value."""
    with open_bytes(piece) as stream:
        content = stream.read()
    if not content.strip():
        return
    try:
        value = json.loads(content.decode(errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        wanted = "wanted an array of objects (one object a line belongs into a .jsonl file)"
        raise UserError(f"{piece.source.name} is not valid JSON: {error}; {wanted}") from None
    yield from enumerate(value if isinstance(value, list) else [value])


def _text_stream(piece: Piece) -> io.TextIOWrapper:
    return io.TextIOWrapper(open_bytes(piece), encoding="utf-8", errors="surrogateescape", newline="")


def _read_csv(piece: Piece, rules: TextRules) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses fields over 128 KiB; a C long bounds it
    with _text_stream(piece) as stream:
        for row, record in enumerate(csv.DictReader(stream)):
            yield row, _field(record, rules.key)


def _read_parquet(piece: Piece, rules: TextRules) -> Iterator[Row]:
    file = pq.ParquetFile(piece.source.name)
    require_column(file.schema_arrow.names, piece.source.name, rules.key)
    row = piece.first_row
    for batch in file.iter_batches(1024, row_groups=list(range(piece.start, piece.stop)), columns=[rules.key]):
        for value in values_of(batch.column(0)):
            yield row, value
            row += 1


def values_of(column: Any) -> list[Any]:
    """Python values of an Arrow column; strings as bytes, so that a bad one costs itself and not its batch."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        column = column.cast(kind).cast(pa.large_binary())
    values: list[Any] = column.to_pylist()
    return values


def require_column(columns: list[str], name: str, key: str) -> None:
    """Refuse a table without the text column."""
    if key not in columns:
        raise missing_key(name, key, columns)


def missing_key(name: str, key: str, found: list[str]) -> UserError:
    """The error for a source whose records lack the text key."""
    return UserError(f"{name} has no key {key!r}; found {', '.join(map(repr, found))}; choose one with --text-key KEY")


_READERS: dict[Kind, Callable[[Piece, TextRules], Iterator[Row]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
}
