"""Documents to ids at speed: gigatoken encodes, `tokenizers` defines and checks.

In: documents as valid UTF-8. Out: their ids end to end and the tokens of each, always those that `tokenizers` gives
for the whole document. gigatoken (forty times faster) is used only for a tokenizer on which both agree, and is still
checked while it works; where they differ, `EncoderMismatch` tells the caller to redo its unit with the definition.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

from pipeline.data.preparing.cuts import added_tokens, cut, divisible
from pipeline.data.preparing.nasty import nasty_texts, unicode_texts
from pipeline.data.preparing.reference import reference, refuse_growth
from pipeline.data.shards import token_dtype
from pipeline.data.tokenizer import TextTokenizer
from pipeline.errors import UserError

Backend = Literal["gigatoken", "tokenizers"]

PIECE_BYTES = 128 * 2**10
"""Length from which a long document is encoded in parts, where the tokenizer allows it."""

BATCH_BYTES = {"gigatoken": 2**20, "tokenizers": 2**18}
"""Text encoded at once. `tokenizers` keeps about 500 bytes a token until a batch is done: 30 MB here."""

AUDIT_ONE_IN = 10_000
"""Pieces of which one is encoded by both. The reference takes 50 times as long: half a percent of the time."""

AUDIT_BYTES = 256 * 2**10
"""Longest piece that is audited, 0.1 s of the reference."""

AUDIT_HASHED_BYTES = 256
"""From the middle of a piece, what decides with its length on an audit: to hash all of it would take a percent."""

SAMPLE_BYTES = 4 * 2**20
"""How much of a sample `choose_encoder` compares, about 2 s."""

CACHE_BYTES = 48 * 2**20
"""Growth of the process at which gigatoken is loaded anew (0.1 s), for its cache of words is never emptied.

Measured with GPT-2's tokenizer: 0.7 MB per MB of ordinary text at first, 126 MB after 984 MB of sources and HTML; 6 MB
per MB of random Chinese, 10 MB per MB of random letters. The process holds 130 MB after loading, so it stays under
200 MB.
"""

SHARED_CACHE_BYTES = 512 * 2**20
"""What all workers together may take beyond that: the fewer there are, the more words each remembers."""

RELOAD_BYTES = 2**33 if sys.platform == "linux" else 2**26
"""Text after which it is loaded anew in any case; sooner where the system does not tell the size of the process."""

_MEMORY = Path("/proc/self/statm")

_BEYOND_LATIN = re.compile(rb"[\xcc-\xf4]")
"""A character from U+0300 on, by its first byte. All before it are in the composed form NFC, for good."""


class EncoderMismatch(Exception):  # noqa: N818 - the name says what happened
    """gigatoken failed, or gave other ids than `tokenizers`: encode the unit again with backend "tokenizers"."""


class Encoder:
    """Encodes batches of documents; one a process.

    Counts what it has done: `documents`, `text_bytes`, `tokens`, and `audited`, the pieces that were encoded by
    both and compared. `divisible`: the ids of a document are those of its parts by `cut`. `unknown_id` is the id of
    the token for unknown text, None if the tokenizer has none. `dtype`: that of ids in shards.
    """

    def __init__(self, tokenizer: TextTokenizer, *, backend: Backend, workers: int = 1) -> None:
        """`workers`: how many processes share the memory."""
        self.backend = backend
        self.documents = self.text_bytes = self.tokens = self.audited = 0
        self.unknown_id = tokenizer.unknown_id
        self.tokenizer = tokenizer
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.divisible = divisible(tokenizer.outline)
        self._specials = Tokens(added_tokens(tokenizer.outline, special=True))
        room = CACHE_BYTES + SHARED_CACHE_BYTES // workers
        self._native = _Native(tokenizer, room=room) if backend == "gigatoken" else None

    def encode(self, contents: Sequence[bytes], *, end: int | None = None) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Ids of all documents end to end, (tokens,) of `dtype`, and the tokens of each, (len(contents),).

        Nothing is added, but the id `end` after each document where it is given. Raises `EncoderMismatch` where
        gigatoken cannot be trusted, and `UserError` for characters that a `chars` vocabulary lacks.
        """
        # A byte is seldom more than a token, so this nearly always has room; what is not written to takes no memory.
        ids, stops = np.empty(sum(map(len, contents)) + len(contents) + 1, self.dtype), [0] * len(contents)
        filled, last, gap = 0, 0, int(end is not None)
        for owner, found in self._encoded(contents):
            if owner != last:
                filled, last = filled + gap, owner
            stop = filled + len(found)
            if stop >= len(ids):
                ids = np.concatenate([ids[:filled], np.empty(len(ids) + len(found), self.dtype)])
            ids[filled:stop] = found  # at once, while it is in the cache: a list of them to put together takes longer
            filled = stops[owner] = stop
        ends = np.array(stops, np.int64)
        if end is not None:
            ids[ends] = end
            ends += 1
        lengths = np.diff(ends, prepend=0)
        size = int(lengths.sum())
        self.documents += len(contents)
        self.text_bytes += sum(map(len, contents))
        self.tokens += size
        return ids[:size], lengths

    def special_text(self, contents: Iterable[bytes]) -> int:
        """How many documents hold the text of a special token. It is encoded as text; this is for the record."""
        return sum(map(self._specials.within, contents))

    def _encoded(self, contents: Sequence[bytes]) -> Iterator[tuple[int, NDArray[np.uint32]]]:
        """Ids of the pieces of the documents, in order, and whose they are."""
        for pieces, owners in self._batches(contents):
            yield from zip(owners, self.encode_each(pieces), strict=True)

    def _batches(self, contents: Sequence[bytes]) -> Iterator[tuple[list[bytes], list[int]]]:
        """Pieces of the documents, in order, about `BATCH_BYTES` at a time, and whose they are."""
        pieces: list[bytes] = []
        owners: list[int] = []
        size, limit = 0, BATCH_BYTES[self.backend]
        for owner, content in enumerate(contents):
            for piece in cut(content, PIECE_BYTES) if self.divisible and len(content) > PIECE_BYTES else (content,):
                if pieces and size + len(piece) > limit:
                    yield pieces, owners
                    pieces, owners, size = [], [], 0
                pieces.append(piece)
                owners.append(owner)
                size += len(piece)
        if pieces:
            yield pieces, owners

    def encode_each(self, pieces: Sequence[bytes]) -> Iterator[NDArray[np.uint32]]:
        """Ids of each piece; raises as `encode` does."""
        if self._native is None:
            yield from reference(self.tokenizer, pieces)
            return
        refuse_growth(self.tokenizer, pieces)
        for piece, ids in zip(pieces, self._native.encode(pieces), strict=True):
            if len(piece) <= AUDIT_BYTES and is_audited(piece):
                self.audited += 1
                if fault := _difference([piece], [ids], reference(self.tokenizer, [piece])):
                    raise EncoderMismatch(fault)
            yield ids


def is_audited(piece: bytes) -> bool:
    """Whether a piece is encoded by both: one in `AUDIT_ONE_IN`, the same ones in every run."""
    middle = len(piece) // 2  # beginnings and ends are often the same in all documents
    return xxhash.xxh3_64_intdigest(piece[middle : middle + AUDIT_HASHED_BYTES], seed=len(piece)) % AUDIT_ONE_IN == 0


def choose_encoder(
    tokenizer: TextTokenizer, sample: Sequence[bytes], *, asked: Literal["auto", "gigatoken", "tokenizers"] = "auto"
) -> tuple[Encoder, str]:
    """What shall encode with this tokenizer, and why its backend, in words.

    gigatoken if it is installed, loads the tokenizer and gives the ids of `tokenizers` for strings that have broken
    tokenizers, for a spread of all of Unicode and for `sample`, documents of the corpus, of which about
    `SAMPLE_BYTES` are compared. Raises `UserError` if it was asked for and is unfit.
    """
    if asked == "tokenizers":
        return Encoder(tokenizer, backend="tokenizers"), "asked for"
    fault = _unfit(tokenizer)
    if fault is None:
        try:
            return _proven(tokenizer, sample), "gives the same ids as tokenizers"
        except ImportError as error:
            fault = f"gigatoken is not installed ({error})"
        except EncoderMismatch as error:
            fault = str(error)
    if asked == "gigatoken":
        raise UserError(f"gigatoken cannot encode with this tokenizer: {fault}; let tokenizers do it")
    return Encoder(tokenizer, backend="tokenizers"), fault


def _proven(tokenizer: TextTokenizer, sample: Sequence[bytes]) -> Encoder:
    """gigatoken with this tokenizer, loaded; `EncoderMismatch` says where it differs."""
    encoder = Encoder(tokenizer, backend="gigatoken")
    for pieces in _trial(encoder, sample):
        if fault := _difference(pieces, list(encoder.encode_each(pieces)), reference(tokenizer, pieces)):
            raise EncoderMismatch(fault)
    return encoder


class _Native:
    """gigatoken, loaded when first needed and again when its cache takes more than `room` bytes."""

    def __init__(self, tokenizer: TextTokenizer, *, room: int) -> None:
        self._tokenizer = tokenizer
        self._room = room
        self._composes = (tokenizer.outline.get("normalizer") or {}).get("type") == "NFC"
        self._added = Tokens(added_tokens(tokenizer.outline, special=False))
        self._definition = gigatoken_definition(tokenizer.as_trained)
        self._known = [text.encode() for text in nasty_texts(tokenizer.outline)]
        self._expected = reference(tokenizer, self._known)
        self._encode: Callable[[bytes], NDArray[np.uint32]] | None = None
        self._bytes = self._grown = self._resident = 0  # since loading; the last is what the process held then

    def encode(self, pieces: Sequence[bytes]) -> Iterator[NDArray[np.uint32]]:
        """Ids of each piece; `EncoderMismatch` if gigatoken fails."""
        encode = self._encode = self._encode or self._load()
        before = _resident_bytes()
        try:
            with _trusted():
                yield from self._each(encode, pieces)
        finally:
            after = _resident_bytes()
            self._bytes += sum(map(len, pieces))
            self._grown += max(0, after - before)
            # by both measures: the first counts what was kept of the ids, too, the second what others here took
            if min(self._grown, after - self._resident) > self._room or self._bytes > RELOAD_BYTES:
                self._encode = None  # loaded anew by the next call

    def _each(
        self, encode: Callable[[bytes], NDArray[np.uint32]], pieces: Sequence[bytes]
    ) -> Iterator[NDArray[np.uint32]]:
        return map(partial(self._composed, encode) if self._composes else encode, pieces)

    def _composed(self, encode: Callable[[bytes], NDArray[np.uint32]], piece: bytes) -> NDArray[np.uint32]:
        if piece.isascii() or _BEYOND_LATIN.search(piece) is None:
            return encode(piece)
        # Rare marks are ordered differently by gigatoken, whose table of Unicode is newer, so NFC is left to the
        # reference. Added tokens are looked for before it, and ended by it: text that holds one is not ours.
        composed = self._tokenizer.tokenizer.normalizer.normalize_str(piece.decode()).encode()
        if self._added.within(piece) or self._added.within(composed):
            return reference(self._tokenizer, [piece])[0]
        return encode(composed)

    def _load(self) -> Callable[[bytes], NDArray[np.uint32]]:
        """Checked each time: this may be another machine than the one that chose gigatoken, with other instructions."""
        _return_freed_memory()
        with _trusted():
            encode = _load_gigatoken(self._definition, vocab_size=self._tokenizer.vocab_size)
            known = list(self._each(encode, self._known))
        if fault := _difference(self._known, known, self._expected):
            raise EncoderMismatch(fault)
        self._bytes, self._grown, self._resident = 0, 0, _resident_bytes()
        return encode


def _load_gigatoken(definition: str, *, vocab_size: int) -> Callable[[bytes], NDArray[np.uint32]]:
    from gigatoken import Tokenizer  # here, so that all else works where it is not installed

    tokenizer = Tokenizer.from_json(definition)
    if tokenizer.vocab_size > vocab_size:  # its ids go unseen into the smallest type that holds ours
        raise ValueError(f"it has ids up to {tokenizer.vocab_size - 1}, the tokenizer up to {vocab_size - 1}")
    # document by document: as fast as a batch from 1 KB on, and it spares a worker awkward, 40 MB and 0.3 s
    return tokenizer.encode


@contextmanager
def _trusted() -> Iterator[None]:
    """What goes wrong in gigatoken within the block is an `EncoderMismatch`; lack of memory is its own error."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, ImportError):
        raise
    except BaseException as error:  # a panic in the library is no Exception
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise EncoderMismatch(f"gigatoken fails: {reason}") from error


def gigatoken_definition(definition: dict[str, Any]) -> str:
    """The `tokenizer.json` with which gigatoken gives the ids of ours: nothing added, special tokens not looked for."""
    words = definition.get("pre_tokenizer")
    if not definition["model"].get("merges") and "ByteLevel" in json.dumps(words):
        # without merges every byte is a token however text is cut into words; this is a way that gigatoken knows
        words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    changes = {"added_tokens": added_tokens(definition, special=False), "pre_tokenizer": words, "post_processor": None}
    if (definition.get("normalizer") or {}).get("type") == "NFC":
        changes["normalizer"] = None  # left to `tokenizers`
    return orjson.dumps({**definition, **changes}).decode()


def _unfit(tokenizer: TextTokenizer) -> str | None:
    """Why gigatoken must not even be tried with this tokenizer, or None."""
    if tokenizer.alphabet is not None:
        return "gigatoken knows no vocabularies of characters"
    if unknown := sorted(_normalizers(tokenizer.outline.get("normalizer")) - {"NFC", "Prepend", "Replace"}):
        return f"gigatoken may normalize text otherwise ({', '.join(unknown)})"
    return None


def _normalizers(normalizer: dict[str, Any] | None) -> set[str]:
    """Types of the normalizers of a definition; NFC counts as `Sequence` unless it is the only one."""
    if normalizer is None:
        return set()
    if normalizer["type"] != "Sequence":
        return {normalizer["type"]}
    inner = set().union(*map(_normalizers, normalizer["normalizers"]))
    return {"Sequence"} if "NFC" in inner else inner


def _trial(encoder: Encoder, sample: Sequence[bytes]) -> Iterator[list[bytes]]:
    """What both must agree on, a little at a time, for the reference's threads: Unicode, then the corpus."""
    texts = [text.encode() for text in unicode_texts()]
    # a few kilobytes are set aside for the ids of each text: of all at once they would pass for a grown cache
    yield from (texts[start : start + 1024] for start in range(0, len(texts), 1024))
    room = SAMPLE_BYTES
    pieces: list[bytes] = []
    for content in sample:
        piece = next(cut(content, PIECE_BYTES)) if encoder.divisible else content
        if len(piece) <= min(room, AUDIT_BYTES):
            room -= len(piece)
            pieces.append(piece)
            if sum(map(len, pieces)) > BATCH_BYTES["tokenizers"]:
                yield pieces
                pieces = []
    if pieces:
        yield pieces


def _difference(
    pieces: Sequence[bytes], got: Sequence[NDArray[np.uint32]], wanted: Sequence[NDArray[np.uint32]]
) -> str | None:
    """The first piece of which the ids differ, in words."""
    if [*map(len, got)] == [*map(len, wanted)] and np.array_equal(np.concatenate(got), np.concatenate(wanted)):
        return None
    for piece, ours, theirs in zip(pieces, got, wanted, strict=True):
        if not np.array_equal(ours, theirs):
            same = min(len(ours), len(theirs))
            at = int(np.argmax(np.append(ours[:same] != theirs[:same], True)))
            text = piece.decode()
            return (
                f"the ids of {text[:60]!r}{'...' if len(text) > 60 else ''} ({len(piece)} bytes) differ from token "
                f"{at} on: gigatoken {ours[at : at + 5].tolist()}, tokenizers {theirs[at : at + 5].tolist()}"
            )
    return None


class Tokens:
    """Added tokens, to be looked for in text: most often there are none, and then it takes no time.

    Tokens are grouped by their first two bytes. One byte is found at memory speed, two are not, and the second of
    these is the rarer one of `<|` and the like: text before the first of it is done with. In the rest one token is
    searched for as it is, several by a pattern that begins with that byte and looks behind for the first.
    """

    def __init__(self, tokens: Sequence[dict[str, Any]]) -> None:
        groups: dict[bytes, list[bytes]] = {}
        for token in tokens:
            content = token["content"].encode()
            groups.setdefault(content[:2], []).append(content)
        self._groups = [(start[-1:], group, _pattern(start, group)) for start, group in groups.items()]

    def within(self, content: bytes) -> bool:
        """Whether one of them is part of `content`."""
        for rare, group, pattern in self._groups:
            second = content.find(rare)
            if second < 0:
                continue
            start = max(second - 1, 0)
            if content.find(group[0], start) >= 0 if len(group) == 1 else pattern.search(content, start):
                return True
        return False


def _pattern(start: bytes, tokens: Sequence[bytes]) -> re.Pattern[bytes]:
    """For tokens that begin with the same two bytes."""
    ends = b"|".join(re.escape(token[2:]) for token in tokens)
    return re.compile(b"%s(?<=%s)(?:%s)" % (re.escape(start[-1:]), re.escape(start), ends))


def _resident_bytes() -> int:
    """Memory of this process, where the system tells it cheaply."""
    try:
        with _MEMORY.open("rb", buffering=0) as file:  # the shortest way: this is asked twice a batch
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


def _return_freed_memory() -> None:
    """Thousands of small pieces that were freed stay with the process (half of the cache, measured) until asked for."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
        libc.malloc_trim(0)
