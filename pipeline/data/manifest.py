"""What a prepared dataset says about itself: `manifest.json`, written last.

In: the folder of a dataset. Out: a typed `Manifest`, or a `UserError` when the folder is not a
complete dataset of this format. A folder without a manifest is unfinished, whatever else it holds.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import UserError, nearest
from pipeline.files import fsync_folder, write_durably
from pipeline.untrusted import DamagedFileError, FileName, Natural, Object, fault_of, read_json, shown

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
_BEGUN = ("ledger*.jsonl*", "train-*.bin")  # of a kill during the first write too
_CHECKPOINT_MARK = "state.json"
_SAMPLE = "python sample.py {} writes text with it"
_OTHERS = (
    ({_CHECKPOINT_MARK, "config.yaml"}, f"a checkpoint of pretrain.py: {_SAMPLE}"),
    ({_CHECKPOINT_MARK, "dataset_info.json"}, "text of save_to_disk: python data_prep.py {} --output DIR prepares it"),
    ({"config.yaml", "environment.json"}, f"a run folder of pretrain.py: config.yaml names its datasets, {_SAMPLE}"),
    ({"config.json", "model.safetensors"}, f"a Hugging Face model: {_SAMPLE}"),
    ({"train.bin"}, "data of another tool: pretrain.py trains on it if data.tokenizer names what made it"),
)
"""Folders that are taken for datasets, by names in them; what they are."""
BitmapKind = Literal["keep", "duplicates", "contaminated"]
SplitName = Literal["train", "val"]
SPLITS: tuple[SplitName, ...] = ("train", "val")
SUFFIXES = (".bin", ".idx", ".docs.npy")


_BITMAP = re.compile(rf"\.({'|'.join(get_args(BitmapKind))})-[0-9a-f]+\.npy")


class DamagedManifestError(UserError):
    """There is a file, but it is no manifest; the preparation writes it anew."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileInfo(_Record):
    """One file of a shard: its size in bytes and the xxh3_128 of its content in hexadecimal."""

    size: Natural
    checksum: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class Counts(_Record):
    """How much of a shard or a split: documents, their tokens with EOS, the bytes of their text."""

    documents: Natural = 0
    tokens: Natural = 0
    text_bytes: Natural = 0


class ShardInfo(_Record):
    """One shard, `NAME.bin`, `NAME.idx` and `NAME.docs.npy`; `files` is keyed by file name.

    `deleted` is what of `documents`, `tokens` and `text_bytes` the bitmap `keep`, where there is one,
    takes out of the dataset. `continues` are the rows of the first document's source that earlier units hold.
    """

    name: FileName
    documents: Annotated[Natural, Field(gt=0)]
    tokens: Natural
    text_bytes: Natural
    files: dict[FileName, FileInfo]
    deleted: Counts = Counts()
    continues: Natural = 0

    @model_validator(mode="after")
    def _files_are_its_own(self) -> Self:
        """Whatever is done to the files of a shard is done to no other file."""
        wanted = {f"{self.name}{suffix}" for suffix in SUFFIXES}
        others = [name for name in self.files.keys() - wanted if not self._is_bitmap(name)]
        if others or not wanted <= self.files.keys():
            raise ValueError(
                f"shard {shown(self.name)} has the files {', '.join(sorted(wanted))} and perhaps bitmaps, "
                f"got {', '.join(map(shown, self.files))}"
            )
        return self

    def _is_bitmap(self, name: str) -> bool:
        return name.startswith(self.name) and _BITMAP.fullmatch(name, len(self.name)) is not None

    def file(self, suffix: str) -> FileInfo:
        """The entry of `NAME<suffix>`; suffixes are `.bin`, `.idx`, `.docs.npy`."""
        return self.files[self.name + suffix]

    def bitmap(self, kind: BitmapKind) -> str | None:
        """The file `NAME.<kind>-<digest of its content>.npy`, where there is one."""
        return next((name for name in self.files if name.startswith(f"{self.name}.{kind}-")), None)


class InputInfo(_Record):
    """One source of documents. `fingerprint` changes when its content does (size and mtime of a file)."""

    name: str
    kind: str
    size: int
    fingerprint: str


class FailedUnit(_Record):
    """A part of the input that could not be read, and was done without by `--allow-failed`."""

    unit: str
    reason: str


class Deduplication(_Record):
    """How documents were deleted: equal texts (`exact`), or also of a Jaccard similarity of at least `threshold`."""

    method: Literal["exact", "near"]
    threshold: float | None
    exact: Counts
    near: Counts


class Contamination(_Record):
    """Training documents that share an n-gram of `ngram` words with an evaluation file, per file."""

    ngram: int
    files: dict[str, int]
    documents: int
    deleted: bool


class Manifest(_Record):
    """All that is known of a dataset; `docs/data_format.md` describes each key."""

    format_version: int
    dtype: Literal["uint16", "int32"]
    vocab_size: Annotated[Natural, Field(gt=0, lt=2**31)]
    eos_id: Natural
    tokenizer_fingerprint: str
    data_digest: str
    split_rule: str
    splits: dict[SplitName, tuple[ShardInfo, ...]]
    records: Natural
    drops: dict[str, Natural]
    noticed: dict[str, Natural]
    failed: tuple[FailedUnit, ...] = ()
    deduplication: Deduplication | None = None
    contamination: Contamination | None = None
    settings: dict[str, Any]
    inputs: tuple[InputInfo, ...]

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [shard.name for shards in self.splits.values() for shard in shards]
        if len(set(names)) < len(names):
            raise ValueError("expected shards of different names, got one twice")
        if self.eos_id >= self.vocab_size:
            raise ValueError(f"eos_id {self.eos_id} is outside the vocabulary of {self.vocab_size}")
        return self

    def total(self, split: SplitName, what: Literal["documents", "tokens", "text_bytes"]) -> int:
        """Sum of one count over the shards of a split, without what is deleted."""
        return sum(getattr(shard, what) - getattr(shard.deleted, what) for shard in self.splits.get(split, ()))


def canonical_json(value: Any) -> bytes:
    """One spelling per value: sorted keys, no blanks, ASCII. What digests are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def digest_of(value: Any) -> str:
    """SHA-256 (hexadecimal) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def data_digest(splits: Mapping[SplitName, Sequence[ShardInfo]], *, tokenizer_fingerprint: str, dtype: str) -> str:
    """Identity of the token streams: which ids in which order, and what they mean.

    Names, folders and dates do not enter, so a copied dataset keeps its digest.
    """
    tokens = {split: [shard.file(".bin").checksum for shard in splits.get(split, ())] for split in SPLITS}
    lengths = {split: [shard.file(".idx").checksum for shard in splits.get(split, ())] for split in SPLITS}
    kept = {split: [_kept(shard) for shard in splits.get(split, ())] for split in SPLITS}
    return digest_of({"bin": tokens, "idx": lengths, "keep": kept, "tokenizer": tokenizer_fingerprint, "dtype": dtype})


def _kept(shard: ShardInfo) -> str | None:
    bitmap = shard.bitmap("keep")
    return shard.files[bitmap].checksum if bitmap else None


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a dataset.

    Raises `UserError` for a missing folder, something else than a dataset, an unfinished one, another format version
    or a damaged file.
    """
    path = folder / MANIFEST_NAME
    if not path.exists() or (folder / _CHECKPOINT_MARK).exists():  # checkpoints have a manifest of their own
        raise _no_dataset(folder)
    try:
        values = read_json(Object, path)
    except (OSError, DamagedFileError) as error:
        raise DamagedManifestError(
            f"{path} is not a manifest of data_prep.py ({error}); run data_prep.py again"
        ) from None
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {shown(version)} found, this program reads {FORMAT_VERSION}; "
            "prepare the data again or use the version of this program that made it"
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        raise DamagedManifestError(f"{path} is damaged at {fault_of(error)}; run data_prep.py again") from None


def is_dataset(folder: Path) -> bool:
    """Whether a folder is a dataset of this program, finished or not, by the files in it."""
    if not (folder / TOKENIZER_NAME).is_file() or (folder / _CHECKPOINT_MARK).exists():
        return False
    return (folder / MANIFEST_NAME).is_file() or _is_begun(folder)


def _is_begun(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in _BEGUN)


def _no_dataset(path: Path) -> UserError:
    """What is there instead of a complete dataset, and what is to be done with it."""
    if path.is_file():
        if (path.parent / MANIFEST_NAME).exists():
            return UserError(f"{path} is one file of a dataset; name its folder, {path.parent}")
        return UserError(
            f"{path} is a file, wanted the folder of a dataset: python data_prep.py {path} --output DIR makes one of it"
        )
    if not path.is_dir():
        beside = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
        hint = nearest(path.name, [one.name for one in beside if is_dataset(one)], cutoff=0.7)
        remedy = hint or f"; python data_prep.py INPUT... --output {path} makes one"
        return UserError(f"no dataset folder {path}{remedy}")
    names = {entry.name for entry in path.iterdir()}
    for marks, what in _OTHERS:
        if marks <= names:
            return UserError(f"{path} is {what.format(path)}; wanted the folder of a dataset of data_prep.py")
    if _is_begun(path):
        return UserError(
            f"{path} is not complete: it has no {MANIFEST_NAME}; run the command of data_prep.py that began it again "
            "to finish it"
        )
    return UserError(
        f"{path} is no dataset: it has neither a {MANIFEST_NAME} nor shards; wanted the folder of a dataset of "
        "data_prep.py"
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the mark of completeness, durably and all at once."""
    write_durably(folder / MANIFEST_NAME, json.dumps(manifest.model_dump(), indent=1).encode() + b"\n")
    fsync_folder(folder)
