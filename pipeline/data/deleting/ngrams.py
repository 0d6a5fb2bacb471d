"""Word n-grams of evaluation texts, and where they occur in other texts.

In: texts, each of some owner. Out: an `NgramIndex`, which finds every n-gram of theirs in a stream of words, exactly:
hashes only preselect. Words are what white space separates, in lower case, without punctuation and symbols
(Unicode categories P and S); what is nothing else is no word. This is how Brown et al., "Language Models are Few-Shot
Learners" (2020), appendix C, look for test sets in training data, with n-grams of 13 words.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from pipeline.data.deleting.sieve import Sieve
from pipeline.data.order import mix_keys

SHORTEST = 8
"""A text of fewer words than an n-gram is looked for as a whole if it has so many; shorter ones are found anywhere."""
_CACHED_SPELLINGS = 2**20
_CHUNK_CHARACTERS = 2**20
"""Text split into words at once: a list of words takes ten times the memory of its text."""
_STORED = ("hashes", "rows", "owners")
_SIDES: tuple[Literal["left", "right"], ...] = ("left", "right")
_WHITE = re.compile(r"\s")

Ids = npt.NDArray[np.int32]
Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


def normalise(spelling: str) -> str:
    """A word of what stands between white space; empty when nothing but punctuation does."""
    lower = spelling.lower()
    return lower if spelling.isalpha() else lower.translate(_KEPT)


class _Kept(dict[int, int | None]):
    """A table for `str.translate`: punctuation and symbols to nothing, each character judged when first met."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if unicodedata.category(chr(code))[0] in "PS" else code
        return self[code]


_KEPT = _Kept()


class _Table:
    """All n-grams of one length: `hashes` (n,) ascending, `rows` (n, length) ids of words, `owners` (n,).

    `among` tells of a hash, moved right by `shift`, whether it may be one of them: most are not, and it fits a cache.
    """

    def __init__(self, hashes: Words, rows: Ids, owners: Ids) -> None:
        self.hashes, self.rows, self.owners = hashes, rows, owners
        bits = len(hashes).bit_length() + 3
        self.shift = np.uint64(64 - bits)
        self.among = np.zeros(2**bits, np.bool_)
        self.among[hashes >> self.shift] = True

    @classmethod
    def build(cls, rows: Ids) -> Self:
        """A table of rows (n, length + 1), the owner last; each once for each owner."""
        hashes = _hashes(list(rows[:, :-1].T.astype(np.uint64)))
        order = np.lexsort((rows[:, -1], hashes))
        hashes, rows = hashes[order], rows[order]
        new = np.concatenate(([True], (rows[1:] != rows[:-1]).any(axis=1)))
        return cls(hashes[new], rows[new, :-1], rows[new, -1])


class NgramIndex:
    """Finds n-grams. Words are numbered from 1; 0 is any word that no n-gram holds."""

    def __init__(self, vocabulary: dict[str, int], tables: dict[int, _Table]) -> None:
        self._vocabulary, self._tables = vocabulary, tables
        self._spellings = _Spellings(vocabulary)

    @cached_property
    def sieve(self) -> Sieve:
        """What tells fast which texts may hold an n-gram."""
        return Sieve(list(self._vocabulary), {length: table.rows for length, table in self._tables.items()})

    @classmethod
    def build(cls, texts: Iterable[tuple[int, str]], *, ngram: int) -> tuple[Self, dict[int, list[int]]]:
        """Index all n-grams of `ngram` words of (owner, text); texts shorter than that as a whole, from 8 words on.

        Also returns, for each owner, how many of its texts are in the index and how many are too short to be.
        """
        vocabulary: dict[str, int] = {}
        grams: dict[int, list[Ids]] = defaultdict(list)
        tally: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        for owner, text in texts:
            words = [word for word in map(normalise, text.split()) if word]
            length = min(ngram, len(words))
            tally[owner][length < min(SHORTEST, ngram)] += 1
            if length >= min(SHORTEST, ngram):
                ids = np.array([vocabulary.setdefault(word, len(vocabulary) + 1) for word in words], np.int32)
                rows = np.lib.stride_tricks.sliding_window_view(ids, length)
                grams[length].append(np.insert(rows, length, owner, axis=1))
        tables = {length: _Table.build(np.concatenate(found)) for length, found in sorted(grams.items())}
        return cls(vocabulary, tables), dict(tally)

    def save(self, path: Path) -> None:
        """Write the index for other processes."""
        arrays: dict[str, npt.NDArray[np.generic]] = {"lengths": np.array(sorted(self._tables))}
        arrays["words"] = np.frombuffer("\n".join(self._vocabulary).encode(), np.uint8)
        for length, table in self._tables.items():
            arrays |= {f"{name}-{length}": getattr(table, name) for name in _STORED}
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            words = arrays["words"].tobytes().decode().split("\n")
            tables = {
                length: _Table(*(arrays[f"{name}-{length}"] for name in _STORED))
                for length in arrays["lengths"].tolist()
            }
        return cls({word: number for number, word in enumerate(words, 1)}, tables)

    def word_ids(self, text: str) -> Ids:
        """(words,) ids of the words of a text."""
        spellings = self._spellings
        if len(spellings) > _CACHED_SPELLINGS:
            spellings.clear()
        parts = []
        for chunk in _chunks(text):
            split = chunk.split()
            parts.append(np.fromiter(map(spellings.__getitem__, split), np.int32, len(split)))
        ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return ids[ids >= 0]

    def search(self, ids: Ids) -> tuple[Integers, Ids]:
        """Where n-grams begin in a stream of word ids (words,), and whose they are: two arrays (found,)."""
        known = np.concatenate(([0], np.cumsum(ids > 0)))
        words = ids.astype(np.uint64)
        places, owners = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
        for length, table in self._tables.items():
            windows = max(len(ids) - length + 1, 0)
            hashes = _hashes([words[offset : offset + windows] for offset in range(length)])
            possible = table.among[hashes >> table.shift] & (known[length:] - known[:-length] == length)
            starts = np.flatnonzero(possible)
            low, high = (np.searchsorted(table.hashes, hashes[starts], side=side) for side in _SIDES)
            counts = high - low
            entries = np.repeat(low - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
            starts = np.repeat(starts, counts)
            equal = (table.rows[entries] == ids[starts[:, None] + np.arange(length)]).all(axis=1)
            places.append(starts[equal])
            owners.append(table.owners[entries[equal]])
        return np.concatenate(places), np.concatenate(owners)


class _Spellings(dict[str, int]):
    """Ids of words by their spelling in a text, normalised when first met; -1 where there is no word."""

    def __init__(self, vocabulary: dict[str, int]) -> None:
        super().__init__()
        self._vocabulary = vocabulary

    def __missing__(self, spelling: str) -> int:
        word = normalise(spelling)
        self[spelling] = self._vocabulary.get(word, 0) if word else -1
        return self[spelling]


def _hashes(columns: Sequence[Words]) -> Words:
    """(n,) multilinear hashes of rows whose columns (n,) are given. Equal rows have equal hashes."""
    total = np.zeros(len(columns[0]), np.uint64)
    for offset, column in enumerate(columns):
        total += column * (mix_keys(offset, 0) | np.uint64(1))
    return total


def _chunks(text: str) -> Iterator[str]:
    """The text in parts of about a million characters that end where words do."""
    start = 0
    while len(text) - start > _CHUNK_CHARACTERS:
        white = _WHITE.search(text, start + _CHUNK_CHARACTERS)
        stop = white.start() if white else len(text)
        yield text[start:stop]
        start = stop
    yield text[start:]
