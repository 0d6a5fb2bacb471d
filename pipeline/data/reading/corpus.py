"""Paths, globs and hub names to sources, and a unit of them to its documents.

In: what the user named. Out: sources, sorted and without repeats whatever the order of the arguments; and, for each
unit that `plan.py` makes of them, the documents and rejected records in order.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path, PurePath, PurePosixPath
from typing import NamedTuple

from pipeline.data.manifest import is_dataset
from pipeline.data.reading.formats import Document, Kind, Record, Source, TextRules
from pipeline.data.reading.hub import hub_files, load_saved
from pipeline.data.reading.plan import Unit
from pipeline.data.reading.readers import keys_of, read_piece, require_column
from pipeline.data.reading.recognise import (
    COMPRESSIONS,
    KINDS,
    READABLE,
    UnreadableFileError,
    file_source,
    fingerprint,
)
from pipeline.errors import UserError, counted, nearest
from pipeline.files import expanded

_SAVED_DATASET = ({"dataset_info.json", "state.json"}, {"dataset_dict.json"})
_SHOWN_FAULTS = 8


@dataclass(frozen=True)
class Corpus:
    """What the inputs came to; `notes` are remarks for the user."""

    sources: tuple[Source, ...]
    notes: tuple[str, ...]


class UnitRows(NamedTuple):
    """What reading a unit came to.

    `rows` counts per source index, with those that hold no record; `replaced` counts the bad bytes and lone surrogates
    that became U+FFFD.
    """

    rows: dict[int, int]
    replaced: int


def find_corpus(
    inputs: Sequence[str], *, exclude: Sequence[str] = (), output: Path | None = None, held_out: Sequence[str] = ()
) -> Corpus:
    """Resolve files, folders (recursive), globs, `hf:` names and saved datasets, sorted and without repeats.

    What folders and globs find below `output` is left out: it is the result of an earlier run, not its input.
    `exclude` holds for `inputs`; sources of `held_out` are validation as a whole. Raises `UserError` for an input that
    matches nothing, naming what is there instead, and for a source that is named as both.
    """
    search = _Search(output)
    sources = search.sources(inputs, exclude)
    if inputs and not sources:
        raise UserError("--exclude leaves no input; loosen its patterns")
    others = {path: replace(source, held_out=True) for path, source in search.sources(held_out, ()).items()}
    if both := sorted(sources[path].name for path in sources.keys() & others.keys()):
        more = f" and {len(both) - 1} more are" if len(both) > 1 else " is"
        raise UserError(f"{both[0]}{more} named as input and by --val-input; keep it out of the former with --exclude")
    found = sorted([*sources.values(), *others.values()], key=lambda source: source.name)
    return Corpus(tuple(found), search.notes())


def changed_since(corpus: Corpus) -> list[str]:
    """Names of the files that are there, but not as they were when they were found."""
    changed = []
    for source in corpus.sources:
        try:
            status = source.file.stat()
        except OSError:  # gone, and with it the question
            continue
        if source.kind != "saved" and fingerprint(source.file, source.name, status) != source.fingerprint:
            changed.append(source.name)
    return changed


def check_text_key(sources: Iterable[Source], key: str) -> None:
    """Refuse at once, before any work, when the first readable source of a kind has records without the text key."""
    seen: set[Kind] = set()
    for source in sources:
        if source.kind in seen or not source.size:
            continue
        try:
            keys = keys_of(source)
        except UserError:  # reading it will fail, and say why, without stopping the others
            continue
        seen.add(source.kind)
        if keys is not None:
            require_column(keys, source.name, key)


def read_unit(unit: Unit, rules: TextRules) -> Generator[Record, None, UnitRows]:
    """All records of a unit in order. Raises `UserError` at damage, after what came before it."""
    rows: Counter[int] = Counter()
    replaced = 0
    for piece in unit.pieces:
        found = yield from read_piece(piece, rules, first=rows[piece.index])
        rows[piece.index] += found.rows
        replaced += found.replaced
    return UnitRows(dict(rows), replaced)


def read_texts(units: Iterable[Unit], rules: TextRules) -> Iterator[str]:
    """The text of every document of the corpus, in order."""
    for unit in units:
        for record in read_unit(unit, rules):
            if isinstance(record, Document):
                yield record.content.decode()


class _Search:
    """Looks for sources and remembers what the user should know."""

    def __init__(self, output: Path | None) -> None:
        self._output = output
        self._notes: set[str] = set()
        self._skipped: set[Path] = set()
        self._links: set[Path] = set()
        self._prepared: set[Path] = set()
        self._plain: set[Path] = set()

    def notes(self) -> tuple[str, ...]:
        notes = self._notes
        if self._skipped:
            suffixes = ", ".join(sorted({path.suffix or "no suffix" for path in self._skipped})[:8])
            remedy = "name a file itself to read it as text"
            notes = notes | {f"skipped {counted(len(self._skipped), 'file')} of other kinds ({suffixes}); {remedy}"}
        if self._links:
            names = ", ".join(sorted(map(str, self._links))[:8])
            links = counted(len(self._links), "link")
            notes = notes | {f"skipped {links} to folders ({names}); name a folder itself to read it"}
        if self._plain:
            suffixes = ", ".join(sorted({path.suffix or "no suffix" for path in self._plain})[:8])
            files = counted(len(self._plain), "file")
            notes = notes | {f"read as plain text, each a document: {files} of other kinds ({suffixes})"}
        if self._prepared:
            names = ", ".join(sorted(map(str, self._prepared))[:8])
            notes = notes | {f"skipped {counted(len(self._prepared), 'dataset')} of data_prep.py ({names})"}
        return tuple(sorted(notes))

    def sources(self, inputs: Sequence[str], exclude: Sequence[str]) -> dict[Path, Source]:
        """By the resolved path of their bytes, so that none comes twice."""
        files: dict[Path, tuple[str, Path]] = {}  # a link is called by its name: its target may lack the suffix
        sources: dict[Path, Source] = {}
        for text in inputs:
            for name, path in self._named(text):
                if not is_unicode(name):
                    raise UserError(f"the name {name!r} is not UTF-8, so it cannot be recorded; rename the file")
                where = Path(os.path.realpath(path))  # unlike `resolve`, no error for a link to itself
                if path.is_dir():
                    sources[where] = _saved_source(where)
                elif not any(fnmatch(name, pattern) or fnmatch(path.name, pattern) for pattern in exclude):
                    files[where] = min((name, path), files.get(where, (name, path)))
        faults: list[str] = []
        for where, (name, path) in files.items():
            try:
                sources[where] = source = file_source(path, name, self._notes)
            except UnreadableFileError as error:
                faults.append(str(error))
                continue
            if source.kind == "text" and not _known(PurePosixPath(name)):
                self._plain.add(path)
        if faults:
            more = [f"and {len(faults) - _SHOWN_FAULTS} more such files"] if len(faults) > _SHOWN_FAULTS else []
            raise UserError("\n".join(faults[:_SHOWN_FAULTS] + more))
        return sources

    def _named(self, text: str) -> Iterator[tuple[str, Path]]:
        """Names and paths of the files and saved datasets that an argument stands for."""
        if text.startswith("hf:"):
            found = hub_files(text)
            names = [PurePosixPath(name) for name, _ in found]
            if unknown := sorted({name.suffix or name.name for name in names if not _known(name)}):
                kinds = ", ".join(unknown[:8])
                raise UserError(f"{text} holds data files of other kinds ({kinds}); wanted {READABLE}")
            yield from found
            return
        try:
            for path in self._unprepared(_expand(text, self._output), is_pattern=glob.has_magic(text)):
                if not path.is_dir() or _is_saved_dataset(path):
                    yield str(path), path
                else:
                    yield from ((str(file), file) for file in self._files_below(path.resolve()))
        except OSError as error:
            raise UserError(f"cannot read {error.filename or text}: {error.strerror or error}") from None

    def _unprepared(self, paths: list[Path], *, is_pattern: bool) -> list[Path]:
        """What is no part of a dataset: a pattern finds such by the way, whoever names one means something else."""
        folders = {path.parent for path in paths} if is_pattern else set[Path]()
        prepared = {folder for folder in folders.union(paths) if is_dataset(folder)}
        rest = [path for path in paths if not prepared & {path, path.parent}]
        if prepared and not rest:
            first = min(prepared)
            raise UserError(
                f"{first} is a dataset that data_prep.py made, no text to prepare: --inspect {first} shows it, "
                f"--output {first} --dedup near deletes copies from it, pretrain.py --data.path {first} trains on it"
            )
        self._prepared |= prepared
        return rest

    def _files_below(self, folder: Path) -> list[Path]:
        """Files of known kinds below a folder; hidden ones are ignored, others and links to folders are noted."""
        files: list[Path] = []
        others: list[Path] = []
        for parent, folders, names in os.walk(folder, onerror=_refuse):
            below = [Path(parent, name) for name in sorted(folders) if not name.startswith(".")]
            below = [path for path in below if path != self._output]
            self._prepared.update(path for path in below if is_dataset(path))
            below = [path for path in below if path not in self._prepared]
            self._links.update(path for path in below if path.is_symlink())  # os.walk does not follow them
            folders[:] = [path.name for path in below]
            for path in (Path(parent, name) for name in sorted(names) if not name.startswith(".")):
                (files if _known(path) else others).append(_absolute(path))
        if not files:
            links = ["links to folders"] if any(link.is_relative_to(folder) for link in self._links) else []
            kinds = ", ".join(sorted({path.suffix or "no suffix" for path in others}) + links) or "no files"
            raise UserError(
                f"folder {folder} holds nothing to read ({kinds}); wanted {READABLE}; "
                "name a file itself to read it as plain text"
            )
        self._skipped.update(others)
        return files


def is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8; names and arguments of other encodings cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse(error: OSError) -> None:
    """A folder that cannot be listed would be left out without a word."""
    raise error


def _expand(text: str, output: Path | None) -> list[Path]:
    """Existing resolved paths that an argument stands for."""
    if not text:
        raise UserError("an input is the empty text, perhaps of a variable that is not set")
    path = expanded(text)
    if path.exists():
        return [_absolute(path)]
    if glob.has_magic(text):
        matches = sorted({_absolute(Path(match)) for match in _matches(str(path))})
        matches = [match for match in matches if output is None or not match.is_relative_to(output)]
        found = [match for match in matches if match.is_file() or "**" not in text]
        if found:
            return found
        raise UserError(f"nothing matches {text!r}; {_there(path)}")
    hint = f"; for data of the Hugging Face hub write hf:{text}" if re.fullmatch(r"[\w.-]+/[\w.-]+", text) else ""
    raise UserError(f"no file or folder {text!r}; {_there(path)}{hint}")


def _matches(pattern: str) -> Iterator[str]:
    """As `glob.glob(pattern, recursive=True)`, but `**` visits each real folder once: links may lead back."""
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from glob.glob(pattern)  # noqa: PTH207 - leaves hidden files out
        return
    at = parts.index("**")
    rest = parts[at + 1 :] or ("*",)
    for base in sorted(glob.glob(str(Path(*parts[:at])))):  # noqa: PTH207
        visited: set[tuple[int, int]] = set()
        for parent, folders, _ in os.walk(base, followlinks=True, onerror=_refuse):
            status = os.stat(parent)  # noqa: PTH116 - a path of os.walk
            if (status.st_dev, status.st_ino) in visited:
                folders.clear()
                continue
            visited.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield from _matches(str(Path(glob.escape(parent), *rest)))


def _absolute(path: Path) -> Path:
    """The path with links resolved in its folders but not in its name."""
    return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name


def _there(path: Path) -> str:
    """What exists near a path that does not."""
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    return f"{folder.resolve()} holds {shown or 'nothing'}{nearest(path.name, names)}"


def _known(path: PurePath) -> bool:
    suffixes = path.suffixes
    if suffixes and suffixes[-1].lower() in COMPRESSIONS:
        suffixes = suffixes[:-1]
        return bool(suffixes) and suffixes[-1].lower() in KINDS and suffixes[-1].lower() != ".parquet"
    return bool(suffixes) and suffixes[-1].lower() in KINDS


def _is_saved_dataset(folder: Path) -> bool:
    names = {entry.name for entry in folder.iterdir()}
    return any(marks <= names for marks in _SAVED_DATASET)


def _saved_source(folder: Path) -> Source:
    dataset = load_saved(str(folder))
    size = int(dataset.data.nbytes) if len(dataset) else 0
    return Source(str(folder), "saved", "", size, str(dataset._fingerprint), rows=len(dataset))
