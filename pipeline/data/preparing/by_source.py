"""What each input brought into a dataset: documents, tokens, drops, and excerpts of its texts.

In: the folder of a dataset. Out: lines for people.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from pipeline.data.dataset import TokenSplit
from pipeline.data.deleting.deletion import open_shard
from pipeline.data.manifest import Manifest, SplitName
from pipeline.data.preparing.finish import QUARANTINE_NAME
from pipeline.data.shards import REMEDY
from pipeline.data.tokenizer import TextTokenizer
from pipeline.errors import counted
from pipeline.untrusted import DamagedFileError, check_regular, parse_json

SHOWN_INPUTS = 20
"""Inputs that are listed, the largest first."""
EXCERPT_INPUTS = 10
EXCERPT_TOKENS = 40


Integers = np.ndarray[tuple[int], np.dtype[np.int64]]


class _Drop(BaseModel):
    """What is read of a line of `quarantine.jsonl`."""

    source: str
    reason: str


def sources_of(folder: Path, manifest: Manifest, split: SplitName) -> tuple[Integers, Integers]:
    """(documents,) number of the input of each document of a split, and (inputs,) tokens of each; deleted ones left
    out."""
    numbers, tokens = [np.zeros(0, np.int64)], np.zeros(len(manifest.inputs), np.int64)
    for info in manifest.splits.get(split, ()):
        shard = open_shard(folder, info, dtype=manifest.dtype)
        kept = slice(None) if shard.keep is None else shard.keep
        sources = shard.documents["source"].astype(np.int64)[kept]
        if len(unknown := sources[(sources < 0) | (sources >= len(tokens))]):
            raise DamagedFileError(
                f"{folder / info.name}.docs.npy is damaged: a document is of input {int(unknown[0])}, the manifest has "
                f"{len(tokens)}; {REMEDY}"
            )
        lengths = np.asarray(shard.lengths, np.float64)[kept]
        tokens += np.bincount(sources, weights=lengths, minlength=len(tokens)).astype(np.int64)
        numbers.append(sources)
    return np.concatenate(numbers), tokens


def drops_of(folder: Path) -> dict[str, Counter[str]]:
    """Dropped records by input and reason, as `quarantine.jsonl` lists them."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    path = folder / QUARANTINE_NAME
    if path.exists():
        check_regular(path)
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                drop = parse_json(_Drop, line, origin=f"{path}, line {number}")
                found[drop.source][drop.reason] += 1
    return found


def describe_inputs(folder: Path, manifest: Manifest) -> Iterator[str]:
    """A line for each input, those with most tokens first: its documents and tokens by split, and its drops."""
    splits = {split: sources_of(folder, manifest, split) for split in manifest.splits}
    documents = {split: np.bincount(numbers, minlength=len(manifest.inputs)) for split, (numbers, _) in splits.items()}
    drops = drops_of(folder)
    for number in largest(splits, manifest)[:SHOWN_INPUTS]:
        name = manifest.inputs[number].name
        held = [
            f"{split} {counted(int(documents[split][number]), 'document')}, {counted(int(tokens[number]), 'token')}"
            for split, (_, tokens) in splits.items()
        ]
        lost = ", ".join(f"{count:,} x {reason}" for reason, count in drops.get(name, Counter()).items())
        yield f"  {name}: {'; '.join(held)}" + (f"; dropped {lost}" if lost else "")
    if len(manifest.inputs) > SHOWN_INPUTS:
        yield f"  and {len(manifest.inputs) - SHOWN_INPUTS} more"


def largest(splits: dict[SplitName, tuple[Integers, Integers]], manifest: Manifest) -> list[int]:
    """Numbers of the inputs, those with most tokens first."""
    total = sum((tokens for _, tokens in splits.values()), np.zeros(len(manifest.inputs), np.int64))
    order: list[int] = np.argsort(-total, kind="stable").tolist()
    return order


def excerpts(
    folder: Path,
    manifest: Manifest,
    name: SplitName,
    split: TokenSplit,
    tokenizer: TextTokenizer,
    *,
    count: int,
    seed: int,
) -> Iterator[str]:
    """How `count` random documents of each of the largest inputs begin, in the order of the split."""
    sources, tokens = sources_of(folder, manifest, name)
    generator = random.Random(seed)
    chosen: list[int] = []
    for number in largest({name: (sources, tokens)}, manifest)[:EXCERPT_INPUTS]:
        documents = np.flatnonzero(sources == number)
        drawn = generator.sample(range(len(documents)), min(count, len(documents)))
        chosen += documents[drawn].tolist()
    starts = np.cumsum(split.lengths, dtype=np.int64) - split.lengths
    for document in sorted(chosen):
        start, info = int(starts[document]), split.describe(document)
        text = tokenizer.decode(split.checked_tokens(start, start + min(info.tokens - 1, EXCERPT_TOKENS)).tolist())
        yield f"  document {document} ({info.source}, row {info.row}, {counted(info.tokens, 'token')}): {text!r}"
