"""Files of token ids that other tools wrote: found, recognised, checked, and read in place.

In: a path, a folder or a glob. Out: `TokenFile`s in order, which know where their ids lie and, once asked, where
documents begin. Three formats are told apart by what the files say themselves: Megatron's indexed datasets (an `.idx`
beside the `.bin`), llm.c shards (a header with a magic number), and bare ids as nanoGPT writes them.

The formats follow `megatron/core/datasets/indexed_dataset.py` of NVIDIA/Megatron-LM, `dev/data/data_common.py` of
karpathy/llm.c and `data/openwebtext/prepare.py` of karpathy/nanoGPT; see docs/data_format.md.
"""

from __future__ import annotations

import glob
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.data.manifest import MANIFEST_NAME
from pipeline.data.shards import HEADER, MAGIC, check_sequences, map_file
from pipeline.errors import UserError, nearest
from pipeline.files import expanded

DtypeName = Literal["uint16", "int32", "uint32"]
Tokens = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]

LLMC_HEADER_INTS = 256
LLMC_DTYPES: dict[tuple[int, int], np.dtype[Any]] = {  # by magic number and version
    (20240520, 1): np.dtype("<u2"),  # vocabularies of up to 65,536, such as GPT-2's
    (20240801, 7): np.dtype("<u4"),  # larger ones, such as Llama 3's
}
LLMC_EVALUATION = 20240522  # multiple-choice questions, not text
MEGATRON_DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name) for code, name in ((1, "<u1"), (2, "<i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2"))
}
_NUMPY_MAGIC = b"\x93NUMPY"
_BLOCK = 2**22  # ids or index entries looked at together
_LONGEST = 2**31 - 1  # lengths of documents are int32


class MegatronIndex:
    """`PREFIX.idx` under a map, proven to describe `size` bytes of ids that lie end to end."""

    def __init__(self, path: Path, *, size: int) -> None:
        self.path = path
        self.content: mmap.mmap | bytes = map_file(path)
        self.dtype, sequences, entries = self._header()
        self.lengths = np.frombuffer(self.content, "<i4", count=sequences, offset=HEADER.size)
        self.pointers = np.frombuffer(self.content, "<i8", count=sequences, offset=HEADER.size + 4 * sequences)
        self.documents = np.frombuffer(self.content, "<i8", count=entries, offset=HEADER.size + 12 * sequences)
        check_sequences(path, self.lengths, self.pointers, itemsize=self.dtype.itemsize, size=size)
        self._check_documents()

    def edges(self, documents: Integers) -> Integers:
        """First token of each of these documents, (n,); document number `len(self.documents) - 1` is the end."""
        sequences = self.documents[documents]
        end = int(self.pointers[-1]) // self.dtype.itemsize + int(self.lengths[-1])
        inside = self.pointers[np.minimum(sequences, len(self.pointers) - 1)] // self.dtype.itemsize
        return np.where(sequences < len(self.pointers), inside, end)

    def _header(self) -> tuple[np.dtype[Any], int, int]:
        size = len(self.content)
        if size < HEADER.size or self.content[: len(MAGIC)] != MAGIC:
            raise UserError(f"{self.path} is not a Megatron index: expected {MAGIC!r}, found {self.content[:9]!r}")
        _, version, code, sequences, entries = HEADER.unpack_from(self.content)
        if version != 1:
            raise UserError(f"{self.path}: version {version} found, this program reads 1")
        if code not in MEGATRON_DTYPES:
            known = ", ".join(f"{number} {dtype.name}" for number, dtype in MEGATRON_DTYPES.items())
            raise UserError(f"{self.path}: type {code} found, token ids are one of {known}")
        expected = HEADER.size + 12 * sequences + 8 * entries
        if size == expected + sequences > expected:
            raise UserError(f"{self.path} is of a multimodal dataset (its sequences have modes); only text is read")
        if size != expected:
            raise UserError(
                f"{self.path} has {size} bytes, expected {expected} for {sequences} sequences and {entries} entries of "
                "documents; copy it again"
            )
        if sequences == 0:
            raise UserError(f"{self.path} holds no documents")
        return MEGATRON_DTYPES[code], sequences, entries

    def _check_documents(self) -> None:
        n = len(self.lengths)
        blocks = (self.documents[first : first + _BLOCK + 1] for first in range(0, len(self.documents), _BLOCK))
        rises = all(bool((block[1:] >= block[:-1]).all()) for block in blocks)  # differences could overflow
        if len(self.documents) < 2 or self.documents[0] != 0 or self.documents[-1] != n or not rises:
            found = f"{self.documents[0]} to {self.documents[-1]}" if len(self.documents) else "nothing"
            raise UserError(
                f"{self.path} is damaged: its index of documents runs from {found}, expected 0 to {n} without a step "
                "back; copy it again"
            )


@dataclass(frozen=True, eq=False)
class TokenFile:
    """Ids in a file: `n_tokens` of `dtype` from byte `offset` on. Documents end with `eos_id` where no index says."""

    path: Path
    dtype: np.dtype[Any]
    offset: int
    n_tokens: int
    eos_id: int
    index: MegatronIndex | None = None

    @cached_property
    def ids(self) -> Tokens:
        """(tokens,) a view of the map; uint32 is seen as int32, as ids never reach 2^31 and frameworks know int32."""
        content = map_file(self.path, shuffled=True)
        return np.frombuffer(content, self.seen_dtype, count=self.n_tokens, offset=self.offset)

    @property
    def bare(self) -> bool:
        """Whether the file does not say of which type its ids are."""
        return self.index is None and self.offset == 0

    @property
    def seen_dtype(self) -> np.dtype[Any]:
        """The type of `ids`."""
        return np.dtype("<i4") if self.dtype == np.dtype("<u4") else self.dtype

    def read(self, start: int, stop: int) -> Tokens:
        """Ids [start, stop) in the stored type, read ahead of need: for looking through a file in order."""
        where = self.offset + start * self.dtype.itemsize
        found = np.fromfile(self.path, self.dtype, count=stop - start, offset=where)
        if len(found) != stop - start:
            raise UserError(f"{self.path} has become shorter while it was read; copy it again")
        return found

    def blocks(self, start: int, stop: int) -> Iterator[tuple[int, Tokens]]:
        """(first token, ids) of [start, stop) in bounded pieces."""
        for first in range(start, stop, _BLOCK):
            yield first, self.read(first, min(first + _BLOCK, stop))

    @cached_property
    def edges(self) -> Integers:
        """(documents + 1,) first token of each document that has any, and the end. Without an index the file is read.

        Raises `UserError` for a document of 2^31 tokens or more.
        """
        if self.index is None:
            ends = [first + 1 + np.flatnonzero(block == self.eos_id) for first, block in self.blocks(0, self.n_tokens)]
            edges = np.concatenate([[0], *ends]).astype(np.int64)
            edges = edges if edges[-1] == self.n_tokens else np.append(edges, self.n_tokens)
        else:
            edges = self._indexed if self._held is None else self._indexed[self._held]
        lengths = np.diff(edges)
        if int(lengths.max()) > _LONGEST:
            raise UserError(
                f"{self.path}: document {int(lengths.argmax())} has {int(lengths.max()):,} tokens, the most is "
                f"{_LONGEST:,}; if {self.eos_id} is not the id that ends documents there, name its token: eos"
            )
        return edges

    @cached_property
    def _indexed(self) -> Integers:
        """(documents + 1,) first token of each document of the index, and the end."""
        assert self.index is not None, "only Megatron's datasets have an index"
        return self.index.edges(np.arange(len(self.index.documents)))

    @cached_property
    def _held(self) -> Integers | None:
        """Which documents of the index hold tokens, and the end; empty texts become documents of none. None: all."""
        if self.index is None:
            return None
        held = np.append(np.diff(self._indexed) > 0, True)
        return None if held.all() else np.flatnonzero(held)

    def row(self, document: int) -> int:
        """Number in the file of a document that holds tokens: those without any are counted."""
        return document if self._held is None else int(self._held[document])

    def document_ends(self, count: int) -> Tokens | None:
        """The last id of up to `count` documents spread evenly over the file; None: no index, so all end with EOS."""
        if self.index is None:
            return None
        total = len(self.index.documents) - 1
        chosen = np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64))
        starts, ends = self.index.edges(chosen), self.index.edges(chosen + 1)
        return self.ids[ends[ends > starts] - 1]


def find_files(path: str, *, key: str) -> list[Path]:
    """The `.bin` files that a path, a Megatron prefix or a glob stands for, in sorted order.

    `key` is the option that the path came from, to be named in errors.
    """
    given = expanded(path)
    if given.is_file() or _beside(given, ".idx").exists() or _beside(given, ".bin").exists():
        return [_bin_of(given)]
    if given.is_dir():
        raise UserError(f"{key}: {given} is a folder; {_in_folder(given)}")
    if glob.has_magic(path):
        matches = glob.glob(str(given), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        found = sorted({_bin_of(Path(match)) for match in matches if Path(match).is_file()})
        if found:
            return found
        raise UserError(f"{key}: no file matches {path!r}")
    names = sorted(entry.name for entry in given.parent.iterdir()) if given.parent.is_dir() else []
    raise UserError(f"{key}: no file {given}, nor {given}.bin with {given}.idx{nearest(given.name, names)}")


def _in_folder(folder: Path) -> str:
    """What to write instead of a folder that is not to be trained on as it is."""
    if (folder / MANIFEST_NAME).exists():
        return "data_prep.py made it: train on it without naming a tokenizer"
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix == ".bin")
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "none"
    return f"it has no train.bin, so name its files, by a glob if there are several (its .bin files: {shown})"


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix) if path.name else path


def _bin_of(path: Path) -> Path:
    """The file of ids that a prefix, an `.idx` or itself stands for."""
    if path.suffix == ".idx":
        return path.with_suffix(".bin")
    return path if path.is_file() else _beside(path, ".bin")


def is_foreign(path: str) -> bool:
    """Whether a path is one that only data of other tools has: a file or prefix, a glob, or nanoGPT's folder."""
    given = expanded(path)
    if given.is_dir():
        return (given / "train.bin").is_file() and not (given / MANIFEST_NAME).exists()
    files = (given, _beside(given, ".idx"), _beside(given, ".bin"))
    return glob.has_magic(path) or any(file.is_file() and file.suffix in (".bin", ".idx") for file in files)


def open_file(path: Path, *, dtype: DtypeName | None, eos_id: int) -> TokenFile:
    """Recognise and check one file. Reads headers and an index, no ids.

    Raises `UserError` for what is missing, truncated, damaged, no file of ids, or of another type than `dtype`.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: {path.with_suffix('.idx').name} alone holds no ids; copy both")
    size = path.stat().st_size
    index = path.with_suffix(".idx")
    if path.suffix == ".bin" and index.exists():
        if any(path.parent.glob(f"{glob.escape(path.stem)}.keep*")):  # a bitmap of data_prep.py
            raise UserError(f"{path} belongs to a dataset with deleted documents: give its folder, {path.parent}")
        found = MegatronIndex(index, size=size)
        _check_dtype(index, found.dtype, wanted=dtype)
        return _not_empty(TokenFile(path, found.dtype, 0, size // found.dtype.itemsize, eos_id, found))
    with path.open("rb") as file:
        head = file.read(4 * LLMC_HEADER_INTS)
    if head.startswith(_NUMPY_MAGIC):
        raise UserError(f"{path} is a NumPy file; write its ids bare: np.load(NAME).tofile(NEW)")
    numbers = np.frombuffer(head[:12].ljust(12, b"\0"), "<i4").tolist()
    if numbers[0] in {magic for magic, _ in LLMC_DTYPES} | {LLMC_EVALUATION}:
        return _not_empty(_llmc_file(path, numbers, size=size, wanted=dtype, eos_id=eos_id))
    return _not_empty(_bare_file(path, size=size, wanted=dtype, eos_id=eos_id))


def _llmc_file(path: Path, header: list[int], *, size: int, wanted: DtypeName | None, eos_id: int) -> TokenFile:
    magic, version, tokens = header
    if magic == LLMC_EVALUATION:
        raise UserError(f"{path} holds questions of an evaluation (llm.c, {magic}), not text to train on")
    if (magic, version) not in LLMC_DTYPES:
        known = ", ".join(f"{m} version {v}" for m, v in LLMC_DTYPES)
        raise UserError(f"{path}: llm.c header {magic} version {version} found, this program reads {known}")
    dtype = LLMC_DTYPES[magic, version]
    _check_dtype(path, dtype, wanted=wanted)
    expected = 4 * LLMC_HEADER_INTS + tokens * dtype.itemsize
    if tokens < 0 or size != expected:
        raise UserError(f"{path} has {size} bytes, its header of {tokens} tokens expects {expected}; copy it again")
    return TokenFile(path, dtype, 4 * LLMC_HEADER_INTS, tokens, eos_id)


def _bare_file(path: Path, *, size: int, wanted: DtypeName | None, eos_id: int) -> TokenFile:
    if wanted is None:
        raise UserError(
            f"{path} holds bare ids and does not say of which type: set dtype to uint16 (nanoGPT), int32 or uint32"
        )
    dtype = np.dtype(wanted).newbyteorder("<")
    if size % dtype.itemsize:
        raise UserError(
            f"{path} has {size} bytes, expected a multiple of {dtype.itemsize} for {wanted}: it is truncated, or dtype "
            "is another"
        )
    return TokenFile(path, dtype, 0, size // dtype.itemsize, eos_id)


def _check_dtype(path: Path, found: np.dtype[Any], *, wanted: DtypeName | None) -> None:
    if wanted is not None and found.name != wanted:
        raise UserError(f"{path} says that its ids are {found.name}, dtype says {wanted}; leave dtype out")


def _not_empty(file: TokenFile) -> TokenFile:
    if file.n_tokens == 0:
        raise UserError(f"{file.path} holds no tokens; leave it out")
    return file
