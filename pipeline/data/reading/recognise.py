"""One file to a source: its beginning says how it is packed and whether it can be read, its suffix what is in it.

In: a path and how it is called. Out: a `Source`, and notes for the user where content and suffix disagree.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from stat import S_ISREG

import orjson

from pipeline.data.reading.bytestream import BLOCK_BYTES, BOM, Compression, open_stream
from pipeline.data.reading.formats import Kind, Source
from pipeline.data.reading.signatures import HEAD_BYTES, NO_TEXT, is_clean, unreadable
from pipeline.errors import UserError

KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
READABLE = f"{' '.join(KINDS)}, or .gz and .zst of these"
_SKIPPABLE: dict[bytes, Compression] = {bytes([0x50 + n]) + b"\x2a\x4d\x18": "zstd" for n in range(16)}
"""Frames without text (RFC 8878, 3.1.2): pzstd begins with one."""
_MAGIC: dict[bytes, Compression] = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", **_SKIPPABLE}
_FIRST_LINE_BYTES = 64 * BLOCK_BYTES


class UnreadableFileError(UserError):
    """A file is of a kind that no reader reads."""


def file_source(path: Path, name: str, notes: set[str]) -> Source:
    """Look at a file: its beginning says how it is packed, the suffix of its name what is in it.

    Raises `UnreadableFileError` for archives, other encodings and whatever else is recognised as no text.
    """
    try:
        status = path.stat()
        if not S_ISREG(status.st_mode):
            raise UserError(f"{name} is neither a file nor a folder; a pipe cannot be read twice: write it to a file")
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from None
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    promised = COMPRESSIONS.get(suffixes[-1], "") if suffixes else ""
    compression: Compression = next((packed for magic, packed in _MAGIC.items() if head.startswith(magic)), "")
    inner = suffixes[:-1] if promised else suffixes
    kind = KINDS.get(inner[-1]) if inner else None
    unpacked = _unpacked_head(path, compression) if compression else head
    _refuse_unreadable(name, unpacked, compression, listed=kind is not None)
    kind = kind or "text"
    if promised and compression != promised:
        notes.add(_broken_promise(name, promised, compression, kind, head))
    if head.startswith(b"PAR1") and kind != "parquet":
        notes.add(f"{name} is parquet, whatever its suffix says: read as such")
        kind = "parquet"
    if kind == "json":
        kind = _json_kind(path, compression)
    elif kind in ("text", "csv") and _holds_json_lines(path, compression, unpacked):
        notes.add(f"{name} holds JSON lines, whatever its suffix says: read as such")
        kind = "jsonl"
    if kind == "parquet" and head and not head.startswith(b"PAR1"):
        remedy = "unpack it" if compression else "copy it again"
        raise UnreadableFileError(
            f"{name} is not a parquet file: it begins with {head[:4]!r}, wanted b'PAR1'; {remedy}"
        )
    where = "" if name == str(path) else str(path)
    return Source(name, kind, compression, status.st_size, fingerprint(path, name, status), path=where)


def _unpacked_head(path: Path, compression: Compression) -> bytes:
    """The beginning of the text of a compressed file; of a damaged one, what there is."""
    head = b""
    try:
        with open_stream(path, compression, name=str(path), drop_bom=False) as stream:
            while len(head) < HEAD_BYTES and (block := stream.read1(HEAD_BYTES - len(head))):
                head += block
    except UserError:  # reading it will say what is wrong
        pass
    return head


def _refuse_unreadable(name: str, head: bytes, compression: Compression, *, listed: bool) -> None:
    """Raise `UnreadableFileError` for content that is recognised as no text; `listed`: its suffix is one of ours."""
    within = f" within {compression}" if compression else ""
    if head.startswith(b"PAR1") and not compression:
        return
    if compression and (packed := next((packed for magic, packed in _MAGIC.items() if head.startswith(magic)), "")):
        raise UnreadableFileError(f"{name} is {packed}{within}: unpack it once, or --exclude it")
    if compression and head.startswith(b"PAR1"):
        raise UnreadableFileError(f"{name} is parquet{within}: unpack it, or --exclude it")
    if found := unreadable(head):
        what, remedy = found
        raise UnreadableFileError(f"{name} is {what}{within}: {remedy}, or --exclude it")
    if not listed and (control := NO_TEXT.search(head)):
        raise UnreadableFileError(
            f"{name} is no text{within}: it has a byte {control.group()[0]:#04x} at {control.start()}; "
            f"wanted {READABLE}, or text under any name; --exclude it"
        )


def _broken_promise(name: str, promised: Compression, found: Compression, kind: Kind, head: bytes) -> str:
    """What to say of a file that its suffix calls packed otherwise than it is; refused unless it could be plain."""
    if not head:
        return f"{name} is empty, which no {promised} file is; copy it again if it should hold text"
    if not found and not _is_plain(kind, head):
        wanted = next(magic for magic, packed in _MAGIC.items() if packed == promised)
        raise UnreadableFileError(
            f"{name} is no {promised} file, nor {kind}: it begins with {head[:4]!r}, wanted {wanted!r}; copy it again, "
            "unpack it, or --exclude it"
        )
    return f"{name} is {found or 'not compressed'}, whatever its suffix says: read as such"


def _is_plain(kind: Kind, head: bytes) -> bool:
    """Whether the beginning of a file is that of a file of that kind, not compressed."""
    if head.startswith(b"PAR1"):
        return True
    first = head.removeprefix(BOM).lstrip()[:1]
    return is_clean(head) and (kind not in ("jsonl", "json") or first in (b"{", b"[", b""))


def fingerprint(path: Path, name: str, status: os.stat_result) -> str:
    """Size and time of change of a file.

    The name of a file of the hub holds its revision, and in the cache it is called by a digest of its content: unlike
    the time of change, neither depends on when it was downloaded.
    """
    return f"{status.st_size}-{path.resolve().name if '://' in name else status.st_mtime_ns}"


def _json_kind(path: Path, compression: Compression) -> Kind:
    """A `.json` file whose first line is an object by itself holds one object a line, as many do."""
    try:
        with open_stream(path, compression, name=str(path)) as stream:
            if stream.peek(1)[:1] == b"[":
                return "json"
            first = b""
            while not first and stream.peek(1):
                first = stream.readline(_FIRST_LINE_BYTES).strip()
            second = stream.peek(1).lstrip()
    except UserError:  # reading it will say what is wrong
        return "json"
    return "jsonl" if first.startswith(b"{") and first.endswith(b"}") and second[:1] in (b"", b"{") else "json"


def _holds_json_lines(path: Path, compression: Compression, head: bytes) -> bool:
    """Whether the first two lines of a file are JSON objects that share a key, as records do."""
    if not head.removeprefix(BOM).lstrip().startswith(b"{"):
        return False
    objects: list[dict[str, object]] = []
    try:
        with open_stream(path, compression, name=str(path)) as stream:
            while len(objects) < 2 and (line := stream.readline(_FIRST_LINE_BYTES)):
                if line.isspace():
                    continue
                value = orjson.loads(line)
                if not isinstance(value, dict):
                    return False
                objects.append(value)
    except (UserError, orjson.JSONDecodeError):
        return False
    return len(objects) == 2 and bool(objects[0].keys() & objects[1].keys())
