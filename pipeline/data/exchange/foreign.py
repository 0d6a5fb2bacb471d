"""Training on what other tools tokenized, in place: nothing is copied, nothing is written.

In: files of ids (Megatron or NeMo, nanoGPT, llm.c or modded-nanogpt) and the tokenizer that made them. Out: a `Dataset`
like one of data_prep.py. Opening reads headers, indices and a sample of the ids, the others are looked at when they are
trained on; where documents begin in files that do not say is found when first asked, in one pass over them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.dataset import Dataset, TokenSplit
from pipeline.data.exchange.foreign_files import DtypeName, Integers, TokenFile, Tokens, find_files, open_file
from pipeline.data.manifest import SplitName, digest_of
from pipeline.data.shards import DocumentInfo, outside
from pipeline.data.tokenizer import TextTokenizer, load_tokenizer, needs_corpus
from pipeline.errors import UserError
from pipeline.files import expanded

SAMPLES, SAMPLE_BYTES, HEAD_BYTES = 64, 2**20, 2**16
ENDS_LOOKED_AT = 1024
FEWEST_TO_JUDGE = 16  # ids, of which to say that they were written as another type
CUT_SEARCH = 2**20  # tokens in which the end of a document is looked for, to cut the validation split off there
_DECODED_AT_ONCE = 2**16


def open_foreign(
    path: str,
    *,
    tokenizer: str,
    dtype: DtypeName | None = None,
    eos: str | None = None,
    val: str | None = None,
    val_fraction: float | None = None,
) -> Dataset:
    """Open token files of other tools as a dataset, read-only.

    `path`: a Megatron prefix (or its `.bin` or `.idx`), a `.bin` file, a folder with `train.bin` and perhaps `val.bin`,
    or a glob of such files, taken in sorted order. `tokenizer`, `eos`: as for data_prep.py; `eos` ends a document.
    `dtype`: of bare ids, which do not say. `val`: a path like `path`; `val_fraction`: instead, the last fraction of the
    tokens is held out, from the start of a document on where one is near.

    Raises `UserError` for missing, truncated or damaged files, ids outside the vocabulary, contradicting options.
    """
    if needs_corpus(tokenizer):
        raise UserError(
            f"tokenizer {tokenizer!r} is made from a corpus; name the one that made {path}: a tokenizer.json"
        )
    text = load_tokenizer(tokenizer, eos=eos)
    paths = _paths(path, val=val, val_fraction=val_fraction)
    train, held_out = ([open_file(p, dtype=dtype, eos_id=text.eos_id) for p in part] for part in paths)
    looks = [_look(files, text, tokenizer) for files in (train, held_out)]
    total = sum(file.n_tokens for file in train)
    cut = _cut(train, fraction=val_fraction) if val_fraction else total
    counter = TextCounter(text, tokenizer)
    splits: dict[SplitName, TokenSplit] = {"train": _split(train, counter, stop=cut)}
    if held_out:
        splits["val"] = _split(held_out, counter)
    elif cut < total:
        splits["val"] = _split(train, counter, start=cut)
    identity = {"files": looks, "cut": cut, "tokenizer": text.fingerprint, "eos": text.eos_id}
    return Dataset(
        expanded(path),
        splits,
        vocab_size=text.vocab_size,
        eos_id=text.eos_id,
        tokenizer_json=text.definition_json,
        tokenizer_fingerprint=text.fingerprint,
        data_digest=digest_of(identity),
        notes=tuple(filter(None, (text.choice, *_notes(path, train + held_out, text)))),
    )


class ForeignPart:
    """Tokens [start, stop) of a file and the documents in them, cut where the range cuts them. A `Part`."""

    keep: npt.NDArray[np.bool_] | None = None

    def __init__(self, file: TokenFile, *, start: int, stop: int, counter: TextCounter) -> None:
        self.file, self.start, self.stop = file, start, stop
        self.n_tokens = stop - start
        self._counter = counter

    @property
    def path(self) -> Path:
        """The file of its ids."""
        return self.file.path

    @cached_property
    def tokens(self) -> Tokens:
        """(tokens,) ids, a view of the map."""
        return self.file.ids[self.start : self.stop]

    @cached_property
    def n_documents(self) -> int:
        """Documents that have a token in the range."""
        return len(self._edges) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """(documents,) tokens of each document."""
        return np.diff(self._edges).astype(np.int32)

    def starts(self, first: int, stop: int) -> Integers:
        """(stop - first,) first token of each document in [first, stop)."""
        return self._edges[:-1][first:stop]

    def document_at(self, token: int) -> int:
        """The document that holds `token`. O(log documents)."""
        return int(np.searchsorted(self._edges, token, side="right")) - 1

    def describe(self, document: int) -> DocumentInfo:
        """The file of a document and its number there."""
        first, stop = (int(edge) for edge in self._edges[document : document + 2])
        ids = self.tokens[first:stop]
        known = (ids >= 0) & (ids < self._counter.tokenizer.vocab_size)  # what was not looked at yet may hold anything
        return DocumentInfo(
            source=str(self.file.path),
            row=self.file.row(self._first + document),
            tokens=stop - first,
            text_bytes=self._counter.count(ids[known]),
        )

    def spans(self) -> Iterator[tuple[int, int]]:
        """First and last-plus-one token of each document."""
        yield from pairwise(self._edges.tolist())

    @cached_property
    def _first(self) -> int:
        """The document of the file that holds the first token."""
        return int(np.searchsorted(self.file.edges, self.start, side="right")) - 1

    @cached_property
    def _edges(self) -> Integers:
        """(documents + 1,) first token of each document, and the end, counted from the first of the range."""
        last = int(np.searchsorted(self.file.edges, self.stop, side="left"))
        return np.clip(self.file.edges[self._first : last + 1], self.start, self.stop) - self.start


class TextCounter:
    """UTF-8 bytes of the text that ids stand for; special tokens and ends of documents are no text."""

    def __init__(self, tokenizer: TextTokenizer, name: str) -> None:
        self.tokenizer, self.name = tokenizer, name

    def count(self, ids: Tokens) -> int:
        """Bytes of the text of `ids` (tokens,). Exact for byte-level tokenizers wherever the ids were cut."""
        if self._table is not None:
            return int(self._table[ids].sum())
        plain = ids[~np.isin(ids, self._special)]
        pieces = (plain[first : first + _DECODED_AT_ONCE] for first in range(0, len(plain), _DECODED_AT_ONCE))
        return sum(len(self.tokenizer.decode(piece.tolist()).encode()) for piece in pieces)

    def total(self, parts: Sequence[ForeignPart]) -> int:
        """Bytes of the text of whole parts. Reads them in blocks, and checks every id on the way."""
        size = 0
        for part in parts:
            for first, ids in part.file.blocks(part.start, part.stop):
                check_ids(ids, part.file, first=first, vocab_size=self.tokenizer.vocab_size, tokenizer=self.name)
                size += self.count(ids) if self._table is not None else 0
            if self._table is None:  # a decoder treats the beginning of a text apart
                size += sum(self.count(part.tokens[a:b]) for a, b in part.spans())
        return size

    @cached_property
    def _special(self) -> Integers:
        """Ids that stand for no text."""
        added = self.tokenizer.tokenizer.get_added_tokens_decoder()
        return np.array(sorted({self.tokenizer.eos_id, *(n for n, token in added.items() if token.special)}))

    @cached_property
    def _table(self) -> Integers | None:
        """(vocabulary,) bytes of the text of each id; None: they depend on the ids around, so text must be decoded."""
        if not _is_byte_level(self.tokenizer.outline.get("decoder")):
            return None
        table = np.zeros(self.tokenizer.vocab_size, np.int64)
        added = self.tokenizer.tokenizer.get_added_tokens_decoder()
        for token, number in self.tokenizer.tokenizer.get_vocab(with_added_tokens=True).items():
            # a token of the model is spelled with one character per byte, an added one as itself
            table[number] = len(token.encode()) if number in added else len(token)
        table[self._special] = 0
        return table


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    if decoder is None:
        return False
    if decoder["type"] == "Sequence":
        return all(_is_byte_level(step) for step in decoder["decoders"])
    return bool(decoder["type"] == "ByteLevel")


def check_ids(ids: Tokens, file: TokenFile, *, first: int, vocab_size: int, tokenizer: str) -> None:
    """Refuse ids outside the vocabulary; `first` is the place of `ids[0]` in the file."""
    place = outside(ids, vocab_size)
    if place is not None:
        byte = file.offset + (first + place) * file.dtype.itemsize
        raise UserError(
            f"{file.path}: id {ids[place]} of token {first + place} (byte {byte}) is outside the vocabulary of "
            f"{vocab_size} of {tokenizer!r}: another tokenizer made the file, or its ids are not {file.dtype.name}"
        )


def check_width(ids: Tokens, file: TokenFile) -> None:
    """Refuse bare ids that were written wider than they are read: every other one is then 0, which no text gives."""
    if file.bare and len(ids) >= FEWEST_TO_JUDGE and ids.any() and not (ids[1::2].any() and ids[::2].any()):
        raise UserError(
            f"{file.path}: every other id is 0, so the file holds wider ones than {file.dtype.name}; set dtype to "
            "int32 or uint32, and write ids of 64 bits anew as one of these"
        )


def _paths(path: str, *, val: str | None, val_fraction: float | None) -> tuple[list[Path], list[Path]]:
    """The files to train on and to validate on."""
    if val is not None and val_fraction:
        raise UserError(f"val {val!r} and val_fraction {val_fraction} contradict each other; keep one")
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction must be at least 0 and below 1, got {val_fraction}")
    folder = expanded(path)
    if not (folder / "train.bin").is_file():
        train, held_out = find_files(path, key="path"), find_files(val, key="val") if val is not None else []
    else:
        own = folder / "val.bin"
        if own.is_file() and val_fraction:
            raise UserError(f"{folder} has a val.bin, so val_fraction {val_fraction} has no meaning; leave it out")
        train = [folder / "train.bin"]
        held_out = find_files(val, key="val") if val is not None else [own] if own.is_file() else []
    shared = {file.resolve() for file in train} & {file.resolve() for file in held_out}
    if shared:
        raise UserError(f"{min(shared)} is in path and in val: a model must not be trained on what judges it")
    return train, held_out


def _pieces(files: Sequence[TokenFile], *, start: int, stop: int) -> Iterator[tuple[TokenFile, int, int]]:
    """(file, first token, last plus one) of tokens [start, stop) of the files end to end."""
    begins = 0
    for file in files:
        low, high = max(start - begins, 0), min(stop - begins, file.n_tokens)
        if low < high:
            yield file, low, high
        begins += file.n_tokens


def _split(files: Sequence[TokenFile], counter: TextCounter, *, start: int = 0, stop: int | None = None) -> TokenSplit:
    end = sum(file.n_tokens for file in files) if stop is None else stop
    parts = [ForeignPart(f, start=a, stop=b, counter=counter) for f, a, b in _pieces(files, start=start, stop=end)]
    return TokenSplit(
        parts,
        text_bytes=lambda: counter.total(parts),
        dtype=files[0].seen_dtype,
        vocab_size=counter.tokenizer.vocab_size,
    )


def _look(files: Sequence[TokenFile], tokenizer: TextTokenizer, name: str) -> list[Any]:
    """Check a sample of the ids; return what identifies them: sizes, types, indices, and digests of the sample.

    The sample is the beginning of each file and `SAMPLES` blocks spread evenly over all, small files entirely.
    """
    if not files:
        return []
    types = {file.dtype.name: file.path for file in files}
    if len(types) > 1:
        (one, first), (other, second), *_ = types.items()
        raise UserError(f"{first} holds {one} and {second} {other}; files of one split must have one type")
    itemsize = files[0].dtype.itemsize
    total, block = sum(file.n_tokens for file in files), SAMPLE_BYTES // itemsize
    count = min(SAMPLES, -(-total // block))
    sample = hashlib.sha256()
    places = [(file, 0, min(file.n_tokens, HEAD_BYTES // itemsize)) for file in files]
    for first in np.linspace(0, max(total - block, 0), count).astype(np.int64).tolist():
        places += _pieces(files, start=first, stop=min(first + block, total))
    for file, start, stop in places:
        ids = file.read(start, stop)
        check_ids(ids, file, first=start, vocab_size=tokenizer.vocab_size, tokenizer=name)
        check_width(ids, file)
        sample.update(ids.tobytes())
    indices = [hashlib.sha256(file.index.content).hexdigest() if file.index else None for file in files]
    return [*types, [file.n_tokens for file in files], indices, sample.hexdigest()]


def _cut(files: Sequence[TokenFile], *, fraction: float) -> int:
    """The first token of the validation split: where the document begins that holds the last fraction's first token.

    Without an index that is looked for in `CUT_SEARCH` tokens before, and a document is cut if it begins earlier.
    """
    total = sum(file.n_tokens for file in files)
    cut = total - int(total * fraction)
    if cut == total:
        raise UserError(f"val_fraction {fraction} of {total} tokens is none; hold out more")
    [(file, local, _)] = _pieces(files, start=cut, stop=cut + 1)
    if file.index is not None:
        begins = int(file.edges[np.searchsorted(file.edges, local, side="right") - 1])
    else:
        low = max(local - CUT_SEARCH, 0)
        ends = np.flatnonzero(file.read(low, local) == file.eos_id)
        begins = low + int(ends[-1]) + 1 if len(ends) else local
    cut -= local - begins
    if cut == 0:
        raise UserError(f"{file.path} is one document, of which val_fraction {fraction} cannot be held out; name val")
    return cut


def _notes(path: str, files: Sequence[TokenFile], tokenizer: TextTokenizer) -> Iterator[str]:
    """What is no error and still worth knowing."""
    end = f"{tokenizer.eos_token!r} ({tokenizer.eos_id})"
    for file in files:
        last = file.document_ends(max(ENDS_LOOKED_AT // len(files), 1))
        missing = 0 if last is None else int((last != tokenizer.eos_id).sum())
        if last is not None and missing:
            yield (
                f"{missing} of {len(last)} documents looked at in {file.path} do not end with {end}: a model learns no "
                "end of a text from them (Megatron's preprocess_data.py adds it with --append-eod)"
            )
    bare = next((file for file in files if file.index is None), None)
    if bare is not None and not bool((bare.read(0, min(bare.n_tokens, CUT_SEARCH)) == tokenizer.eos_id).any()):
        yield f"no {end} in the first tokens of {bare.path}: if its documents end with another token, set eos"
    if (expanded(path) / "meta.pkl").exists():
        yield f"meta.pkl in {path} is not read, as a pickle can run any program; give the tokenizer that it describes"
