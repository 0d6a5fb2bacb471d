"""Paths, globs and hub names to a plan of units, and a unit to its documents.

In: what the user named. Out: sorted sources, cut into units of about 64 MB of text. The plan is a pure function of
inputs and rules: neither the order of the arguments nor the number of workers changes it.
"""

from __future__ import annotations

import glob
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.formats import (
    BOM,
    Compression,
    Document,
    Kind,
    Piece,
    Rejected,
    Source,
    TextRules,
    chunk_end,
    keys_of,
    load_dataset,
    missing_key,
    read_piece,
)
from pipeline.errors import UserError, nearest

_KINDS: dict[str, Kind] = {
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
_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
_MAGIC: dict[bytes, Compression] = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_SAVED_DATASET = ({"dataset_info.json", "state.json"}, {"dataset_dict.json"})
_COMPRESSION_RATIO = 4
"""Expected text bytes of a compressed byte, for the size of units and the progress bar only."""


@dataclass(frozen=True)
class Corpus:
    """What the inputs came to; `notes` are remarks for the user."""

    sources: tuple[Source, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Unit:
    """Work for one task: pieces in order, about `TextRules.unit_bytes` of text."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Expected bytes of text."""
        return sum(piece.size for piece in self.pieces)


def find_corpus(inputs: Sequence[str], *, exclude: Sequence[str] = ()) -> Corpus:
    """Resolve files, folders (recursive), globs, `hf:` names and saved datasets, sorted and without repeats.

    Raises `UserError` for an input that matches nothing, naming what is there instead.
    """
    sources: dict[str, Source] = {}
    notes: list[str] = []
    skipped: list[Path] = []
    for text in inputs:
        if text.startswith("hf:"):
            sources[text] = _dataset_source(text, "hub")
            continue
        for path in _expand(text):
            if path.is_file():
                files = [path]
            elif _is_saved_dataset(path):
                sources[str(path)] = _dataset_source(str(path), "saved")
                continue
            else:
                files = _files_below(path, skipped)
            for file in files:
                if not any(fnmatch(str(file), pattern) or fnmatch(file.name, pattern) for pattern in exclude):
                    sources[str(file)] = _file_source(file, notes)
    if skipped:
        suffixes = ", ".join(sorted({path.suffix or "no suffix" for path in skipped})[:8])
        notes.append(f"skipped {len(skipped)} files of other kinds ({suffixes}); name a file itself to read it as text")
    if not sources:
        raise UserError("--exclude leaves no input; loosen its patterns")
    return Corpus(tuple(sources[name] for name in sorted(sources)), tuple(sorted(set(notes))))


def check_text_key(sources: Iterable[Source], key: str) -> None:
    """Refuse at once, before any work, when the first source of a kind has records without the text key."""
    seen: set[Kind] = set()
    for source in sources:
        if source.kind in seen or not source.size:
            continue
        seen.add(source.kind)
        keys = keys_of(source)
        if keys is not None and key not in keys:
            raise missing_key(source.name, key, keys)


def plan_units(sources: Sequence[Source], rules: TextRules) -> tuple[Unit, ...]:
    """Cut sources into pieces and group these, in order, into units of about `rules.unit_bytes`."""
    groups: list[list[Piece]] = []
    filled = 0
    for index, source in enumerate(sources):
        for piece in _cut(source, index, rules):
            if not groups or filled + piece.size > rules.unit_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(piece)
            filled += piece.size
    return tuple(Unit(number, tuple(pieces)) for number, pieces in enumerate(groups))


def read_unit(unit: Unit, rules: TextRules) -> Iterator[Document | Rejected]:
    """All records of a unit in order."""
    for piece in unit.pieces:
        yield from read_piece(piece, rules)


def read_texts(units: Iterable[Unit], rules: TextRules) -> Iterator[str]:
    """The text of every document of the corpus, in order."""
    for unit in units:
        for record in read_unit(unit, rules):
            if isinstance(record, Document):
                yield record.text


def _expand(text: str) -> list[Path]:
    """Existing resolved paths that an argument stands for."""
    path = Path(text).expanduser()
    if path.exists():
        return [path.resolve()]
    if glob.has_magic(text):
        matches = sorted(Path(match).resolve() for match in glob.glob(str(path), recursive=True))  # noqa: PTH207 - hidden
        found = [match for match in matches if match.is_file() or "**" not in text]
        if found:
            return found
        raise UserError(f"nothing matches {text!r}; {_there(path)}")
    hint = f"; for data of the Hugging Face hub write hf:{text}" if re.fullmatch(r"[\w.-]+/[\w.-]+", text) else ""
    raise UserError(f"no file or folder {text!r}; {_there(path)}{hint}")


def _there(path: Path) -> str:
    """What exists near a path that does not."""
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    return f"{folder.resolve()} holds {shown or 'nothing'}{nearest(path.name, names)}"


def _files_below(folder: Path, skipped: list[Path]) -> list[Path]:
    """Files of known kinds below a folder; hidden ones are ignored, others are added to `skipped`."""
    files: list[Path] = []
    others: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in sorted(names) if not name.startswith(".")):
            (files if _known(path) else others).append(path.resolve())
    if not files:
        kinds = ", ".join(sorted({path.suffix or "no suffix" for path in others})) or "no files"
        raise UserError(
            f"folder {folder} holds nothing to read ({kinds}); wanted {' '.join(_KINDS)}, or .gz and .zst of these; "
            "name a file itself to read it as plain text"
        )
    skipped.extend(others)
    return files


def _known(path: Path) -> bool:
    suffixes = path.suffixes
    if suffixes and suffixes[-1].lower() in _COMPRESSIONS:
        suffixes = suffixes[:-1]
        return bool(suffixes) and suffixes[-1].lower() in _KINDS and suffixes[-1].lower() != ".parquet"
    return bool(suffixes) and suffixes[-1].lower() in _KINDS


def _is_saved_dataset(folder: Path) -> bool:
    names = {entry.name for entry in folder.iterdir()}
    return any(marks <= names for marks in _SAVED_DATASET)


def _file_source(path: Path, notes: list[str]) -> Source:
    """Look at a file: its beginning says how it is packed, its suffix what is in it."""
    try:
        status = path.stat()
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    suffixes = [suffix.lower() for suffix in path.suffixes]
    promised = _COMPRESSIONS.get(suffixes[-1], "") if suffixes else ""
    compression: Compression = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")
    if promised and head and compression != promised:
        notes.append(f"{path} is {compression or 'not compressed'}, whatever its suffix says: read as such")
    inner = suffixes[:-1] if promised else suffixes
    kind = _KINDS.get(inner[-1], "text") if inner else "text"
    if head.startswith(b"PAR1") and kind != "parquet":
        notes.append(f"{path} is parquet, whatever its suffix says: read as such")
        kind = "parquet"
    if kind == "json" and not compression and not head.removeprefix(BOM).lstrip().startswith(b"["):
        kind = _json_kind(path)
    if kind == "parquet" and head and not head.startswith(b"PAR1"):
        raise UserError(f"{path} is not a parquet file: it begins with {head[:4]!r}, wanted b'PAR1'; copy it again")
    return Source(str(path), kind, compression, status.st_size, f"{status.st_size}-{status.st_mtime_ns}")


def _json_kind(path: Path) -> Kind:
    """A `.json` file whose first line is an object by itself holds one object a line, as many do."""
    with path.open("rb") as file:
        first, second = file.readline().strip(), file.readline().strip()
    return "jsonl" if first.endswith(b"}") and (not second or second.startswith(b"{")) else "json"


def _dataset_source(name: str, kind: Kind) -> Source:
    dataset = load_dataset(name, kind)
    size = int(dataset.data.nbytes) if len(dataset) else 0
    return Source(name, kind, "", size, str(dataset._fingerprint))


def _cut(source: Source, index: int, rules: TextRules) -> Iterator[Piece]:
    """The pieces of one source."""
    if source.size == 0:
        return
    if source.kind in ("hub", "saved"):
        yield from _cut_rows(source, index, rules)
    elif source.kind == "parquet":
        yield from _cut_row_groups(source, index, rules)
    elif source.compression:
        yield Piece(source, index, 0, source.size, 0, source.size * _COMPRESSION_RATIO)
    elif source.size <= rules.unit_bytes or source.kind in ("json", "csv"):
        yield Piece(source, index, 0, source.size, 0, source.size)
    elif source.kind == "jsonl":
        yield from _cut_bytes(source, index, rules, _records_until(b"\n", rules.unit_bytes))
    elif rules.separator is not None:
        yield from _cut_bytes(source, index, rules, _records_until(rules.separator.encode(), rules.unit_bytes))
    else:
        yield from _cut_bytes(source, index, rules, _chunks_until(rules.unit_bytes))


def _cut_rows(source: Source, index: int, rules: TextRules) -> Iterator[Piece]:
    rows = len(load_dataset(source.name, source.kind))
    step = max(1, rules.unit_bytes * rows // source.size)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield Piece(source, index, start, stop, start, source.size * (stop - start) // rows)


def _cut_row_groups(source: Source, index: int, rules: TextRules) -> Iterator[Piece]:
    try:
        metadata = pq.ParquetFile(source.name).metadata
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {source.name}: {error}; the file is damaged or incomplete") from None
    columns = [metadata.schema.column(number).path.split(".")[0] for number in range(metadata.num_columns)]
    text = columns.index(rules.key) if rules.key in columns else 0
    row = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        yield Piece(source, index, number, number + 1, row, int(group.column(text).total_uncompressed_size))
        row += group.num_rows


_Step = Callable[[mmap.mmap, int], tuple[int, int]]
"""From a map and a position to the end of the piece that begins there and the records in it."""


def _cut_bytes(source: Source, index: int, rules: TextRules, step: _Step) -> Iterator[Piece]:
    """Byte ranges that end where records end. Rows before a piece are counted, which reads the file once."""
    with Path(source.name).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start, row = (len(BOM) if content[:3] == BOM else 0), 0
        while start < len(content):
            stop, records = step(content, start)
            yield Piece(source, index, start, stop, row, stop - start)
            start, row = stop, row + records


def _records_until(delimiter: bytes, size: int) -> _Step:
    def step(content: mmap.mmap, start: int) -> tuple[int, int]:
        found = content.find(delimiter, start + size)
        stop = len(content) if found < 0 else found + len(delimiter)
        return stop, content[start:stop].count(delimiter)

    return step


def _chunks_until(size: int) -> _Step:
    def step(content: mmap.mmap, start: int) -> tuple[int, int]:
        stop, chunks = start, 0
        while stop < len(content) and stop - start < size:
            stop, chunks = chunk_end(content, stop, len(content)), chunks + 1
        return stop, chunks

    return step
