"""Sketches of documents: how alike two sets of token n-grams are, told from 256 bytes each.

In: the token ids of a shard. Out: `NAME.minhash-KEY.npy`, (documents, 128) 16-bit numbers, where KEY stands for the
shard's content and the constants below. The share of numbers in which two rows agree estimates the Jaccard similarity
of the documents' sets of 5-grams, without bias and with a standard deviation of sqrt(J (1 - J) / 128).

The sketch is the one of Dahlgaard, Knudsen and Thorup, "Fast Similarity Sketching" (FOCS 2017): an n-gram is hashed
once into one of 128 bins instead of 128 times, each bin keeps its smallest hash, and what is still empty is filled in
further rounds with other hashes. It is as sharp as 128 permutations and its cost hardly depends on their number.
All arithmetic is that of 64-bit integers: the same numbers on every machine.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.manifest import ShardInfo, digest_of
from pipeline.data.shards import Shard
from pipeline.files import write_durably

NGRAM = 5
"""Tokens of an n-gram; shorter documents have none."""
BINS = 128
_RANDOM_ROUNDS = 64
"""Rounds until each bin that is still empty looks at every n-gram; a document of 20 n-grams is full by then."""
_FACTORS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F)
"""One odd multiplier for each token of an n-gram."""
_GOLDEN = 0x9E3779B97F4A7C15
_LONG = 8 * BINS
"""Documents of more n-grams, if distinct, leave a bin empty once in 25 times."""
_EMPTY = np.uint32(2**32 - 1)
_BLOCK = 2**14
"""Tokens hashed at once: intermediate results stay in the cache."""
_GROUP_TOKENS, _GROUP_DOCUMENTS = 2**20, 2**12
"""Documents sketched at once: bounds memory to about 20 MB, and 16 bytes a token of a longer document."""

Words = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]
Signatures = npt.NDArray[np.uint16]


def signature_path(folder: Path, info: ShardInfo) -> Path:
    """Where the sketches of a shard are kept; the name changes with the shard's content."""
    content = [info.file(".bin").checksum, info.file(".idx").checksum]
    key = digest_of([content, NGRAM, BINS, _RANDOM_ROUNDS, _FACTORS, _GOLDEN])
    return folder / f"{info.name}.minhash-{key[:16]}.npy"


def write_signatures(shard: Shard) -> None:
    """Sketch all documents of a shard into `signature_path`, in one step: a file of that name is whole."""
    stream = io.BytesIO()
    np.save(stream, signatures(shard.tokens, shard.lengths), allow_pickle=False)
    write_durably(signature_path(shard.folder, shard.info), stream.getvalue())


def has_ngrams(lengths: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """(documents,) which documents of these lengths, EOS included, hold an n-gram: sketches of others say nothing."""
    return lengths > NGRAM


def signatures(tokens: npt.NDArray[Any], lengths: npt.NDArray[np.int32]) -> Signatures:
    """Sketches (documents, BINS) of `tokens` (tokens,), documents of `lengths` end to end, each with EOS at its end."""
    ends = np.cumsum(lengths, dtype=np.int64)
    found = np.zeros((len(lengths), BINS), np.uint16)
    first = 0
    while first < len(lengths):
        start = int(ends[first]) - int(lengths[first])
        last = int(np.searchsorted(ends, start + _GROUP_TOKENS, side="right"))
        last = min(max(last, first + 1), first + _GROUP_DOCUMENTS)
        found[first:last] = _sketch(tokens[start : int(ends[last - 1])], lengths[first:last].astype(np.int64))
        first = last
    return found


def _sketch(tokens: npt.NDArray[Any], lengths: Integers) -> Signatures:
    counts = np.maximum(lengths - NGRAM, 0)  # n-grams of each document: EOS, its last token, is in none
    hashes = _ngram_hashes(tokens)
    owners = np.repeat(np.arange(len(lengths)), counts)
    starts = np.repeat(np.cumsum(lengths) - lengths - (np.cumsum(counts) - counts), counts)
    hashes = hashes[np.arange(len(owners)) + starts]  # those that lie within one document
    sketch = _fill(hashes, owners, len(lengths))
    open_documents = (sketch == _EMPTY).any(axis=1) & (counts > 0)
    if open_documents.any():
        chosen = open_documents[owners]
        _fill_up(sketch, *_distinct(hashes[chosen], owners[chosen], long=counts > _LONG))
    # The low half of the smallest hash is as random as before; two numbers agree by chance once in 65,536.
    return sketch.astype(np.uint16)


def _ngram_hashes(tokens: npt.NDArray[Any]) -> Words:
    """(tokens - NGRAM + 1,) hash of the n-gram that begins at each token."""
    hashes = np.zeros(max(len(tokens) - NGRAM + 1, 0), np.uint64)
    product = np.empty(_BLOCK, np.uint64)
    for start in range(0, len(hashes), _BLOCK):
        part = hashes[start : start + _BLOCK]
        ids = tokens[start : start + len(part) + NGRAM - 1].astype(np.uint64)
        for offset, factor in enumerate(_FACTORS):
            part += np.multiply(ids[offset : offset + len(part)], np.uint64(factor), out=product[: len(part)])
        _mix(part)
    return hashes


def _mix(values: Words) -> Words:
    """SplitMix64's finaliser (Steele et al. 2014), a bijection of 64 bits, in place."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def _fill(hashes: Words, owners: Integers, documents: int) -> npt.NDArray[np.uint32]:
    """(documents, BINS) smallest high half of the hashes that fall into each bin, the low bits say which."""
    sketch = np.full(documents * BINS, _EMPTY)
    for start in range(0, len(hashes), _BLOCK):
        part = hashes[start : start + _BLOCK]
        bins = owners[start : start + _BLOCK] * BINS + (part & np.uint64(BINS - 1)).view(np.int64)
        np.minimum.at(sketch, bins, (part >> np.uint64(32)).astype(np.uint32))
    return sketch.reshape(documents, BINS)


def _distinct(hashes: Words, owners: Integers, *, long: npt.NDArray[np.bool_]) -> tuple[Words, Integers]:
    """The n-grams of long documents once each: a long document with empty bins repeats itself many times."""
    chosen = long[owners]
    if not chosen.any():
        return hashes, owners
    numbers = np.unique(owners[chosen])
    single = [np.unique(hashes[slice(*np.searchsorted(owners, [number, number + 1]))]) for number in numbers.tolist()]
    hashes = np.concatenate([hashes[~chosen], *single])
    owners = np.concatenate([owners[~chosen], np.repeat(numbers, [len(part) for part in single])])
    order = np.argsort(owners, kind="stable")
    return hashes[order], owners[order]


def _fill_up(sketch: npt.NDArray[np.uint32], hashes: Words, owners: Integers) -> None:
    """Fill the empty bins of the documents that own `hashes`, in place; `owners` ascends."""
    for number in range(1, _RANDOM_ROUNDS):
        numbers, owners = np.unique(owners, return_inverse=True)
        rest = sketch[numbers]
        again = _fill(_mix(hashes + np.uint64(number * _GOLDEN % 2**64)), owners, len(numbers))
        rest = np.where(rest == _EMPTY, again, rest)
        sketch[numbers] = rest
        chosen = (rest == _EMPTY).any(axis=1)[owners]
        hashes, owners = hashes[chosen], numbers[owners[chosen]]
        if not len(hashes):
            return
    numbers, starts = np.unique(owners, return_index=True)
    rest = sketch[numbers]
    for column in range(BINS):
        round_hashes = _mix(hashes + np.uint64((_RANDOM_ROUNDS + column) * _GOLDEN % 2**64))
        smallest = np.minimum.reduceat((round_hashes >> np.uint64(32)).astype(np.uint32), starts)
        rest[:, column] = np.where(rest[:, column] == _EMPTY, smallest, rest[:, column])
    sketch[numbers] = rest
