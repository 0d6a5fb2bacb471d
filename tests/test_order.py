"""Permutations against what a shuffle is: a bijection, every arrangement as likely as any other."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from pipeline.data.order import mix_keys, permute, share
from pipeline.seeds import named_seed

AROUND = [2**16 - 1, 2**16, 2**16 + 1, 255**2, 255**2 + 1, 256**2 - 256]


@pytest.mark.parametrize("n", [*range(1, 301), *AROUND])
def test_permutation_is_a_bijection(n: int) -> None:
    for key in (0, 99, 2**64 - 1):
        assert sorted(permute(np.arange(n), n=n, key=key).tolist()) == list(range(n))


@pytest.mark.parametrize("n", [2**32 - 1, 2**32, 2**32 + 9, 3 * 2**40 + 1, 2**53 + 1, 2**62 - 1])
def test_large_permutations_stay_inside_and_never_meet(n: int) -> None:
    picked = np.concatenate([np.arange(50_000), n - 1 - np.arange(50_000)])
    result = permute(picked, n=n, key=7)
    assert len(set(result.tolist())) == len(picked)
    assert 0 <= result.min() <= result.max() < n
    halves = (result < n // 2).mean()
    assert abs(halves - 0.5) < 5 * 0.5 / np.sqrt(len(picked))


def test_sizes_and_keys_of_their_own() -> None:
    """Elements together as each alone."""
    generator = np.random.default_rng(3)
    sizes = generator.choice([1, 2, 3, 15, 16, 17, 1000, 2**20 + 1, 2**40], size=400)
    keys = generator.integers(0, 2**64, size=400, dtype=np.uint64)
    indices = generator.integers(0, sizes)
    together = permute(indices, n=sizes, key=keys)
    alone = [
        int(permute(np.array([index]), n=int(n), key=int(key))[0])
        for index, n, key in zip(indices, sizes, keys, strict=True)
    ]
    assert together.tolist() == alone
    same_size = permute(np.arange(50), n=50, key=keys[:50])
    assert same_size.tolist() == permute(np.arange(50), n=np.full(50, 50), key=keys[:50]).tolist()
    assert len(permute(np.zeros(0, np.int64), n=5, key=1)) == 0


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_every_arrangement_is_as_likely(n: int) -> None:
    """All n! of them over many keys; the bound on chi squared is five standard deviations."""
    draws = 24_000
    keys = np.repeat(mix_keys(5, np.arange(draws)), n)
    arranged = permute(np.tile(np.arange(n), draws), n=n, key=keys).reshape(draws, n)
    found = Counter(map(tuple, arranged.tolist()))
    assert set(found) == set(permutations(range(n)))
    expected = draws / len(found)
    chi = sum((count - expected) ** 2 / expected for count in found.values())
    freedom = len(found) - 1
    assert chi < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [10, 100])
def test_every_place_is_as_likely(n: int) -> None:
    draws = 60 * n
    keys = np.repeat([named_seed(3, "order", "digest", epoch) for epoch in range(draws)], n)
    places = permute(np.tile(np.arange(n), draws), n=n, key=keys).reshape(draws, n)
    found = np.stack([np.bincount(column, minlength=n) for column in places.T])
    chi = float(((found - draws / n) ** 2 / (draws / n)).sum())
    freedom = (n - 1) ** 2
    assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom)


def test_orders_mix_and_are_unlike_each_other() -> None:
    """Correlations of a shuffle with itself one place on, with the identity and with other shuffles: all zero."""
    n = 100_000
    orders = [permute(np.arange(n), n=n, key=key).astype(float) for key in (1, 2, 3, named_seed(1, "order", 0))]
    bound = 5 / np.sqrt(n)
    for number, order in enumerate(orders):
        for other in (np.arange(n), *orders[:number]):
            assert abs(np.corrcoef(order, other)[0, 1]) < bound
            assert (order == other).sum() < 12  # a Poisson number of mean 1
        for step in (1, 2, 16, 316, 317):  # 317 is the width of the grid
            assert abs(np.corrcoef(order[:-step], order[step:])[0, 1]) < bound


def test_mixed_keys_differ_in_every_part() -> None:
    grid = [mix_keys(key, epoch, np.arange(50)) for key in range(10) for epoch in range(10)]
    assert len(set(np.concatenate(grid).tolist())) == 10 * 10 * 50
    assert mix_keys(3, 4, 5).tolist() == [mix_keys(3, np.full(9, 4), np.arange(9))[5]]
    assert mix_keys(3, 4, 5).tolist() != mix_keys(3, 5, 4).tolist()


def test_shares_cover_everything_once() -> None:
    for total in range(20):
        for parts in range(1, 8):
            pieces = [list(share(total, part=part, parts=parts)) for part in range(parts)]
            assert [i for piece in pieces for i in piece] == list(range(total))
            assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
