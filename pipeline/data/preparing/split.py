"""Which documents are held out for validation.

In: a document. Out: what of it is for training and what for validation, whatever surrounds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import xxhash

from pipeline.data.manifest import SplitName
from pipeline.seeds import named_seed


@dataclass(frozen=True)
class SplitRule:
    """Which part of which document is held out.

    `hash`: a document whole, if its hash falls below `fraction`; equal texts land on one side, whatever
    surrounds them. `tail`: the last `fraction` of the characters of every document. `given`: the documents of
    certain inputs. `none`: nothing.
    """

    mode: Literal["hash", "tail", "given", "none"]
    fraction: float
    seed: int

    def describe(self) -> str:
        """The rule in words."""
        if self.mode == "none":
            return "no validation split"
        if self.mode == "given":
            return "the inputs of --val-input are val, the others train"
        if self.mode == "tail":
            return f"the last {self.fraction:g} of the characters of each document is val, the rest train"
        return f"a document is val if xxh3_64(text, seed {self.hash_seed}) < {self.fraction:g} * 2^64, else train"

    def draw(self, content: bytes) -> int:
        """The hash that decides on a document, uniform in [0, 2^64)."""
        return xxhash.xxh3_64_intdigest(content, seed=self.hash_seed)

    def side(self, draw: int, *, held_out: bool) -> SplitName:
        """Where a whole document goes. `held_out`: it is of an input given for validation."""
        if self.mode == "hash":
            held_out = draw < self._limit
        return "val" if held_out else "train"

    def parts(self, content: bytes) -> dict[SplitName, bytes]:
        """What of a document goes where in mode `tail`; parts may be empty."""
        assert self.mode == "tail", f"mode {self.mode} keeps documents whole"
        text = content.decode()
        cut = int(len(text) * (1 - self.fraction))
        return {"train": text[:cut].encode(), "val": text[cut:].encode()}

    @cached_property
    def _limit(self) -> int:
        return int(self.fraction * 2**64)

    @cached_property
    def hash_seed(self) -> int:
        """Seed of the hash, split from the one that the user gave."""
        return named_seed(self.seed, "data", "split")
