"""Datasets written by hand, in bytes: which text stands in which shard is up to the test."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pipeline.data.dataset import TokenSplit
from pipeline.data.manifest import InputInfo, Manifest, ShardInfo, SplitName, data_digest, write_manifest
from pipeline.data.shards import DOCUMENT_DTYPE, ShardWriter
from pipeline.data.tokenizer import TextTokenizer, load_tokenizer

BYTES = load_tokenizer("bytes")


def write_shard(
    folder: Path, name: str, texts: Sequence[str], *, tokenizer: TextTokenizer = BYTES, vocab_size: int | None = None
) -> ShardInfo:
    with ShardWriter(folder, name, vocab_size=vocab_size or tokenizer.vocab_size) as writer:
        for row, text in enumerate(texts):
            ids = np.array([*tokenizer.encode(text), tokenizer.eos_id])
            digest = xxhash.xxh3_128_intdigest(text.encode())
            record = (len(text.encode()), 0, row, (digest & (2**64 - 1), digest >> 64))
            writer.append(ids, lengths=np.array([len(ids)]), documents=np.array([record], DOCUMENT_DTYPE))
        shard = writer.commit()
    assert shard is not None
    return shard


def write_dataset(
    folder: Path, splits: Mapping[SplitName, Sequence[Sequence[str]]], *, tokenizer: TextTokenizer = BYTES
) -> Path:
    """A complete dataset: for each split the texts of each of its shards, rows of one input in this order."""
    folder.mkdir()
    tokenizer.save(folder / "tokenizer.json")
    infos: dict[SplitName, tuple[ShardInfo, ...]] = {}
    for split, shards in splits.items():
        names = [f"{split}-{number:05d}" for number in range(len(shards))]
        written = [
            write_shard(folder, name, texts, tokenizer=tokenizer) for name, texts in zip(names, shards, strict=True)
        ]
        earlier = np.cumsum([0, *(shard.documents for shard in written)]).tolist()
        infos[split] = tuple(
            shard.model_copy(update={"continues": rows}) for shard, rows in zip(written, earlier, strict=False)
        )
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "int32"
    digest = data_digest(infos, tokenizer_fingerprint=tokenizer.fingerprint, dtype=dtype)
    manifest = Manifest.model_validate(
        {
            "format_version": 2,
            "dtype": dtype,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "data_digest": digest,
            "split_rule": "by hand",
            "splits": infos,
            "records": sum(len(texts) for shards in splits.values() for texts in shards),
            "drops": {},
            "noticed": {},
            "settings": {},
            "inputs": (InputInfo(name="by hand", kind="text", size=1, fingerprint="1"),),
        }
    )
    write_manifest(folder, manifest)
    return folder


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the values of a manifest, whatever becomes of it."""
    values = json.loads((folder / "manifest.json").read_text())
    change(values)
    (folder / "manifest.json").write_text(json.dumps(values))


def damage(path: Path, offset: int) -> None:
    """Flip the lowest bit of one byte."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def texts_of(split: TokenSplit) -> list[str]:
    """The documents of a split of bytes, decoded without the tokenizer."""
    ids = split.tokens(0, split.n_tokens)
    return [
        bytes(part.tolist()).decode() for part in np.split(ids, np.flatnonzero(ids == 256) + 1) for part in [part[:-1]]
    ][:-1]
