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
SIDE = 4  # smaller grids know too few permutations, so tiny n are walked within 4 x 4
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def permute(indices: Indices, *, n: ArrayLike, key: ArrayLike) -> Indices:
    """Where a keyed bijection of 0..n-1 sends `indices` (k,): a shuffle in O(1) memory.

    n: one size in [1, 2^62) or one per index (k,). key: likewise, any 64 bits. Each (n, key) is a bijection of its own.
    A generalised Feistel network over a grid of a x b >= n numbers, walked until the result is below n (Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains"). The grid has at most sqrt(n) + 1 numbers too many, so that
    hardly any index walks; over a power of two, which is the commoner choice, up to half of them would.
    """
    sizes = np.atleast_1d(np.asarray(n, dtype=np.uint64))
    # a need not be exact, nor is the root of a large n: any a and b with a x b >= n make a bijection
    a = np.maximum(np.ceil(np.sqrt(sizes)).astype(np.uint64), SIDE)
    b = np.maximum((sizes - np.uint64(1)) // a + np.uint64(1), SIDE)
    keys = _round_keys(np.atleast_1d(np.asarray(key, dtype=np.uint64)))
    result = _feistel(indices.astype(np.uint64), a=a, b=b, keys=keys)
    outside = np.flatnonzero(result >= sizes)
    while len(outside):
        chosen = {"a": _each(a, outside), "b": _each(b, outside), "keys": _each(keys, outside)}
        result[outside] = _feistel(result[outside], **chosen)
        outside = outside[result[outside] >= _each(sizes, outside)]
    return result.astype(np.int64)


def mix_keys(key: int, *parts: ArrayLike) -> Words:
    """A key (k,) from `key` and each of `parts`, integers or arrays (k,): any difference gives another one."""
    state = _mix(np.array([key], dtype=np.uint64))  # neighbouring keys are far apart before a part can bridge them
    for part in parts:
        state = _mix((state ^ np.asarray(part).astype(np.uint64)) + GOLDEN)
    return state


def share(total: int, *, part: int, parts: int) -> range:
    """Contiguous share number `part` of 0..total-1 among `parts`; sizes differ by at most one."""
    return range(total * part // parts, total * (part + 1) // parts)


def _each(values: Words, chosen: Indices) -> Words:
    """The last axis of `values` for the chosen indices; a single value serves all of them."""
    return values if values.shape[-1] == 1 else values[..., chosen]


def _feistel(values: Words, *, a: Words, b: Words, keys: Words) -> Words:
    """One pass: values (k,) below a x b, both (k or 1,), keys (ROUNDS, k or 1). The coordinates turn each other."""
    row, column = np.divmod(values, b)
    for number in range(0, ROUNDS, 2):
        row = (row + _scatter(column, keys[number])) % a
        column = (column + _scatter(row, keys[number + 1])) % b
    return row * b + column


def _scatter(values: Words, key: Words) -> Words:
    """A round's function, 32 bits that depend on all of value and key. Unsigned arithmetic wraps by intent."""
    mixed = (values + key) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0x94D049BB133111EB)
    return mixed >> np.uint64(32)


def _round_keys(keys: Words) -> Words:
    """(k,) -> (ROUNDS, k)."""
    return _mix(keys + GOLDEN * np.arange(1, ROUNDS + 1, dtype=np.uint64)[:, None])


def _mix(values: Words) -> Words:
    """SplitMix64's finaliser (Steele et al. 2014), a bijection of 64 bits."""
    mixed = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
