"""Named seeds: every random choice has its own stream, split from the run's one seed.

In: the run's seed and a name such as ("dropout", step, micro_batch). Out: a 63-bit integer. Streams
never share state, so evaluating or logging more often cannot change what training draws.
"""

from __future__ import annotations

import hashlib


def named_seed(seed: int, *name: str | int) -> int:
    """Return a seed in [0, 2^63) that depends on `seed` and every part of `name`.

    Parts are hashed with their types and lengths (BLAKE2b), so ("a", 12) and ("a1", 2) differ, and
    the value is the same on every machine and Python version.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (seed, *name):
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(4, "little") + text)
    return int.from_bytes(digest.digest(), "little") >> 1
