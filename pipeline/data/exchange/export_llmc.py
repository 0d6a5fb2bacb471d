"""A prepared dataset as shards for llm.c, modded-nanogpt and whatever else reads their format.

In: a dataset folder. Out: `NAME_train_000000.bin` and so on in another folder, NAME being that of the dataset: 256
little-endian int32 (magic number, version, number of tokens, zeros), then the ids; see docs/data_format.md.
"""

from __future__ import annotations

import glob
import os
import shutil
from pathlib import Path

import numpy as np

from pipeline.data.dataset import TokenSplit, open_dataset
from pipeline.data.exchange.foreign_files import LLMC_DTYPES, LLMC_HEADER_INTS
from pipeline.data.manifest import SplitName
from pipeline.data.shards import token_dtype
from pipeline.errors import UserError
from pipeline.files import fsync_folder, naming
from pipeline.locks import locked

SHARD_TOKENS = 100_000_000
_BLOCK = 2**22  # tokens copied at once


def export_llmc(folder: Path, output: Path, *, split: SplitName, shard_tokens: int = SHARD_TOKENS) -> list[Path]:
    """Write one split as shards of at most `shard_tokens` tokens; return their paths in order.

    Our documents end with the end-of-document token, theirs begin with it: the stream is turned by one token, the
    last one first, so that both hold. No token is added, lost or changed; deleted documents are left out. Shards
    differ by at most one token in size and cut documents, as theirs do. They appear when all are written.

    Raises `UserError` for an empty split, an id outside the vocabulary, and for an output that holds such shards
    already or has too little space.
    """
    dataset = open_dataset(folder)
    tokens = dataset.split(split)
    if tokens.n_tokens == 0:
        raise UserError(f"{folder} has no {split} split to export")
    if int(tokens.tokens(tokens.n_tokens - 1, tokens.n_tokens)[0]) != dataset.eos_id:
        raise UserError(f"{folder} does not end with its token {dataset.eos_id}; prove it with --verify")
    if output.resolve() == folder.resolve():
        raise UserError(f"{output} is the dataset itself; choose another folder for the export")
    output.mkdir(parents=True, exist_ok=True)
    stem = f"{folder.resolve().name}_{split}_"
    count = -(-tokens.n_tokens // shard_tokens)
    paths = [output / f"{stem}{number:06d}.bin" for number in range(count)]
    key = next(key for key, dtype in LLMC_DTYPES.items() if dtype.itemsize == token_dtype(dataset.vocab_size).itemsize)
    with locked(output, ask_of_other_hosts=False):
        _check_output(output, stem, needed=tokens.n_tokens * LLMC_DTYPES[key].itemsize)
        _write_all(paths, tokens, key=key)
    return paths


def _check_output(output: Path, stem: str, *, needed: int) -> None:
    there = sorted(entry.name for entry in output.glob(f"{glob.escape(stem)}*.bin"))
    if there:
        raise UserError(f"{output} holds {there[0]} and {len(there) - 1} more like it; remove them or export elsewhere")
    free = shutil.disk_usage(output).free
    if free < needed:
        raise UserError(f"{output} has {free:,} bytes free, the export needs {needed:,}")


def _write_all(paths: list[Path], tokens: TokenSplit, *, key: tuple[int, int]) -> None:
    temporary = [path.with_name(path.name + ".tmp") for path in paths]
    try:
        for number, path in enumerate(temporary):
            start, stop = (tokens.n_tokens * part // len(paths) for part in (number, number + 1))
            _write(path, tokens, start=start, stop=stop, key=key)
        for old, new in zip(temporary, paths, strict=True):
            old.replace(new)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)  # gone already when renamed
    fsync_folder(paths[0].parent)


def _write(path: Path, tokens: TokenSplit, *, start: int, stop: int, key: tuple[int, int]) -> None:
    """One shard: ids [start, stop) of the stream turned by one token, behind its header."""
    header = np.zeros(LLMC_HEADER_INTS, "<i4")
    header[:3] = (*key, stop - start)
    with naming(path), path.open("wb") as file:
        file.write(header.tobytes())
        if start == 0:
            file.write(tokens.checked_tokens(tokens.n_tokens - 1, tokens.n_tokens).astype(LLMC_DTYPES[key]).tobytes())
        for first in range(max(start - 1, 0), stop - 1, _BLOCK):
            ids = tokens.checked_tokens(first, min(first + _BLOCK, stop - 1))
            file.write(ids.astype(LLMC_DTYPES[key]).tobytes())
        file.flush()
        os.fsync(file.fileno())
