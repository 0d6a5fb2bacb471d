"""Bytes of files, decompressed, and the places where they may be cut: by the block, never a whole file at once.

In: a path, how it is packed, a range. Out: a buffered stream whose damage is a `UserError` with name and offset;
and `CutFinder`, which says where a range of records ends while the bytes go by.
"""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import Any, Literal

import zstandard

from pipeline.errors import UserError

MIB = 2**20
BLOCK_BYTES = MIB
BOM = b"\xef\xbb\xbf"
Compression = Literal["", "gzip", "zstd"]
_PACKED_BYTES = 4096
"""Fed to zstandard at once: a block of 4 bytes may unpack to 128 KiB, so this bounds what comes back to 128 MiB."""
_UNPACKING_ERRORS = (OSError, EOFError, zlib.error, zstandard.ZstdError)


def open_stream(
    path: Path,
    compression: Compression,
    *,
    name: str,
    start: int = 0,
    stop: int | None = None,
    drop_bom: bool = True,
) -> io.BufferedReader:
    """The bytes [start, stop) of a plain file, or all of a compressed one, less a byte order mark at their beginning.

    Opening and reading raise `UserError` naming `name` and the offset in the text where the file is damaged, ends
    early (compressed data cut short; a plain file that is shorter than `stop`) or cannot be read. `read1` and
    `readline` give what precedes, but for the text of a few kilobytes of compressed data in which the damage lies;
    `read` drops what it had of a block. The caller closes.
    """
    try:
        source: io.IOBase
        if compression:
            source, stop = _Gzip(path) if compression == "gzip" else _Zstd(path), None
        else:
            source = path.open("rb", buffering=0)
            source.seek(start)
        left = None if stop is None else stop - start
        raw = _Raw(source, name, start, left=left, drop_bom=drop_bom)
        return io.BufferedReader(raw, BLOCK_BYTES)
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror or error}") from None


class _Gzip(gzip.GzipFile):
    """The text of a file of gzip; what was unpacked is given before an error that comes after it."""

    def readinto(self, buffer: Any, /) -> int:
        return self.readinto1(buffer)  # `GzipFile` would go on until the buffer is full, or drop it all


class _Zstd(io.RawIOBase):
    """The text of a file of zstd, of one frame or many, with windows up to 2 GiB (`zstd --long=31`).

    `zstandard` has a reader of its own, but that takes a file that was cut short for a whole one.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._frame: Any = None
        self._packed = b""
        self._ready = memoryview(b"")

    def readinto(self, buffer: Any, /) -> int:
        while not self._ready:
            self._packed = self._packed or self._file.read(_PACKED_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            self._ready, self._packed = memoryview(self._frame.decompress(self._packed)), b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


class _Raw(io.RawIOBase):
    """At most `left` bytes of a source; what goes wrong in it is the user's to know."""

    def __init__(self, source: Any, name: str, position: int, *, left: int | None, drop_bom: bool) -> None:
        self._source, self._name, self._position, self._left = source, name, position, left
        self._head = b""
        if drop_bom:
            head = bytearray()
            while len(head) < len(BOM) and (size := self._fill(memoryview(block := bytearray(len(BOM) - len(head))))):
                head += block[:size]
            self._head = b"" if head == BOM else bytes(head)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)
        if not self._head:
            return self._fill(view)
        size = min(len(view), len(self._head))
        view[:size], self._head = self._head[:size], self._head[size:]
        return size

    def _fill(self, view: memoryview) -> int:
        if self._left is not None:
            view = view[: self._left]
        try:
            size: int = self._source.readinto(view)
        except _UNPACKING_ERRORS as error:
            raise UserError(
                f"cannot read {self._name} past byte {self._position} of its text: {error}; "
                "the file is damaged or incomplete"
            ) from None
        if self._left is not None:
            if not size and self._left:
                raise UserError(
                    f"cannot read {self._name}: it ends at byte {self._position}, {self._left} bytes sooner than when "
                    "the work was planned; it is damaged or incomplete, or was changed meanwhile: run again"
                )
            self._left -= size
        self._position += size
        return size

    def close(self) -> None:
        if not self.closed:
            self._source.close()
        super().close()


class CutFinder:
    """Finds the end of the range that begins at `start`: after the first delimiter `size` bytes on or later.

    Delimiters count from the left and do not overlap, so where one ends may depend on everything before it (a blank
    line among several, as a separator). A cut is only made after a delimiter that overlaps none before it: this one
    counts, whatever came earlier. With `flexible`, text without a delimiter within `size` bytes more is cut there,
    before a byte that begins a UTF-8 character.
    """

    def __init__(self, start: int, *, size: int, delimiter: bytes, flexible: bool) -> None:
        self.position = max(start, start + size - len(delimiter) + 1)
        """The first byte of the next block wanted."""
        self._delimiter, self._target = delimiter, start + size
        self._limit = start + 2 * size if flexible else None
        self._carry = b""
        self._last: int | None = None

    def find(self, block: bytes) -> int | None:
        """Where to cut, if the block at `position` tells; else the next block is wanted."""
        window, base = self._carry + block, self.position - len(self._carry)
        self.position += len(block)
        length = len(self._delimiter)
        at = window.find(self._delimiter)
        while at >= 0 and (self._limit is None or base + at < self._limit):
            overlaps = self._last is not None and base + at - self._last < length
            self._last = base + at
            if not overlaps and self._last >= self._target:
                return self._last + length
            at = window.find(self._delimiter, at + 1)
        if self._limit is not None:
            for end in range(max(self._limit, base), min(self._limit + 4, self.position)):
                if window[end - base] & 0xC0 != 0x80 or end == self._limit + 3:
                    return end
        self._carry = window[1 - length :] if length > 1 else b""
        return None


def character_start(content: bytes | bytearray, end: int) -> int:
    """The nearest place at or before `end` that does not part the bytes of a UTF-8 character."""
    if end < len(content):
        for start in range(end, max(end - 4, 0), -1):
            if content[start] & 0xC0 != 0x80:
                return start
    return end
