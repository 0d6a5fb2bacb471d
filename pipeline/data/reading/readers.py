"""Readers of file formats: one piece of one source in, its documents and rejected records out, in bounded memory.

A piece is a range of bytes, row groups or rows; reading it is a pure function of the piece, whatever else is read by
whom. Each reader is a generator that yields records and returns how many rows it counted.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.reading.bytestream import BLOCK_BYTES, MIB, character_start, open_stream
from pipeline.data.reading.delimited import BadRow, Overlong, csv_rows, json_elements, separated, skip_line
from pipeline.data.reading.formats import (
    NO_STRING,
    TEXT_CHUNK_BYTES,
    Document,
    Fault,
    Judge,
    Kind,
    Piece,
    Record,
    Source,
    TextRules,
    missing_key,
)
from pipeline.data.reading.hub import load_saved, saved_columns
from pipeline.errors import UserError

_BATCH_BYTES, _BATCH_ROWS = 4 * MIB, 256
_KEY_RECORDS = 100
_LONG_JSON_BYTES, _MOST_NESTED = 16 * MIB, 2**23
"""JSON of that length is looked at before it is parsed: an empty array takes 3 bytes, and 90 in memory."""
_MALFORMED = "malformed JSON"
DAMAGE = (OSError, EOFError, pa.ArrowException, UnicodeDecodeError)
"""What pyarrow and streams raise for damaged files; the last one for names in the metadata of parquet."""
Records = Generator[Record, None, int]


class PieceRows(NamedTuple):
    """What reading a piece came to: rows counted, with those that hold no record, and characters replaced."""

    rows: int
    replaced: int


def read_piece(piece: Piece, rules: TextRules, *, first: int = 0) -> Generator[Record, None, PieceRows]:
    """All records of a piece in order, rows counted from `first`.

    Raises `UserError` naming the file, and where in it, when it is truncated or unreadable; what came before was
    yielded.
    """
    judge = Judge(rules, piece.index)
    try:
        rows = yield from _READERS[piece.source.kind](piece, judge, first)
    except DAMAGE as error:
        raise _damaged(piece.source.name, error) from None
    return PieceRows(rows, judge.replaced)


def promised_rows(piece: Piece) -> int:
    """Rows of a piece as far as they are known without reading it: a damaged one has them too."""
    if piece.source.kind == "saved":
        return piece.stop - piece.start
    if piece.source.kind != "parquet":
        return 0
    try:
        with pq.ParquetFile(piece.source.file) as file:
            groups = range(piece.start, min(piece.stop, file.num_row_groups))
            return sum(file.metadata.row_group(group).num_rows for group in groups)
    except DAMAGE:
        return 0


def count_rows(piece: Piece) -> int | None:
    """Rows of a piece without parsing a record or holding one: of tables and JSON lines. None where that cannot be."""
    if piece.source.kind in ("saved", "parquet"):
        return promised_rows(piece)
    if piece.source.kind != "jsonl":
        return None
    lines, last = 0, b"\n"
    try:
        with _stream(piece) as stream:
            while block := stream.read1(BLOCK_BYTES):
                lines, last = lines + block.count(b"\n"), block[-1:]
    except (*DAMAGE, UserError):  # gone, or damaged
        return None
    return lines + (last != b"\n")


def keys_of(source: Source) -> list[str] | None:
    """Keys of the first record of a source, or None where there is no record or no key (plain text)."""
    if source.kind == "text" or source.size == 0:
        return None
    rules = TextRules()
    try:
        if source.kind == "parquet":
            return list(pq.ParquetFile(source.file).schema_arrow.names)
        if source.kind == "saved":
            return list(load_saved(source.name).column_names)
    except DAMAGE as error:
        raise _damaged(source.name, error) from None
    with _stream(Piece(source, 0, 0, source.size, source.size)) as stream:
        if source.kind == "csv":
            return _csv_header(csv_rows(stream, rules.record_bytes, name=source.name), source.name)
        found: Iterator[object]
        if source.kind == "json":
            found = (_parsed(value) for value in _json_values(stream, rules, source.name))
        else:
            found = map(_parsed, _lines_within(stream, rules.record_bytes))
        return next((list(record) for record in islice(found, _KEY_RECORDS) if isinstance(record, dict)), None)


def _lines_within(stream: io.BufferedReader, limit: int) -> Iterator[bytes]:
    """The lines that have at most `limit` bytes."""
    while line := stream.readline(limit + 1):
        if len(line) > limit and not line.endswith(b"\n"):
            skip_line(stream)
        else:
            yield line


def require_column(columns: list[str], name: str, key: str) -> None:
    """Refuse a table without the text column, or with several of its name."""
    if key not in columns:
        raise missing_key(name, key, columns)
    if (count := columns.count(key)) > 1:
        raise UserError(f"{name} has {count} columns {key!r}; wanted one: rename or remove the others")


def _damaged(name: str, error: BaseException) -> UserError:
    return UserError(f"cannot read {name}: {error}; the file is damaged or incomplete")


def _stream(piece: Piece) -> io.BufferedReader:
    source = piece.source
    return open_stream(
        source.file,
        source.compression,
        name=source.name,
        start=piece.start,
        stop=piece.stop,
        drop_bom=piece.start == 0,
    )


def _read_text(piece: Piece, judge: Judge, first: int) -> Records:
    rules, row = judge.rules, first - 1
    with _stream(piece) as stream:
        texts: Iterator[bytes | Overlong]
        if rules.separator is not None:
            texts = separated(stream, rules.separator.encode(), rules.record_bytes)
        else:
            whole = stream.read(rules.unit_bytes + 1) if piece.whole else b""  # a compressed text shows its length here
            fits = piece.whole and len(whole) <= rules.unit_bytes
            texts = iter([whole]) if fits else _chunks(stream, whole, rules)
        for row, content in enumerate(texts, first):
            if isinstance(content, Overlong):
                yield from judge.overlong(row, content.head)
            elif content or rules.separator is None:  # between two separators, nothing is no text
                yield from judge.records(content, row)
    return row - first + 1


def _chunks(stream: io.BufferedReader, rest: bytes, rules: TextRules) -> Iterator[bytes]:
    """Documents of `rest` and then `stream`: up to the first newline from 1 MB on, or 2 MB where there is none."""
    step = min(TEXT_CHUNK_BYTES, rules.max_document_bytes // 2)
    begin, more = 0, b"more"
    while True:
        while len(rest) - begin <= 2 * step and more:
            more = stream.read1(2 * step + BLOCK_BYTES)
            rest, begin = rest[begin:] + more, 0
        if begin == len(rest):
            return
        end = _chunk_end(rest, begin, step)
        yield rest[begin:end]
        begin = end


def _chunk_end(content: bytes, start: int, step: int) -> int:
    """Where the document that begins at `start` ends; unless the text does, more than 2 steps must be there."""
    if len(content) - start <= step:
        return len(content)
    newline = content.find(b"\n", start + step, start + 2 * step)
    return newline + 1 if newline >= 0 else character_start(content, min(start + 2 * step, len(content)))


def _read_jsonl(piece: Piece, judge: Judge, first: int) -> Records:
    """Rows are lines, counted with blank ones, which hold no record."""
    key, index, longest = judge.rules.key, piece.index, judge.rules.max_document_bytes
    limit = judge.rules.record_bytes
    long = min(limit, _LONG_JSON_BYTES)
    loads, row = orjson.loads, first - 1
    with _stream(piece) as stream:
        for row, line in enumerate(iter(partial(stream.readline, limit + 1), b""), first):
            if len(line) > long:
                if len(line) > limit and not line.endswith(b"\n"):
                    skip_line(stream)
                    yield from judge.overlong(row, line)
                elif not line.isspace():
                    yield from judge.records(_field(_parsed(line), key), row)
                continue
            try:  # the way of nearly every line: nothing but what it needs
                content = loads(line)[key].encode()
            except (ValueError, TypeError, KeyError, AttributeError):
                content = b""
            if 0 < len(content) <= longest:
                yield Document(content, index, row)
            elif not line.isspace():
                yield from judge.records(_field(_parsed(line), key), row)
    return row - first + 1


def _parsed(record: bytes | Overlong) -> object:
    """The value of some JSON, or the fault in it."""
    if isinstance(record, Overlong):
        return Fault("overlong", record.head)
    if len(record) > _LONG_JSON_BYTES and record.count(b"[") + record.count(b"{") > _MOST_NESTED:
        return Fault(f"JSON of over {_MOST_NESTED} arrays and objects", record)
    try:
        return orjson.loads(record)
    except orjson.JSONDecodeError as error:
        if "depth limit" in str(error):  # how deep the other parser goes depends on the version of Python
            return Fault("JSON of over 1024 levels", record.strip())
    try:  # it knows NaN and numbers of any length, and tells lone surrogates and bad bytes from bad JSON
        return json.loads(record.decode(errors="surrogateescape"), parse_int=float)
    except ValueError:
        return Fault(_MALFORMED, record.strip())
    except RecursionError:
        return Fault("JSON of over 1024 levels", record.strip())


def _field(record: object, key: str) -> object:
    if isinstance(record, Fault):
        return record
    if not isinstance(record, Mapping):
        return Fault("not a JSON object", record)
    if key not in record:
        return Fault(f"no key {key!r}", record)
    return record[key]


def _read_json(piece: Piece, judge: Judge, first: int) -> Records:
    row = first - 1
    with _stream(piece) as stream:
        for row, value in enumerate(_json_values(stream, judge.rules, piece.source.name), first):
            if isinstance(value, Overlong):
                yield from judge.overlong(row, value.head)
            else:
                yield from judge.records(_field(_parsed(value), judge.rules.key), row)
    return row - first + 1


def _json_values(stream: io.BufferedReader, rules: TextRules, name: str) -> Iterator[bytes | Overlong]:
    """The elements of an array, or a single object, of a file that is one JSON value."""
    wanted = "wanted an array of objects (one object a line belongs into a .jsonl file)"
    while (head := stream.peek(1)[:1]).isspace():
        stream.read(1)
    if head == b"[":
        stream.read(1)
        yield from json_elements(stream, rules.record_bytes, name=name)
    elif head:
        content = stream.read(rules.record_bytes + 1)
        if len(content) > rules.record_bytes:
            raise UserError(f"{name} is one JSON value of over --max-record-bytes {rules.record_bytes}; {wanted}")
        if isinstance(fault := _parsed(content), Fault):
            said = "not valid JSON" if fault.reason == _MALFORMED else f"one {fault.reason}"
            raise UserError(f"{name} is {said}: it begins with {content[:40]!r}; {wanted}")
        yield content


def _csv_header(rows: Iterator[list[str] | Overlong | BadRow], name: str) -> list[str] | None:
    """The names of the columns, None where there is no row."""
    header = next(rows, None)
    if isinstance(header, Overlong):
        raise UserError(f"{name} is not valid CSV: no end to its first row, which begins with {header.head[:40]!r}")
    if isinstance(header, BadRow):
        raise UserError(f"{name} is not valid CSV: its first row begins with {header.head[:40]!r}; {header.reason}")
    return header


def _read_csv(piece: Piece, judge: Judge, first: int) -> Records:
    """Rows are those that hold something, after the header."""
    key, row = judge.rules.key, first - 1
    with _stream(piece) as stream:
        rows = csv_rows(stream, judge.rules.record_bytes, name=piece.source.name)
        header = _csv_header(rows, piece.source.name) or [key]
        column = header.index(key) if key in header else None
        if column is not None:
            require_column(header, piece.source.name, key)
        for row, fields in enumerate(rows, first):
            if isinstance(fields, Overlong):
                yield from judge.overlong(row, fields.head)
            elif isinstance(fields, BadRow):
                yield from judge.rejected(row, fields.reason, fields.head)
            elif column is None:
                yield from judge.rejected(row, f"no key {key!r}", ",".join(fields))
            elif len(fields) != len(header):  # a comma within a text would end it, a part of a broken row be one
                yield from judge.rejected(row, "malformed CSV: not as many fields as the header", ",".join(fields))
            else:
                yield from judge.records(fields[column], row)
    return row - first + 1


def _read_parquet(piece: Piece, judge: Judge, first: int) -> Records:
    key, source, row = judge.rules.key, piece.source, first
    with pq.ParquetFile(source.file, buffer_size=BLOCK_BYTES, page_checksum_verification=True) as file:
        require_column(file.schema_arrow.names, source.name, key)
        if not piece.start < piece.stop <= file.num_row_groups:  # its metadata could not be read then
            raise UserError(f"{source.name} is another file than when the work was planned; run again")
        for group in range(piece.start, piece.stop):
            rows = file.metadata.row_group(group).num_rows
            # Few rows at a time when they are large, and never many: equal texts are stored once.
            step = min(_BATCH_BYTES * rows // max(column_bytes(file.metadata, group, key), 1), _BATCH_ROWS)
            for batch in file.iter_batches(max(step, 1), row_groups=[group], columns=[key], use_threads=False):
                yield from _column(batch.column(key), judge, row)  # beside it may lie `key.x`
                row += batch.num_rows
    return row - first


def column_bytes(metadata: Any, number: int, key: str) -> int:
    """Unpacked bytes of the column `key` in a row group of some parquet metadata, at least one where it has rows.

    A dot parts the names of nested columns, and may be in the name of a flat one, which then is the one that is meant.
    Other columns are not asked for: pyarrow ends the process (25.0) where the statistics of one are damaged.
    """
    paths = [metadata.schema.column(place).path for place in range(metadata.num_columns)]
    nested = [place for place, path in enumerate(paths) if path.startswith(f"{key}.")]
    chosen = [place for place, path in enumerate(paths) if path == key] or nested
    group = metadata.row_group(number)
    size = sum(int(group.column(place).total_uncompressed_size) for place in chosen)
    return size or min(int(group.num_rows), 1)


def _column(column: Any, judge: Judge, first: int) -> Iterator[Record]:
    index, longest = judge.source, judge.rules.max_document_bytes
    for row, value in enumerate(values_of(column), first):
        if isinstance(value, bytes) and 0 < len(value) <= longest and value.isascii():
            yield Document(value, index, row)
        else:
            yield from judge.records(value, row)


def values_of(column: Any) -> list[Any]:
    """Python values of an Arrow column; strings as bytes, so that a bad one costs itself and not its batch."""
    kind = column.type
    if isinstance(column, pa.ChunkedArray):
        return [value for chunk in column.chunks for value in values_of(chunk)]
    if pa.types.is_dictionary(kind):
        values = values_of(column.dictionary)  # each made once, however often it occurs
        return [None if number is None else values[number] for number in column.indices.to_pylist()]
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        column = column.cast(pa.large_binary())
    try:
        found: list[Any] = column.to_pylist()
    except (pa.ArrowException, UnicodeDecodeError):
        raise
    except (OverflowError, ValueError):  # times that Python cannot hold; none of them is a text
        return [Fault(NO_STRING, f"<{kind}>")] * len(column)
    return found


def _read_saved(piece: Piece, judge: Judge, first: int) -> Records:
    key, row = judge.rules.key, first
    require_column(load_saved(piece.source.name).column_names, piece.source.name, key)
    for column in saved_columns(piece.source.name, key, piece.start, piece.stop):
        yield from _column(column, judge, row)
        row += len(column)
    return row - first


_READERS: dict[Kind, Callable[[Piece, Judge, int], Records]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "saved": _read_saved,
}
