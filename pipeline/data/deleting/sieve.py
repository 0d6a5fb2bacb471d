"""Which documents may hold an n-gram: a first look that is fast, passes some too many and never misses one.

In: n-grams of words as numbers, and their spelling; texts. Out: the texts that are worth an exact search.

A run of words has a fingerprint, the sum over its letters c_0, c_1, ... of value(c_k) * BASE^k modulo 2^64 (Karp and
Rabin, "Efficient randomized pattern-matching algorithms", 1987). Differences of running sums give those of all runs of
a text at once. Letters are lower-cased one by one; what is no part of a word has no value, nor has the end of a word.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pipeline.data.order import mix_keys

_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 2**64)
_SPACE, _DROPPED, _UNSEEN = (np.uint64(number) for number in range(3))
_LOWEST = np.uint64(4)
_MOST_CHARACTERS = 2**23
"""Texts of more are not looked at together: 32 bytes of memory a character."""
_TWO_OF_ONE = ("\u0130", "i\u0307")
"""The one character whose lower case is two."""
_SEED = 0

Ids = npt.NDArray[np.int32]
Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


class Sieve:
    """Finds the texts that may hold one of `rows[length]` (n, length), numbers of words from 1 on in `vocabulary`."""

    def __init__(self, vocabulary: Sequence[str], rows: Mapping[int, Ids]) -> None:
        self._values = np.full(0x110000, _UNSEEN)
        spelled = _Runs(self._letters("\n".join(vocabulary)))
        assert spelled.words == len(vocabulary), f"{len(vocabulary)} words were read as {spelled.words}"
        words, sizes = spelled.prints(1), spelled.sizes()
        self._sought = {length: _Sought(_prints_of(table - 1, words, sizes)) for length, table in rows.items()}

    def suspects(self, texts: Sequence[str]) -> list[int]:
        """Numbers of the texts that may hold an n-gram, ascending."""
        if any(_TWO_OF_ONE[0] in text for text in texts):
            texts = [text.replace(*_TWO_OF_ONE) for text in texts]
        ends = np.cumsum([len(text) + 1 for text in texts])
        if ends[-1] > _MOST_CHARACTERS:
            return list(range(len(texts)))
        runs = _Runs(self._letters("\n".join(texts)))
        found = [runs.places(sought.among(runs.prints(length))) for length, sought in self._sought.items()]
        places = np.concatenate([np.zeros(0, np.int64), *found])
        numbers: list[int] = np.unique(np.searchsorted(ends, places, side="right")).tolist()
        return numbers

    def _letters(self, text: str) -> Words:
        """(characters,) their values; each code point is judged when first met."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        values: Words = self._values[codes]
        if (values == _UNSEEN).any():
            new = np.unique(codes[values == _UNSEEN])
            self._values[new] = _judged(new.tolist())
            values = self._values[codes]
        return values


def _judged(codes: Iterable[int]) -> Words:
    """Values of code points: equal for those that are equal in lower case, at the end of a word too."""
    lower = [chr(code).lower().replace("ς", "σ") for code in codes]
    values: Words = mix_keys(_SEED, [ord(character) for character in lower]) | _LOWEST
    values[[unicodedata.category(character)[0] in "PS" for character in lower]] = _DROPPED
    values[[character.isspace() for character in lower]] = _SPACE
    return values


class _Runs:
    """The words of a text, from the values (characters,) of its letters."""

    def __init__(self, values: Words) -> None:
        self._kept = np.flatnonzero(values > _DROPPED)
        spaces = np.cumsum(values == _SPACE, dtype=np.int32)[self._kept]
        self._starts = np.flatnonzero(np.diff(spaces, prepend=-1))  # of words, among what is kept
        self._ends = np.append(self._starts[1:], len(self._kept))[: len(self._starts)]
        self._sums = np.zeros(len(self._kept) + 1, np.uint64)
        np.cumsum(values[self._kept] * _powers(_BASE, len(self._kept)), out=self._sums[1:])
        self._shifts = _powers(_INVERSE, len(self._kept))
        self.words = len(self._starts)

    def sizes(self) -> Integers:
        """(words,) letters of each word."""
        return self._ends - self._starts

    def prints(self, length: int) -> Words:
        """(words - length + 1,) fingerprints of all runs of `length` words."""
        low, high = self._starts[: max(self.words - length + 1, 0)], self._ends[length - 1 :]
        prints: Words = (self._sums[high] - self._sums[low]) * self._shifts[low]
        return prints

    def places(self, words: Integers) -> Integers:
        """Places of words in the text."""
        return self._kept[self._starts[words]]


@lru_cache(maxsize=2)
def _many_powers(base: int, count: int) -> Words:
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors)


def _powers(base: int, count: int) -> Words:
    """(count,) base^0, base^1, ... modulo 2^64; computed once for many counts."""
    return _many_powers(base, 2 ** max(count, 1).bit_length())[:count]


def _prints_of(rows: Ids, words: Words, sizes: Integers) -> Words:
    """(n,) fingerprints of runs of words (n, length), from those of the words and their letters."""
    total, before = np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.int64)
    powers = _powers(_BASE, int(sizes.max()) * rows.shape[1] + 1)
    for column in rows.T:
        total += words[column] * powers[before]
        before += sizes[column]
    return total


class _Sought:
    """Fingerprints to be found again. Most are not among them, as a table that fits a cache tells."""

    def __init__(self, prints: Words) -> None:
        self._prints = np.unique(prints)
        bits = len(self._prints).bit_length() + 4
        self._shift = np.uint64(64 - bits)
        self._perhaps = np.zeros(2**bits, np.bool_)
        self._perhaps[self._prints >> self._shift] = True

    def among(self, prints: Words) -> Integers:
        """Places in `prints` (n,) of those that are sought."""
        perhaps = np.flatnonzero(self._perhaps[prints >> self._shift])
        wanted = prints[perhaps]
        nearest = np.minimum(np.searchsorted(self._prints, wanted), len(self._prints) - 1)
        found: Integers = perhaps[self._prints[nearest] == wanted]
        return found
