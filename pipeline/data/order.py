"""Shuffles without memory: where a keyed permutation of 0..n-1 sends a number, and who gets which share.

In: indices, sizes and keys, one each or one per index. Out: indices. Nothing is stored and nothing is drawn in
turn, so that any position of any order is known at once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Indices = NDArray[np.int64]
Words = NDArray[np.uint64]

ROUNDS = 6  # an even number; four make a network pseudorandom (Luby and Rackoff 1988), six leave a margin
SMALLEST = 4  # bits: smaller networks know too few permutations, so tiny n are walked within 16
POWERS = np.uint64(1) << np.arange(64, dtype=np.uint64)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def permute(indices: Indices, *, n: ArrayLike, key: ArrayLike) -> Indices:
    """Where a keyed bijection of 0..n-1 sends `indices` (k,): a shuffle in O(1) memory.

    n: one size in [1, 2^63) or one per index (k,). key: likewise, any 64 bits. Each (n, key) is a bijection of its own.
    A Feistel network over the smallest power of two that holds n, walked until the result is below n (Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    sizes = np.atleast_1d(np.asarray(n, dtype=np.uint64))
    # the bit length of n - 1, by comparison: a floating-point logarithm is off by one for some n
    bits = np.maximum(np.searchsorted(POWERS, sizes - np.uint64(1), side="right"), SMALLEST).astype(np.uint64)
    keys = _round_keys(np.atleast_1d(np.asarray(key, dtype=np.uint64)))
    result = _feistel(indices.astype(np.uint64), bits=bits, keys=keys)
    outside = np.flatnonzero(result >= sizes)
    while len(outside):
        left = _each(sizes, outside)
        walked = _feistel(result[outside], bits=_each(bits, outside), keys=_each(keys, outside))
        result[outside] = walked
        outside = outside[walked >= left]
    return result.astype(np.int64)


def mix_keys(key: int, *parts: ArrayLike) -> Words:
    """A key (k,) from `key` and each of `parts`, integers or arrays (k,): any difference gives another one."""
    state = np.array([key], dtype=np.uint64)
    for part in parts:
        state = _mix((state + GOLDEN) ^ np.asarray(part).astype(np.uint64))
    return state


def share(total: int, *, part: int, parts: int) -> range:
    """Contiguous share number `part` of 0..total-1 among `parts`; sizes differ by at most one."""
    return range(total * part // parts, total * (part + 1) // parts)


def _each(values: Words, chosen: Indices) -> Words:
    """The last axis of `values` for the chosen indices; a single value serves all of them."""
    return values if values.shape[-1] == 1 else values[..., chosen]


def _feistel(values: Words, *, bits: Words, keys: Words) -> Words:
    """One pass: values (k,) below 2^bits, bits (k or 1,), keys (ROUNDS, k or 1). Halves take turns, none is swapped."""
    word, one = np.uint64(64), np.uint64(1)
    left_bits = bits >> one
    right_bits = bits - left_bits
    left, right = values >> right_bits, values & ((one << right_bits) - one)
    for number in range(0, ROUNDS, 2):
        left ^= _scatter(right, keys[number]) >> (word - left_bits)
        right ^= _scatter(left, keys[number + 1]) >> (word - right_bits)
    return (left << right_bits) | right


def _scatter(values: Words, key: Words) -> Words:
    """A round's function: its highest bits depend on all of value and key. Unsigned arithmetic wraps by intent."""
    mixed = (values + key) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0x94D049BB133111EB)
    return mixed


def _round_keys(keys: Words) -> Words:
    """(k,) -> (ROUNDS, k)."""
    return _mix(keys + GOLDEN * np.arange(1, ROUNDS + 1, dtype=np.uint64)[:, None])


def _mix(values: Words) -> Words:
    """SplitMix64's finaliser (Steele et al. 2014), a bijection of 64 bits."""
    mixed = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
