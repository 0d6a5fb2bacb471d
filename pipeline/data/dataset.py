"""A complete dataset as streams of tokens that know their documents.

In: a folder that data_prep.py wrote. Out: a `Dataset`, whose splits are `TokenSplit`s: the documents of all shards
end to end, without those that a bitmap deletes. Reading writes nothing, takes no lock and loads no whole file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.data.manifest import TOKENIZER_NAME, Manifest, SplitName, read_manifest
from pipeline.data.shards import DocumentInfo, Shard, allow_open_files, outside
from pipeline.data.tokenizer_schema import LARGEST_TOKENIZER
from pipeline.errors import UserError
from pipeline.files import expanded
from pipeline.untrusted import read_regular

Tokens = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]


class Part(Protocol):
    """A file of tokens and the documents in it, end to end; both count from 0. `Shard` is one."""

    n_tokens: int

    @property
    def path(self) -> Path:
        """The file, to be named in errors."""

    @property
    def n_documents(self) -> int:
        """How many there are; may have to read the file."""

    @property
    def tokens(self) -> Tokens:
        """(tokens,) ids in the stored dtype."""

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """(documents,) tokens of each document."""

    @property
    def keep(self) -> npt.NDArray[np.bool_] | None:
        """(documents,) which ones are part of the dataset; None: all."""

    def starts(self, first: int, stop: int) -> Integers:
        """(stop - first,) first token of each document in [first, stop)."""

    def document_at(self, token: int) -> int:
        """The document that holds `token`."""

    def describe(self, document: int) -> DocumentInfo:
        """Where a document came from."""


class TokenSplit:
    """One split as one stream of tokens: its documents end to end, over all parts in order.

    Deleted documents are no part of it: the stream consists of segments, runs of kept documents of one part.
    Documents and tokens are numbered along the stream. `dtype`: what holds the ids of all parts. `text_bytes` may be a
    function, called when first asked. Ids may lie outside the vocabulary of `vocab_size`, as nobody reads all of them
    when a dataset is opened: who reads them, checks them.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        text_bytes: int | Callable[[], int],
        dtype: np.dtype[Any],
        vocab_size: int,
    ) -> None:
        self.parts = tuple(parts)
        self.vocab_size = vocab_size
        self._text_bytes = text_bytes
        self.dtype = dtype
        runs = [_segments(part) for part in self.parts]
        self._part = np.repeat(np.arange(len(runs)), [len(run) for run in runs])
        self._segments = np.concatenate(runs) if runs else np.zeros(0, _SEGMENT)
        self._token_starts = _running(self._segments["stop"] - self._segments["start"])
        self.n_tokens = int(self._token_starts[-1])

    @cached_property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text of all documents."""
        return self._text_bytes if isinstance(self._text_bytes, int) else self._text_bytes()

    @property
    def n_documents(self) -> int:
        """Documents of all parts that are kept."""
        return int(self._document_starts[-1])

    @cached_property
    def _document_starts(self) -> Integers:
        """(segments + 1,) number of the first document of each segment, and their total."""
        counts = self._segments["documents"].copy()
        whole = counts < 0  # a part of which nothing is deleted was not asked for its documents yet
        counts[whole] = [self.parts[number].n_documents for number in self._part[whole].tolist()]
        return _running(counts)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int32]:
        """(documents,) tokens of each document, EOS included. Reads the indices of all parts."""
        kept = [part.lengths if part.keep is None else part.lengths[part.keep] for part in self.parts]
        return np.concatenate(kept) if kept else np.zeros(0, np.int32)

    def tokens(self, start: int, stop: int) -> Tokens:
        """Ids [start, stop) of the stream, (stop - start,) in the stored dtype; a view inside one segment."""
        parts = [self._part_of(number).tokens[a:b] for number, a, b in self._overlapping(start, stop)]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.zeros(0, self.dtype)

    def checked_tokens(self, start: int, stop: int) -> Tokens:
        """As `tokens`. Raises `UserError` for an id outside the vocabulary, naming file and document."""
        ids = self.tokens(start, stop)
        place = outside(ids, self.vocab_size)
        if place is not None:
            [(segment, token, _)] = self._overlapping(start + place, start + place + 1)
            part = self._part_of(segment)
            info = part.describe(part.document_at(token))
            of = "" if info.source == str(part.path) else f" of {info.source}"
            raise UserError(
                f"{part.path}: id {ids[place]} in document {info.row}{of} is outside the vocabulary of "
                f"{self.vocab_size} tokens: another tokenizer made the file, or it is damaged; name that tokenizer or "
                "copy it again"
            )
        return ids

    def ranges(self, starts: Integers, stops: Integers) -> Iterator[Tokens]:
        """The same for many ranges, starts and stops (n,), found together: a millionth of a second each."""
        segments = np.searchsorted(self._token_starts, starts, side="right") - 1
        segments = np.minimum(segments, len(self._segments) - 1)
        shifts = self._segments["start"][segments] - self._token_starts[segments]
        inside = (starts >= 0) & (starts <= stops) & (stops <= self._token_starts[segments + 1])
        found = (inside.tolist(), self._part[segments].tolist(), shifts.tolist(), starts.tolist(), stops.tolist())
        for whole, part, shift, start, stop in zip(*found, strict=True):
            yield self.parts[part].tokens[start + shift : stop + shift] if whole else self.tokens(start, stop)

    def document_of(self, start: int, stop: int) -> Integers:
        """Number of the document of each token in [start, stop), (stop - start,). O(documents touched)."""
        found = []
        for number, a, b in self._overlapping(start, stop):
            part = self._part_of(number)
            first, last = part.document_at(a), part.document_at(b - 1)
            counts = np.diff(np.concatenate(([a], part.starts(first + 1, last + 1), [b])))
            offset = int(self._document_starts[number] - self._segments["first"][number])
            found.append(np.repeat(np.arange(first, last + 1) + offset, counts))
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def describe(self, document: int) -> DocumentInfo:
        """Where a document came from and how long it is."""
        if not 0 <= document < self.n_documents:
            raise IndexError(f"document {document} of {self.n_documents}")
        number = int(np.searchsorted(self._document_starts, document, side="right")) - 1
        local = document - int(self._document_starts[number]) + int(self._segments["first"][number])
        return self._part_of(number).describe(local)

    def _part_of(self, segment: int) -> Part:
        return self.parts[int(self._part[segment])]

    def _overlapping(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(segment, first and last-plus-one token within its part) of every segment that [start, stop) touches."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a split of {self.n_tokens}")
        if start == stop:
            return []
        first = int(np.searchsorted(self._token_starts, start, side="right")) - 1
        last = int(np.searchsorted(self._token_starts, stop, side="left"))
        touched = []
        for number in range(first, last):
            low, high = int(self._token_starts[number]), int(self._token_starts[number + 1])
            shift = int(self._segments["start"][number]) - low
            touched.append((number, max(start, low) + shift, min(stop, high) + shift))
        return touched


_SEGMENT = np.dtype([("start", "<i8"), ("stop", "<i8"), ("first", "<i8"), ("documents", "<i8")])
"""A run of kept documents: its first and last-plus-one token in its part, its first document, how many (-1: all)."""


def _segments(part: Part) -> npt.NDArray[Any]:
    if part.keep is None:
        return np.array([(0, part.n_tokens, 0, -1)], _SEGMENT)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], part.keep, [False])).astype(np.int8)))
    first, stop = edges[::2], edges[1::2]
    starts = np.append(part.starts(0, part.n_documents), part.n_tokens)
    found = np.zeros(len(first), _SEGMENT)
    found["start"], found["stop"], found["first"], found["documents"] = starts[first], starts[stop], first, stop - first
    return found


def _running(counts: Integers) -> Integers:
    """(n + 1,) running totals, beginning with 0."""
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int64)


class Dataset:
    """What a run trains on: splits, and the tokenizer that its ids belong to.

    `tokenizer_json` is the content of its `tokenizer.json`; `data_digest` identifies the token streams;
    `notes` are what a user should know of the data before training on it.
    """

    def __init__(
        self,
        path: Path,
        splits: dict[SplitName, TokenSplit],
        *,
        vocab_size: int,
        eos_id: int,
        tokenizer_json: bytes,
        tokenizer_fingerprint: str,
        data_digest: str,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.path = path
        self.vocab_size, self.eos_id = vocab_size, eos_id
        self.tokenizer_json, self.tokenizer_fingerprint = tokenizer_json, tokenizer_fingerprint
        self.data_digest, self.notes = data_digest, notes
        self._splits = splits

    def split(self, name: SplitName) -> TokenSplit:
        """The stream of a split; one that is not there has no tokens."""
        return self._splits.get(name) or TokenSplit((), text_bytes=0, dtype=np.dtype("<u2"), vocab_size=self.vocab_size)


def open_shards(folder: Path, manifest: Manifest) -> dict[SplitName, list[Shard]]:
    """The shards of a prepared dataset, unchecked."""
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    inputs = [source.name for source in manifest.inputs]
    allow_open_files(sum(map(len, manifest.splits.values())))
    return {
        split: [Shard(folder, info, dtype=dtype, inputs=inputs) for info in infos]
        for split, infos in manifest.splits.items()
    }


def open_dataset(path: str | Path) -> Dataset:
    """Open a dataset folder read-only.

    Raises `UserError` for a missing, unfinished, foreign-version, truncated or altered dataset, naming
    the file, what was expected and what was found. Contents are checked by `pipeline.data.preparing.audit.verify`.
    """
    folder = expanded(path)
    manifest = read_manifest(folder)
    tokenizer = folder / TOKENIZER_NAME
    try:
        tokenizer_json = read_regular(tokenizer, limit=LARGEST_TOKENIZER)
    except FileNotFoundError:
        raise UserError(f"{tokenizer} is missing; copy it from where the dataset was made") from None
    splits: dict[SplitName, TokenSplit] = {}
    for name, shards in open_shards(folder, manifest).items():
        for shard in shards:
            shard.check()
        dtype = np.dtype(manifest.dtype).newbyteorder("<")
        text_bytes = manifest.total(name, "text_bytes")
        splits[name] = TokenSplit(shards, text_bytes=text_bytes, dtype=dtype, vocab_size=manifest.vocab_size)
    return Dataset(
        folder,
        splits,
        vocab_size=manifest.vocab_size,
        eos_id=manifest.eos_id,
        tokenizer_json=tokenizer_json,
        tokenizer_fingerprint=manifest.tokenizer_fingerprint,
        data_digest=manifest.data_digest,
    )
