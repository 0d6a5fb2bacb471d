"""Bytes of files, decompressed, and the places where they may be cut: by the block, never a whole file at once.

In: a path, how it is packed, a range. Out: a buffered stream whose damage is a `UserError` with name and offset;
and `CutFinder`, which says where a range of records ends while the bytes go by.
"""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow as pa
import zstandard

from pipeline.errors import UserError

MIB = 2**20
BLOCK_BYTES = MIB
BOM = b"\xef\xbb\xbf"
Compression = Literal["", "gzip", "zstd"]
_PACKED_BYTES = 4096
"""Fed to zstandard at once: a block of 4 bytes may unpack to 128 KiB, so this bounds what comes back to 128 MiB."""
_UNPACKING_ERRORS = (OSError, EOFError, pa.ArrowException, zlib.error, zstandard.ZstdError)


class _Readable(Protocol):
    def readinto(self, buffer: Any, /) -> int: ...
    def close(self) -> None: ...


def open_stream(
    path: Path,
    compression: Compression,
    *,
    name: str,
    start: int = 0,
    stop: int | None = None,
    drop_bom: bool = True,
    damage: str = "",
) -> io.BufferedReader:
    """The bytes [start, stop) of a plain file, or all of a compressed one, less a byte order mark at their beginning.

    Opening and reading raise `UserError` naming `name` and the offset in the text where the file is damaged, ends
    early (compressed data cut short; a plain file that is shorter than `stop`) or cannot be read; and `damage` at the
    end of what was saved of a file. `read1` and `readline` give all that precedes; `read` drops what it had of a block.
    The caller closes.
    """
    try:
        source: _Readable
        if compression:
            source, stop = _Packed(path, compression), None
        else:
            source = file = path.open("rb", buffering=0)
            file.seek(start)
        left = None if stop is None else stop - start
        raw = _Raw(source, name, start, left=left, drop_bom=drop_bom, damage=damage)
        return io.BufferedReader(raw, BLOCK_BYTES)
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror or error}") from None


def _arrow(path: Path, compression: Compression) -> Any:
    """Arrow's streams are fast, take several frames or members, release the interpreter lock and notice truncation."""
    return pa.CompressedInputStream(pa.OSFile(str(path), "rb"), compression)


class _Packed:
    """Text of a compressed file: by Arrow as long as it can, and from where it fails on by `_Members`.

    Arrow drops what it had unpacked of a block when it comes to damage, and takes some sound files for damaged (padding
    after the last member, frames with long windows). Members drop what they had unpacked of one step, so they are tried
    once more, byte by byte, before damage is damage.
    """

    def __init__(self, path: Path, compression: Compression) -> None:
        self._path, self._compression = path, compression
        self._position = 0
        self._way: Any = _arrow(path, compression)

    def readinto(self, view: memoryview) -> int:
        while True:
            try:
                size: int = self._way.readinto(view)
            except _UNPACKING_ERRORS:
                careful = self._more_careful()
                if careful is None:
                    raise
                self._way.close()
                self._way = careful
                self._skip()
            else:
                self._position += size
                return size

    def close(self) -> None:
        self._way.close()

    def _more_careful(self) -> _Members | None:
        if not isinstance(self._way, _Members):
            return _Members(self._path, self._compression)
        return self._way.by_bytes()

    def _skip(self) -> None:
        """Bring the new way to where the old one failed."""
        left = self._position
        while left:
            size = self._way.readinto(memoryview(bytearray(min(left, BLOCK_BYTES))))
            if not size:
                raise EOFError("the file was changed while it was read")
            left -= size


class _Members:
    """Members of gzip, zero bytes between and after them ignored, or frames of zstd with windows up to 2 GiB.

    What is sound is given to the byte; then `EOFError`, `zlib.error` or `ZstdError`. From `single_from` on, bytes are
    fed one at a time, and nothing that was unpacked is lost to an error.
    """

    def __init__(self, path: Path, compression: Compression, single_from: int | None = None) -> None:
        self._path, self._compression, self._single_from = path, compression, single_from
        self._file = path.open("rb")
        self._member: Any = None
        self._fed = 0
        self._padded = False
        self._packed = b""
        self._ready = memoryview(b"")

    def by_bytes(self) -> _Members | None:
        """The same anew, byte by byte from the step that failed; None where that would bring nothing more."""
        if self._single_from is not None or not self._packed:
            return None
        return _Members(self._path, self._compression, single_from=self._fed)

    def readinto(self, buffer: memoryview) -> int:
        while not self._ready:
            self._packed = self._packed or self._next()
            if not self._packed:
                if self._member is not None:
                    raise EOFError("Truncated compressed stream")
                return 0
            self._member = self._member or self._begun()
            self._ready = memoryview(self._member.decompress(self._packed))
            self._packed = b""
            if self._member.eof:
                self._packed, self._member = self._unpadded(self._member.unused_data), None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()

    def _begun(self) -> Any:
        if self._compression == "gzip":
            return zlib.decompressobj(zlib.MAX_WBITS | 16)
        return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()

    def _next(self) -> bytes:
        """Bytes to feed; none at the end of the file."""
        packed = b""
        while not packed:
            self._fed = self._file.tell()
            single = self._single_from is not None and self._fed >= self._single_from
            block = self._file.read(1 if single else _PACKED_BYTES)
            if not block:
                break
            packed = self._unpadded(block) if self._padded and self._member is None else block
        return packed

    def _unpadded(self, block: bytes) -> bytes:
        """What follows a member, less the zero bytes that tapes and some tools put there."""
        self._padded = self._compression == "gzip"
        return block.lstrip(b"\0") if self._padded else block


class _Raw(io.RawIOBase):
    """At most `left` bytes of a source; what goes wrong in it is the user's to know."""

    def __init__(
        self, source: _Readable, name: str, position: int, *, left: int | None, drop_bom: bool, damage: str
    ) -> None:
        self._source, self._name, self._position, self._left = source, name, position, left
        self._damage = damage
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
        wanted = len(view)
        if self._left is not None:
            view = view[: self._left]
        try:
            size = self._source.readinto(view)
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
        if not size and wanted and self._damage:
            raise UserError(self._damage)
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
