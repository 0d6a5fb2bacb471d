"""What a preparation would come to: small parts of the corpus are prepared for a trial, and the rest is scaled up.

In: the plan and what applies to all units. Out: tokens, bytes on disk and seconds, right within some percent where the
corpus is much the same all over.
"""

from __future__ import annotations

import os
import time
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

import orjson
import zstandard

from pipeline.data.manifest import TOKENIZER_NAME
from pipeline.data.preparing.encoder import Encoder
from pipeline.data.preparing.unit import UnitReport, UnitSettings, keep_encoder, prepare_unit
from pipeline.data.reading.bytestream import open_stream
from pipeline.data.reading.corpus import read_unit
from pipeline.data.reading.formats import Document, Piece, Source
from pipeline.data.reading.plan import Unit
from pipeline.errors import UserError

PLACES = 32
"""Places of the corpus that are tried, evenly spread over its bytes."""
PLACE_BYTES = 128 * 2**10
UNPACKED_SAMPLE_BYTES = 2**24
"""Decompressed to measure a ratio where the file does not say its size."""
MOST_BLOCKS = 50_000
"""Blocks of a zstd file that are walked over to find its frames; what follows is extrapolated."""
USUAL_RATIO = 4
"""Text bytes of a compressed byte in a file that is damaged from the beginning."""
_SKIPPABLE, _MAGIC_BYTES = 0x184D2A50, 4
_RLE = 1
_PACKED_BYTES = 4096
"""Decompressed at once: a block of 4 bytes may unpack to 128 KiB, so this bounds what comes back to 128 MiB."""


@dataclass(frozen=True)
class Estimate:
    """Of the whole corpus: bytes of text, tokens, bytes of the dataset, and seconds from start to end."""

    text_bytes: int
    tokens: int
    disk_bytes: int
    seconds: float


def unpacked_size(source: Source) -> int:
    """Bytes of a file after decompression: as it says itself, or by the ratio of its beginning."""
    if not source.compression or not source.size:
        return source.size
    try:
        with source.file.open("rb") as file:
            said = zstd_size(file, source.size) if source.compression == "zstd" else None
            if said is not None:
                return said
            file.seek(0)
            return _by_ratio(file, source)
    except (OSError, ValueError, zlib.error, zstandard.ZstdError):
        return source.size * USUAL_RATIO  # damaged: the preparation will say so


def zstd_size(file: IO[bytes], size: int) -> int | None:
    """Content of all frames of a zstd file of `size` bytes, from their headers (RFC 8878); None: one does not say.

    A frame does not say how long it is compressed, so its blocks are walked over, by their headers.
    """
    total, begin, blocks = 0, 0, 0
    while begin < size:
        file.seek(begin)
        header = file.read(18)
        if int.from_bytes(header[:_MAGIC_BYTES], "little") & ~0xF == _SKIPPABLE:
            begin += 8 + int.from_bytes(header[4:8], "little")
            continue
        frame = zstandard.get_frame_parameters(header)
        if frame.content_size == zstandard.CONTENTSIZE_UNKNOWN:
            return None
        place, last = begin + zstandard.frame_header_size(header), False
        while not last and place < size:
            file.seek(place)
            block = int.from_bytes(file.read(3), "little")
            last, kind = bool(block & 1), block >> 1 & 3
            place += 3 + (1 if kind == _RLE else block >> 3)
            blocks += 1
            if blocks >= MOST_BLOCKS:
                return total * size // begin if begin else frame.content_size
        total += frame.content_size
        begin = place + (4 if frame.has_checksum else 0)
    return total


def _by_ratio(file: IO[bytes], source: Source) -> int:
    """By decompressing the beginning. gzip ends with the size modulo 2^32, which is taken where it fits."""
    packer = _Zstd() if source.compression == "zstd" else _Gzip()
    read = out = 0
    while out < UNPACKED_SAMPLE_BYTES:
        chunk = file.read(_PACKED_BYTES)
        if not chunk:
            return out
        read += len(chunk)
        out += packer.unpack(chunk)
    expected = out * source.size // read
    if source.compression == "gzip":
        file.seek(-4, os.SEEK_END)
        said = int.from_bytes(file.read(4), "little")
        nearest = said + round((expected - said) / 2**32) * 2**32
        if abs(nearest - expected) < expected / 4:
            return nearest
    return expected


class _Zstd:
    def __init__(self) -> None:
        self._frames = zstandard.ZstdDecompressor().decompressobj(read_across_frames=True)

    def unpack(self, chunk: bytes) -> int:
        return len(self._frames.decompress(chunk))


class _Gzip:
    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=31)

    def unpack(self, chunk: bytes) -> int:
        out = len(self._member.decompress(chunk))
        while self._member.eof and (rest := self._member.unused_data.lstrip(b"\0")):
            self._member = zlib.decompressobj(wbits=31)
            out += len(self._member.decompress(rest))
        return out


def raw_size(unit: Unit) -> int:
    """Bytes of a unit before anything is known of its records: decompressed, with keys and quotes of JSON."""
    return sum(unpacked_size(piece.source) if piece.source.compression else piece.size for piece in unit.pieces)


def estimate(units: Sequence[Unit], settings: UnitSettings, *, encoder: Encoder, at_once: int) -> Estimate:
    """Prepare a sample in a temporary folder and scale it up.

    Args:
        units: the plan.
        settings: as for the preparation; its folder is not touched.
        encoder: as for the preparation.
        at_once: processes.
    """
    total = sum(map(raw_size, units))
    with TemporaryDirectory() as folder:
        there = replace(settings, output=Path(folder), strict=False, allow_failed=True)
        encoder.tokenizer.save(there.output / TOKENIZER_NAME)
        keep_encoder(encoder, settings.tokenizer_fingerprint)
        sample = _Sample(there)
        for piece, offsets in _places(units):
            sample.take(piece, offsets)
        if not sample.bytes:
            return Estimate(text_bytes=total, tokens=0, disk_bytes=0, seconds=0.0)
        reports, per_part, per_byte = sample.prepare()
    scale = total / sample.bytes
    written = sum(info.size for report in reports for shard in report.shards.values() for info in shard.files.values())
    parts = max(len(units), total // settings.rules.unit_bytes)
    work = per_byte * total + sample.unpack_seconds * scale + per_part * parts
    longest = max(map(raw_size, units)) / total  # a unit is done by one process
    return Estimate(
        text_bytes=int(sum(report.text_bytes for report in reports) * scale),
        tokens=int(sum(report.tokens for report in reports) * scale),
        disk_bytes=int(written * scale),
        seconds=work * max(1 / min(at_once, len(units)), longest),
    )


def _places(units: Sequence[Unit]) -> Iterator[tuple[Piece, list[int]]]:
    """Pieces to be tried, with the bytes within each at which to begin: evenly spread over all bytes."""
    pieces = [piece for unit in units for piece in unit.pieces if piece.size]
    ends = list(accumulate(piece.size for piece in pieces))
    if not ends:
        return
    chosen: dict[int, list[int]] = {}
    for number in range(PLACES):
        place = ends[-1] * (2 * number + 1) // (2 * PLACES)
        which = bisect_right(ends, place)
        chosen.setdefault(which, []).append(place - (ends[which] - pieces[which].size))
    for which, offsets in chosen.items():
        yield pieces[which], offsets


class _Sample:
    """Plain files with parts of the corpus; `bytes` is how much of it they stand for."""

    def __init__(self, settings: UnitSettings) -> None:
        self.settings = settings
        self.folder = settings.output / "sample"
        self.folder.mkdir()
        self.pieces: list[Piece] = []
        self.bytes = 0
        self.unpack_seconds = 0.0
        self._prepared = 0

    def take(self, piece: Piece, offsets: Sequence[int]) -> None:
        """Add parts of a piece: at each offset, or at its beginning where it cannot be entered elsewhere."""
        source, limit = piece.source, PLACE_BYTES * len(offsets)
        try:
            if source.kind in ("parquet", "saved"):
                self._take_rows(piece, limit)
            elif source.compression or source.kind in ("json", "csv") or piece.size <= limit:
                began = time.perf_counter()
                content = _beginning(piece, limit)
                self.unpack_seconds += time.perf_counter() - began if source.compression else 0.0
                self._add(piece, content, len(content))
            else:
                for offset in offsets:
                    content = _lines_at(piece, offset)
                    self._add(piece, content, len(content))
        except (UserError, OSError):
            return  # damaged: the preparation will say so

    def _take_rows(self, piece: Piece, limit: int) -> None:
        """Rows of a table, which are written as lines of JSON: what they stand for is their text."""
        texts, size = list[str](), 0
        for record in read_unit(Unit(0, (piece,)), self.settings.rules):
            if isinstance(record, Document):
                texts.append(record.content.decode())
                size += len(record.content)
            if size >= limit:
                break
        stands_for = size
        if piece.source.kind == "saved" and texts:  # its size counts other columns, too
            stands_for = piece.size * len(texts) // max(piece.stop - piece.start, 1)
        lines = b"".join(orjson.dumps({self.settings.rules.key: text}) + b"\n" for text in texts)
        self._add(replace(piece, source=replace(piece.source, kind="jsonl")), lines, stands_for)

    def _add(self, piece: Piece, content: bytes, stands_for: int) -> None:
        if not content:
            return
        path = self.folder / str(len(self.pieces))
        path.write_bytes(content)
        source = replace(piece.source, path=str(path), compression="", size=len(content))
        self.pieces.append(Piece(source, piece.index, 0, len(content), len(content), whole=piece.whole))
        self.bytes += stands_for

    def prepare(self) -> tuple[Sequence[UnitReport], float, float]:
        """Prepare all pieces as a unit: what came of it, seconds of a part beside its text, seconds of a byte."""
        smallest = min(self.pieces, key=lambda piece: piece.size)
        _, first = self._timed([smallest])
        reports, second = self._timed(self.pieces)
        more = sum(piece.size for piece in self.pieces) - smallest.size
        per_byte = max(second - first, 0.0) / more if more else second / smallest.size
        in_file = sum(piece.size for piece in self.pieces) / self.bytes
        return reports, max(first - per_byte * smallest.size, 0.0), per_byte * in_file

    def _timed(self, pieces: Sequence[Piece]) -> tuple[Sequence[UnitReport], float]:
        self._prepared += 1
        began = time.perf_counter()
        reports = prepare_unit(Unit(self._prepared, tuple(pieces)), self.settings)
        return reports, time.perf_counter() - began


def _beginning(piece: Piece, limit: int) -> bytes:
    """The first bytes of a piece, decompressed; of lines, whole ones."""
    source, left = piece.source, limit
    stop = None if source.compression else min(piece.stop, piece.start + limit)
    parts: list[bytes] = []
    with open_stream(source.file, source.compression, name=source.name, start=piece.start, stop=stop) as stream:
        while left and (part := stream.read1(left)):
            parts.append(part)
            left -= len(part)
    content = b"".join(parts)
    return content if left or source.kind in ("text", "json") else content[: content.rfind(b"\n") + 1]


def _lines_at(piece: Piece, offset: int) -> bytes:
    """Whole lines from about `offset` of a plain piece; of text, what is there."""
    with piece.source.file.open("rb") as file:
        file.seek(piece.start + min(offset, max(piece.stop - piece.start - PLACE_BYTES, 0)))
        content = file.read(PLACE_BYTES)
    if piece.source.kind == "text":
        return content[:PLACE_BYTES].decode(errors="ignore").encode()
    return content[content.find(b"\n") + 1 : content.rfind(b"\n") + 1]
