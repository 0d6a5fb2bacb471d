"""The on-disk format: shards of token ids, written once, read through memory maps.

In: flat token ids and one record per document. Out: `NAME.bin`, `NAME.idx` (Megatron's indexed dataset),
`NAME.docs.npy`; and the other way round, a `Dataset` whose splits are streams of tokens that know
their documents. Reading writes nothing, takes no lock and loads no whole file.

The index follows `megatron/core/datasets/indexed_dataset.py` of NVIDIA/Megatron-LM; see docs/data_format.md.
"""

from __future__ import annotations

import io
import mmap
import os
import struct
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.data.manifest import TOKENIZER_NAME, FileInfo, Manifest, ShardInfo, SplitName, read_manifest
from pipeline.errors import UserError
from pipeline.files import fsync_folder, write_durably

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, length of the document index
DTYPE_CODES = {"uint16": 8, "int32": 4}
DOCUMENT_DTYPE = np.dtype([("text_bytes", "<i8"), ("source", "<i4"), ("row", "<i8"), ("hash", "<u8", (2,))])

Tokens = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The stored type of a vocabulary's ids: little-endian uint16 while it fits, else int32."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<i4")


class ShardWriter:
    """Writes one shard under temporary names; `commit` renames it into place, leaving the block drops it."""

    def __init__(self, folder: Path, name: str, *, vocab_size: int) -> None:
        self.folder, self.name, self.vocab_size = folder, name, vocab_size
        self.dtype = token_dtype(vocab_size)
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._documents: list[npt.NDArray[Any]] = []
        self._tokens = 0
        self._checksum = xxhash.xxh3_128()
        self._temporary = folder / f"{name}.bin.tmp"
        self._file = self._temporary.open("wb")

    def __enter__(self) -> Self:
        """Begin the block that ends with `commit`."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Drop what was not committed."""
        try:
            self._file.close()
        finally:
            self._temporary.unlink(missing_ok=True)  # gone already when committed

    def append(self, ids: Tokens, *, lengths: npt.NDArray[Any], documents: npt.NDArray[Any]) -> None:
        """Add documents: `ids` (tokens,) of all of them end to end, `lengths` (n,), `documents` (n,) records."""
        assert len(lengths) == len(documents), f"{len(lengths)} lengths for {len(documents)} documents"
        assert int(lengths.sum()) == len(ids), f"lengths sum to {int(lengths.sum())}, got {len(ids)} ids"
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size):
            found = int(ids.max()) if int(ids.max()) >= self.vocab_size else int(ids.min())
            raise UserError(
                f"{self.name}: token id {found} is outside the vocabulary of {self.vocab_size}; "
                "the tokenizer contradicts itself, use another file"
            )
        content = ids.astype(self.dtype).tobytes()
        self._file.write(content)
        self._checksum.update(content)
        self._lengths.append(lengths.astype(np.int32))
        self._documents.append(documents.astype(DOCUMENT_DTYPE))
        self._tokens += len(ids)

    def commit(self) -> ShardInfo | None:
        """Make the shard durable under its final names; a shard without documents is not written (None)."""
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, np.int32)
        if not len(lengths):
            return None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        stream = io.BytesIO()
        documents = np.concatenate(self._documents)
        np.save(stream, documents, allow_pickle=False)
        index = _index_bytes(lengths, self.dtype)
        files = {
            f"{self.name}.bin": FileInfo(size=self._tokens * self.dtype.itemsize, checksum=self._checksum.hexdigest()),
            f"{self.name}.idx": _describe(index),
            f"{self.name}.docs.npy": _describe(stream.getvalue()),
        }
        self._temporary.replace(self.folder / f"{self.name}.bin")
        write_durably(self.folder / f"{self.name}.docs.npy", stream.getvalue())
        write_durably(self.folder / f"{self.name}.idx", index)  # the commit point: no index, no shard
        fsync_folder(self.folder)
        return ShardInfo(
            name=self.name,
            documents=len(lengths),
            tokens=self._tokens,
            text_bytes=int(documents["text_bytes"].sum()),
            files=files,
        )


def _describe(content: bytes) -> FileInfo:
    return FileInfo(size=len(content), checksum=xxhash.xxh3_128_hexdigest(content))


def _index_bytes(lengths: npt.NDArray[np.int32], dtype: np.dtype[Any]) -> bytes:
    """The index of n sequences, one per document: header, lengths i32, byte pointers i64, document starts i64."""
    n = len(lengths)
    pointers = np.zeros(n, "<i8")
    np.cumsum(lengths[:-1], out=pointers[1:])
    header = HEADER.pack(MAGIC, 1, DTYPE_CODES[dtype.name], n, n + 1)
    starts = np.arange(n + 1, dtype="<i8")
    return header + lengths.astype("<i4").tobytes() + (pointers * dtype.itemsize).tobytes() + starts.tobytes()


@dataclass(frozen=True)
class DocumentInfo:
    """Where a document came from: `source` names an input of the manifest, `row` counts from 0 within it."""

    source: str
    row: int
    tokens: int
    text_bytes: int


class Shard:
    """One shard under memory maps, opened when first touched."""

    def __init__(self, folder: Path, info: ShardInfo, dtype: np.dtype[Any]) -> None:
        self.folder, self.info, self.dtype = folder, info, dtype

    def check(self) -> None:
        """Compare file sizes with the manifest and read the index header; `UserError` names file and numbers."""
        for name, wanted in self.info.files.items():
            path = self.folder / name
            found = path.stat().st_size if path.exists() else None
            if found != wanted.size:
                state = "is missing" if found is None else f"has {found} bytes"
                raise UserError(f"{path} {state}, expected {wanted.size}; copy the dataset or run data_prep.py again")
        path = self._path(".idx")
        with path.open("rb") as file:
            head = file.read(HEADER.size)
        wanted_head = HEADER.pack(MAGIC, 1, DTYPE_CODES[self.dtype.name], self.info.documents, self.info.documents + 1)
        if head != wanted_head:
            raise UserError(f"{path}: bad header, expected {wanted_head!r}, found {head!r}; run data_prep.py again")

    @cached_property
    def tokens(self) -> Tokens:
        """(tokens,) ids in the stored dtype, a view of the map."""
        return np.frombuffer(_map(self._path(".bin")), self.dtype)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int32]:
        """(documents,) tokens of each document."""
        return np.frombuffer(self._index, "<i4", count=self.info.documents, offset=HEADER.size)

    @cached_property
    def pointers(self) -> Integers:
        """(documents,) first byte of each document in `.bin`, ascending."""
        return np.frombuffer(
            self._index, "<i8", count=self.info.documents, offset=HEADER.size + 4 * self.info.documents
        )

    @cached_property
    def documents(self) -> npt.NDArray[Any]:
        """(documents,) records of `DOCUMENT_DTYPE`."""
        records: npt.NDArray[Any] = np.load(self._path(".docs.npy"), mmap_mode="r", allow_pickle=False)
        return records

    @cached_property
    def _index(self) -> mmap.mmap | bytes:
        return _map(self._path(".idx"))

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self.info.name}{suffix}"

    def document_at(self, token: int) -> int:
        """Number of the document that holds `token`, both counted within this shard. O(log documents)."""
        # The format puts the pointers at an odd address, and np.searchsorted would copy them all to align them.
        return bisect_right(self.pointers, token * self.dtype.itemsize) - 1


def _map(path: Path) -> mmap.mmap | bytes:
    """The file's bytes without reading them; an empty file cannot be mapped and is simply empty."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class TokenSplit:
    """One split as one stream of tokens: its documents end to end, over all shards in order."""

    def __init__(self, manifest: Manifest, shards: list[Shard], dtype: np.dtype[Any]) -> None:
        self._manifest, self._shards, self._dtype = manifest, shards, dtype
        self._token_starts = _starts([shard.info.tokens for shard in shards])
        self._document_starts = _starts([shard.info.documents for shard in shards])
        self.n_tokens = int(self._token_starts[-1])
        self.n_documents = int(self._document_starts[-1])
        self.text_bytes = sum(shard.info.text_bytes for shard in shards)

    def tokens(self, start: int, stop: int) -> Tokens:
        """Ids [start, stop) of the stream, (stop - start,) in the stored dtype; a view inside one shard."""
        parts = [shard.tokens[a:b] for shard, _, a, b in self._overlapping(start, stop)]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.zeros(0, self._dtype)

    def document_of(self, start: int, stop: int) -> Integers:
        """Number of the document of each token in [start, stop), (stop - start,). O(documents touched)."""
        parts = []
        for shard, number, a, b in self._overlapping(start, stop):
            first, last = shard.document_at(a), shard.document_at(b - 1)
            inner_starts = shard.pointers[first + 1 : last + 1] // shard.dtype.itemsize
            counts = np.diff(np.concatenate(([a], inner_starts, [b])))
            parts.append(np.repeat(np.arange(first, last + 1) + self._document_starts[number], counts))
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def describe(self, document: int) -> DocumentInfo:
        """Where a document came from and how long it is."""
        if not 0 <= document < self.n_documents:
            raise IndexError(f"document {document} of {self.n_documents}")
        number = int(np.searchsorted(self._document_starts, document, side="right")) - 1
        shard, local = self._shards[number], document - int(self._document_starts[number])
        record = shard.documents[local]
        return DocumentInfo(
            source=self._manifest.inputs[int(record["source"])].name,
            row=int(record["row"]),
            tokens=int(shard.lengths[local]),
            text_bytes=int(record["text_bytes"]),
        )

    def shards(self) -> list[Shard]:
        """The shards in order, for those who read them one by one."""
        return list(self._shards)

    def _overlapping(self, start: int, stop: int) -> list[tuple[Shard, int, int, int]]:
        """(shard, its number, first and last-plus-one token within it) of every shard that [start, stop) touches."""
        self._check_range(start, stop)
        if start == stop:
            return []
        first = int(np.searchsorted(self._token_starts, start, side="right")) - 1
        last = int(np.searchsorted(self._token_starts, stop, side="left"))
        return [
            (
                self._shards[number],
                number,
                max(start - int(self._token_starts[number]), 0),
                min(stop, int(self._token_starts[number + 1])) - int(self._token_starts[number]),
            )
            for number in range(first, last)
        ]

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a split of {self.n_tokens}")


def _starts(counts: list[int]) -> Integers:
    """(n + 1,) running totals, beginning with 0."""
    return np.concatenate(([0], np.cumsum(np.array(counts, np.int64)))).astype(np.int64)


class Dataset:
    """A complete dataset as `data_prep.py` wrote it."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.vocab_size, self.eos_id = manifest.vocab_size, manifest.eos_id
        self.dtype: np.dtype[Any] = np.dtype(manifest.dtype).newbyteorder("<")
        self.tokenizer_path = path / TOKENIZER_NAME
        self.tokenizer_fingerprint = manifest.tokenizer_fingerprint
        self.data_digest = manifest.data_digest
        self._splits: dict[SplitName, TokenSplit] = {}

    def split(self, name: SplitName) -> TokenSplit:
        """The stream of a split; one without shards has no tokens."""
        if name not in self._splits:
            shards = [Shard(self.path, info, self.dtype) for info in self.manifest.splits.get(name, ())]
            self._splits[name] = TokenSplit(self.manifest, shards, self.dtype)
        return self._splits[name]


def open_dataset(path: str | Path) -> Dataset:
    """Open a dataset folder read-only.

    Raises `UserError` for a missing, unfinished, foreign-version, truncated or altered dataset, naming
    the file, what was expected and what was found. Contents are checked by `pipeline.data.audit.verify`.
    """
    folder = Path(path).expanduser()
    dataset = Dataset(folder, read_manifest(folder))
    if not dataset.tokenizer_path.exists():
        raise UserError(f"{dataset.tokenizer_path} is missing; copy it from where the dataset was made")
    for name in dataset.manifest.splits:
        for shard in dataset.split(name).shards():
            shard.check()
    return dataset
