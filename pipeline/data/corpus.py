"""Paths, globs and hub names to sources, and a unit of them to its documents.

In: what the user named. Out: sources, sorted and without repeats whatever the order of the arguments; and, for each
unit that `plan.py` makes of them, the documents and rejected records in order. The one door to `datasets`.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.data.formats import (
    BOM,
    Compression,
    Document,
    Kind,
    Piece,
    Rejected,
    Row,
    Source,
    TextRules,
    checked,
    keys_of,
    missing_key,
    read_piece,
    require_column,
    values_of,
)
from pipeline.data.plan import Unit
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
_DATASETS: tuple[Kind, ...] = ("hub", "saved")
_SAVED_DATASET = ({"dataset_info.json", "state.json"}, {"dataset_dict.json"})


@dataclass(frozen=True)
class Corpus:
    """What the inputs came to; `notes` are remarks for the user."""

    sources: tuple[Source, ...]
    notes: tuple[str, ...]


def find_corpus(inputs: Sequence[str], *, exclude: Sequence[str] = (), output: Path | None = None) -> Corpus:
    """Resolve files, folders (recursive), globs, `hf:` names and saved datasets, sorted and without repeats.

    What folders and globs find below `output` is left out: it is the result of an earlier run, not its input.
    Raises `UserError` for an input that matches nothing, naming what is there instead.
    """
    sources: dict[str, Source] = {}
    notes: list[str] = []
    skipped: list[Path] = []
    for text in inputs:
        if text.startswith("hf:"):
            sources[text] = _dataset_source(text, "hub")
            continue
        for path in _expand(text, output):
            if path.is_file():
                files = [path]
            elif _is_saved_dataset(path):
                sources[str(path)] = _dataset_source(str(path), "saved")
                continue
            else:
                files = _files_below(path, skipped, output)
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
        keys = load_dataset(source.name, source.kind).column_names if source.kind in _DATASETS else keys_of(source)
        if keys is not None and key not in keys:
            raise missing_key(source.name, key, keys)


def read_unit(unit: Unit, rules: TextRules) -> Iterator[Document | Rejected]:
    """All records of a unit in order."""
    for piece in unit.pieces:
        if piece.source.kind in _DATASETS:
            yield from (checked(value, piece.index, row) for row, value in _read_dataset(piece, rules))
        else:
            yield from read_piece(piece, rules)


def read_texts(units: Iterable[Unit], rules: TextRules) -> Iterator[str]:
    """The text of every document of the corpus, in order."""
    for unit in units:
        for record in read_unit(unit, rules):
            if isinstance(record, Document):
                yield record.text


def _expand(text: str, output: Path | None) -> list[Path]:
    """Existing resolved paths that an argument stands for."""
    path = Path(text).expanduser()
    if path.exists():
        return [path.resolve()]
    if glob.has_magic(text):
        matches = sorted(Path(match).resolve() for match in glob.glob(str(path), recursive=True))  # noqa: PTH207 - hidden
        matches = [match for match in matches if output is None or not match.is_relative_to(output)]
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


def _files_below(folder: Path, skipped: list[Path], output: Path | None) -> list[Path]:
    """Files of known kinds below a folder; hidden ones are ignored, others are added to `skipped`."""
    files: list[Path] = []
    others: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and Path(parent, name) != output)
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
    return Source(name, kind, "", size, str(dataset._fingerprint), rows=len(dataset))


def _read_dataset(piece: Piece, rules: TextRules) -> Iterator[Row]:
    dataset = load_dataset(piece.source.name, piece.source.kind)
    require_column(dataset.column_names, piece.source.name, rules.key)
    rows = dataset.select_columns([rules.key]).with_format("arrow")
    for start in range(piece.start, piece.stop, 1024):
        table = rows[start : min(start + 1024, piece.stop)]
        yield from enumerate(values_of(table.column(0)), start)


@lru_cache(maxsize=4)
def load_dataset(name: str, kind: Kind) -> Any:
    """The train split of `hf:NAME[:CONFIG][@REVISION]` (kind `hub`) or of a `save_to_disk` folder (kind `saved`).

    A local folder of data files serves as NAME as well. Raises `UserError` with the library's reason.
    """
    import datasets  # slow to import and seldom needed

    try:
        if kind == "saved":
            dataset = datasets.load_from_disk(name)
            if isinstance(dataset, datasets.DatasetDict):
                dataset = dataset["train"]
        else:
            rest, _, revision = name.removeprefix("hf:").partition("@")
            path, _, config = rest.partition(":")
            dataset = datasets.load_dataset(
                str(Path(path).expanduser()), name=config or None, revision=revision or None, split="train"
            )
    except Exception as error:  # unknown name, config or split, no network, gated: many classes, one remedy
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(
            f"cannot load {name} with `datasets`: {reason}\n"
            "  wanted hf:NAME[:CONFIG][@REVISION] with a split 'train'; check spelling and network"
        ) from None
    return dataset
