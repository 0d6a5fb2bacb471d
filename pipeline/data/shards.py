"""The on-disk format: shards of token ids, written once, read through memory maps.

In: flat token ids and one record per document. Out: `NAME.bin`, `NAME.idx` (Megatron's indexed dataset) and
`NAME.docs.npy`; and the other way round, a `Shard`. Reading writes nothing, takes no lock and loads no whole file.

The index follows `megatron/core/datasets/indexed_dataset.py` of NVIDIA/Megatron-LM; see docs/data_format.md.
"""

from __future__ import annotations

import io
import mmap
import os
import resource
import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import xxhash

from pipeline.data.manifest import BitmapKind, FileInfo, ShardInfo
from pipeline.errors import UserError
from pipeline.files import fsync_folder, write_durably
from pipeline.untrusted import check_regular, shown

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, length of the document index
FILES_PER_SHARD, OTHER_FILES = 4, 256
REMEDY = "copy the dataset or run data_prep.py again"
_BLOCK = 2**22  # sequences looked at together
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
        self.n_tokens = 0
        self._checksum = xxhash.xxh3_128()
        # a second writer of the same shard (on a cluster, one given up for dead too early) has other temporaries
        self._writer = "." + token_hex(4)
        self._temporary = folder / f"{name}.bin{self._writer}.tmp"
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
        lowest, highest = (int(ids.min()) if ids.dtype.kind == "i" else 0, int(ids.max())) if len(ids) else (0, 0)
        if lowest < 0 or highest >= self.vocab_size:
            found = highest if highest >= self.vocab_size else lowest
            raise UserError(
                f"{self.name}: token id {found} is outside the vocabulary of {self.vocab_size}; "
                "the tokenizer contradicts itself, use another file"
            )
        content = np.ascontiguousarray(ids, self.dtype)
        self._file.write(content.data)
        self._checksum.update(content.data)
        self._lengths.append(lengths.astype(np.int32))
        self._documents.append(documents.astype(DOCUMENT_DTYPE))
        self.n_tokens += len(ids)

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
            f"{self.name}.bin": FileInfo(size=self.n_tokens * self.dtype.itemsize, checksum=self._checksum.hexdigest()),
            f"{self.name}.idx": describe_content(index),
            f"{self.name}.docs.npy": describe_content(stream.getvalue()),
        }
        self._temporary.replace(self.folder / f"{self.name}.bin")
        write_durably(self.folder / f"{self.name}.docs.npy", stream.getvalue(), writer=self._writer)
        # the commit point: no index, no shard
        write_durably(self.folder / f"{self.name}.idx", index, writer=self._writer)
        fsync_folder(self.folder)
        return ShardInfo(
            name=self.name,
            documents=len(lengths),
            tokens=self.n_tokens,
            text_bytes=int(documents["text_bytes"].sum()),
            files=files,
        )


def describe_content(content: bytes) -> FileInfo:
    """The manifest's entry for a file of this content."""
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
    """One shard under memory maps, opened when first touched. Documents and tokens count from 0 within it."""

    def __init__(self, folder: Path, info: ShardInfo, *, dtype: np.dtype[Any], inputs: Sequence[str]) -> None:
        self.folder, self.info, self.dtype = folder, info, dtype
        self.n_documents, self.n_tokens = info.documents, info.tokens
        self._inputs = inputs

    def check(self) -> None:
        """Compare file sizes with the manifest and read the index header; `UserError` names file and numbers."""
        for name, wanted in self.info.files.items():
            path = self.folder / name
            try:
                found = check_regular(path)
            except FileNotFoundError:
                found = None
            if found != wanted.size:
                state = "is missing" if found is None else f"has {found} bytes"
                raise UserError(f"{path} {state}, expected {wanted.size}; {REMEDY}")
        path = self._path(".idx")
        with path.open("rb") as file:
            head = file.read(HEADER.size)
        wanted_head = HEADER.pack(MAGIC, 1, DTYPE_CODES[self.dtype.name], self.n_documents, self.n_documents + 1)
        if head != wanted_head:
            raise UserError(f"{path}: bad header, expected {wanted_head!r}, found {head!r}; run data_prep.py again")

    @property
    def path(self) -> Path:
        """The file of its ids."""
        return self._path(".bin")

    @cached_property
    def tokens(self) -> Tokens:
        """(tokens,) ids in the stored dtype, a view of the map. They may be outside the vocabulary: see `outside`."""
        return np.frombuffer(self._map(".bin", self.n_tokens * self.dtype.itemsize, shuffled=True), self.dtype)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int32]:
        """(documents,) tokens of each document."""
        return np.frombuffer(self._index, "<i4", count=self.n_documents, offset=HEADER.size)

    @cached_property
    def pointers(self) -> Integers:
        """(documents,) first byte of each document in `.bin`, ascending."""
        return np.frombuffer(self._index, "<i8", count=self.n_documents, offset=HEADER.size + 4 * self.n_documents)

    @cached_property
    def sequence_numbers(self) -> Integers:
        """(documents + 1,) the first sequence of each document, and their number; each document is one sequence."""
        return np.frombuffer(self._index, "<i8", offset=HEADER.size + 12 * self.n_documents)

    @cached_property
    def documents(self) -> npt.NDArray[Any]:
        """(documents,) records of `DOCUMENT_DTYPE`."""
        return load_array(self._path(".docs.npy"), dtype=DOCUMENT_DTYPE, shape=(self.n_documents,))

    @cached_property
    def keep(self) -> npt.NDArray[np.bool_] | None:
        """(documents,) which ones are part of the dataset; None: all. A bitmap beside the shard says so."""
        return self.bitmap("keep")

    def bitmap(self, kind: BitmapKind) -> npt.NDArray[np.bool_] | None:
        """(documents,) which ones stay, for one reason to delete (or all, `keep`); None: all of them."""
        name = self.info.bitmap(kind)
        if name is None:
            return None
        packed = load_array(self.folder / name, dtype=np.dtype(np.uint8), shape=(-(-self.n_documents // 8),))
        return np.unpackbits(packed, count=self.n_documents).view(np.bool_)

    def starts(self, first: int, stop: int) -> Integers:
        """(stop - first,) first token of each document in [first, stop)."""
        return self.pointers[first:stop] // self.dtype.itemsize

    def document_at(self, token: int) -> int:
        """The document that holds `token`. O(log documents)."""
        # The format puts the pointers at an odd address, and np.searchsorted would copy them all to align them.
        return bisect_right(self.pointers, token * self.dtype.itemsize) - 1

    def describe(self, document: int) -> DocumentInfo:
        """Where a document came from and how long it is."""
        record = self.documents[document]
        if not 0 <= record["source"] < len(self._inputs):
            raise UserError(
                f"{self._path('.docs.npy')} is damaged: document {document} is of input {record['source']}, the "
                f"manifest has {len(self._inputs)}; {REMEDY}"
            )
        earlier = self.info.continues if record["source"] == self.documents[0]["source"] else 0
        return DocumentInfo(
            source=self._inputs[int(record["source"])],
            row=int(record["row"]) + earlier,
            tokens=int(self.lengths[document]),
            text_bytes=int(record["text_bytes"]),
        )

    @cached_property
    def _index(self) -> mmap.mmap | bytes:
        """The index, in which documents lie end to end: lengths and pointers are proven when first asked for."""
        n = self.n_documents
        content = self._map(".idx", HEADER.size + 12 * n + 8 * (n + 1))
        lengths = np.frombuffer(content, "<i4", count=n, offset=HEADER.size)
        pointers = np.frombuffer(content, "<i8", count=n, offset=HEADER.size + 4 * n)
        size = self.n_tokens * self.dtype.itemsize
        check_sequences(self._path(".idx"), lengths, pointers, itemsize=self.dtype.itemsize, size=size)
        return content

    def _map(self, suffix: str, size: int, *, shuffled: bool = False) -> mmap.mmap | bytes:
        content = map_file(self._path(suffix), shuffled=shuffled)
        if len(content) != size:
            raise UserError(f"{self._path(suffix)} has {len(content)} bytes, expected {size}; {REMEDY}")
        return content

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self.info.name}{suffix}"


def keep_bytes(keep: npt.NDArray[np.bool_]) -> bytes:
    """The content of the file of a bitmap (documents,): bits in order, the first one highest in its byte."""
    stream = io.BytesIO()
    np.save(stream, np.packbits(keep), allow_pickle=False)
    return stream.getvalue()


def load_array(path: Path, *, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """A `.npy` file under a map. Raises `UserError` for one that does not hold just this."""
    try:
        check_regular(path)
        found: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # its header is Python code: what is wrong there raises whatever its parser does
        raise UserError(f"{path} is damaged: {shown(str(error))}; {REMEDY}") from None
    if found.dtype != dtype or found.shape != shape:
        raise UserError(
            f"{path} is damaged: expected {dtype} {shape}, found {shown(found.dtype)} {shown(found.shape)}; {REMEDY}"
        )
    return found


def check_sequences(
    path: Path, all_lengths: npt.NDArray[np.int32], pointers: Integers, *, itemsize: int, size: int
) -> None:
    """Prove that sequences lie end to end in `size` bytes of ids. Raises `UserError`, naming the first that does not.

    all_lengths (n,): tokens of each; pointers (n,): its first byte; `path`: the index that says so.
    """
    expected = 0
    for first in range(0, len(all_lengths), _BLOCK):
        lengths = all_lengths[first : first + _BLOCK].astype(np.int64)
        if int(lengths.min()) < 0:
            number = first + int(lengths.argmin())
            raise UserError(f"{path} is damaged: sequence {number} has {lengths.min()} tokens; {REMEDY}")
        ends = expected + np.cumsum(lengths) * itemsize
        starts = ends - lengths * itemsize
        elsewhere = np.flatnonzero(starts != pointers[first : first + _BLOCK])
        if len(elsewhere):
            number = int(elsewhere[0])
            raise UserError(
                f"{path}: sequence {first + number} begins at byte {pointers[first + number]}, expected "
                f"{starts[number]}, where the one before ends; sequences out of order are not read, "
                "copy the file again or merge the dataset anew"
            )
        expected = int(ends[-1])
        if expected > size:  # also keeps the sums of a damaged index from overflowing
            break
    if expected != size:
        more = " or more" if expected > size else ""
        raise UserError(f"{path.with_suffix('.bin')} has {size} bytes, its index expects {expected}{more}; {REMEDY}")


def outside(ids: Tokens, vocab_size: int) -> int | None:
    """Place of the first of `ids` (n,) outside the vocabulary; None: there is none. Costs a hundredth of reading."""
    if not len(ids) or (int(ids.max()) < vocab_size and int(ids.min()) >= 0):
        return None
    return int(np.flatnonzero((ids >= vocab_size) | (ids < 0))[0])


def map_file(path: Path, *, shuffled: bool = False) -> mmap.mmap | bytes:
    """The file's bytes without reading them; an empty file cannot be mapped and is simply empty.

    `shuffled`: it will be read here and there, so that reading ahead would be in vain.
    """
    if path.stat().st_size == 0:
        return b""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if shuffled and hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    return mapped


def allow_open_files(shards: int) -> None:
    """Raise the soft limit of open files, usually 1,024, to what so many shards need: a map keeps its file open.

    Raises `UserError` when the system does not allow as many.
    """
    needed = FILES_PER_SHARD * shards + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(f"{shards} shards need {needed} open files, the system allows {hard}; raise `ulimit -Hn`")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
