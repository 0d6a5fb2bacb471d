"""Look into a dataset and prove it whole.

In: a dataset folder. Out: a description, or the verdict on its checksums, boundaries, ids and texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from pipeline.data.dataset import TokenSplit, open_dataset, open_shards
from pipeline.data.manifest import TOKENIZER_NAME, Manifest, SplitName, data_digest, read_manifest
from pipeline.data.shards import Shard
from pipeline.data.tokenizer import TextTokenizer
from pipeline.errors import UserError

_BLOCK = 2**24
_SAMPLED_DOCUMENTS = 20
_SAMPLED_TOKENS = 100_000
"""Longer documents are not decoded in the sample."""


def verify(path: str | Path) -> str:
    """Check every byte of a dataset and return a line that says so.

    Checksums, document boundaries, ids below the vocabulary's size, exactly one EOS in a document, at its end,
    and the text of a sample of documents. Raises `UserError` that lists all findings.
    """
    open_dataset(path)  # refuses what cannot be opened at all
    folder = Path(path).expanduser()
    manifest = read_manifest(folder)
    tokenizer = TextTokenizer.from_file(folder / TOKENIZER_NAME, eos=manifest.eos_id)
    findings = list(_check_identity(manifest, tokenizer))
    documents = 0
    for shards in open_shards(folder, manifest).values():
        for shard in shards:
            findings += _check_files(shard)
            findings += _check_boundaries(shard) or [*_check_ids(shard, manifest), *_check_texts(shard, tokenizer)]
            documents += shard.info.documents
    if findings:
        raise UserError(f"{path} is damaged:\n" + "\n".join(f"  {line}" for line in findings))
    return f"{path} is whole: {documents:,} documents, digest {manifest.data_digest[:16]}"


def _check_identity(manifest: Manifest, tokenizer: TextTokenizer) -> Iterator[str]:
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        yield f"tokenizer.json: expected fingerprint {manifest.tokenizer_fingerprint}, found {tokenizer.fingerprint}"
    digest = data_digest(manifest.splits, tokenizer_fingerprint=manifest.tokenizer_fingerprint, dtype=manifest.dtype)
    if digest != manifest.data_digest:
        yield f"manifest.json: expected data digest {manifest.data_digest}, found {digest}"


def _check_files(shard: Shard) -> Iterator[str]:
    for name, wanted in shard.info.files.items():
        checksum = xxhash.xxh3_128()
        with (shard.folder / name).open("rb") as file:
            while block := file.read(_BLOCK):
                checksum.update(block)
        if checksum.hexdigest() != wanted.checksum:
            yield f"{name}: expected checksum {wanted.checksum}, found {checksum.hexdigest()}"


def _check_boundaries(shard: Shard) -> list[str]:
    """Pointers must be the running sum of lengths and end at the file's end."""
    ends = np.cumsum(shard.lengths, dtype=np.int64)
    expected = np.concatenate(([0], ends[:-1])) * shard.dtype.itemsize
    if not np.array_equal(expected, shard.pointers) or int(ends[-1]) != len(shard.tokens):
        return [f"{shard.info.name}.idx: documents do not lie end to end in the {len(shard.tokens)} tokens of .bin"]
    try:
        records = len(shard.documents)
    except ValueError as error:
        return [f"{shard.info.name}.docs.npy: {error}"]
    if records != shard.info.documents:
        return [f"{shard.info.name}.docs.npy: expected {shard.info.documents} records, found {records}"]
    return []


def _check_ids(shard: Shard, manifest: Manifest) -> Iterator[str]:
    ends = np.cumsum(shard.lengths, dtype=np.int64) - 1
    for start in range(0, len(shard.tokens), _BLOCK):
        block = shard.tokens[start : start + _BLOCK]
        if int(block.max()) >= manifest.vocab_size or int(block.min()) < 0:
            yield f"{shard.info.name}.bin: id {int(block.max())} is outside the vocabulary of {manifest.vocab_size}"
        found = np.flatnonzero(block == manifest.eos_id) + start
        low, high = np.searchsorted(ends, [start, start + len(block)])
        if not np.array_equal(found, ends[low:high]):
            yield f"{shard.info.name}.bin: in tokens {start} to {start + len(block)} EOS is not just at document ends"


def _check_texts(shard: Shard, tokenizer: TextTokenizer) -> Iterator[str]:
    """A document decodes to the text whose hash was recorded, or, where decoding loses something, encodes alike."""
    count = shard.info.documents
    for number in sorted({count * i // _SAMPLED_DOCUMENTS for i in range(_SAMPLED_DOCUMENTS)}):
        length, start = int(shard.lengths[number]), int(shard.pointers[number]) // shard.dtype.itemsize
        if length > _SAMPLED_TOKENS:
            continue
        ids = shard.tokens[start : start + length - 1].tolist()
        text = tokenizer.decode(ids)
        digest = xxhash.xxh3_128_intdigest(text.encode(errors="replace"))
        low, high = (int(half) for half in shard.documents["hash"][number])
        if digest != low | high << 64 and tokenizer.encode(text) != ids:
            yield f"{shard.info.name}, document {number}: decodes to another text than it was made from"


def inspect(path: str | Path) -> str:
    """Describe a dataset: counts, lengths of documents, the beginning of some."""
    dataset, manifest = open_dataset(path), read_manifest(Path(path).expanduser())
    tokenizer = TextTokenizer.from_file(dataset.path / TOKENIZER_NAME, eos=dataset.eos_id)
    lines = [
        f"{path}: vocabulary {dataset.vocab_size:,}, {manifest.dtype}, EOS {dataset.eos_id} {tokenizer.eos_token!r}",
        f"digest {dataset.data_digest}",
        f"tokenizer {dataset.tokenizer_fingerprint}",
        f"split: {manifest.split_rule}",
        f"records: {manifest.records:,}, dropped: {manifest.drops or 'none'}",
        f"inputs: {', '.join(source.name for source in manifest.inputs[:5])}"
        + (f" and {len(manifest.inputs) - 5} more" if len(manifest.inputs) > 5 else ""),
        *(f"  {key}: {value}" for key, value in manifest.settings.items()),
    ]
    for split in manifest.splits:
        lines += _describe_split(split, dataset.split(split), tokenizer)
    return "\n".join(lines)


def _describe_split(name: SplitName, split: TokenSplit, tokenizer: TextTokenizer) -> list[str]:
    lines = [f"{name}: {split.n_documents:,} documents, {split.n_tokens:,} tokens, {split.text_bytes:,} bytes of text"]
    if not split.n_documents:
        return lines
    lines.append("  tokens a document: " + _histogram(split.lengths))
    starts = np.cumsum(split.lengths, dtype=np.int64) - split.lengths
    for number in sorted({0, split.n_documents // 2, split.n_documents - 1}):
        start, info = int(starts[number]), split.describe(number)
        text = tokenizer.decode(split.tokens(start, start + min(info.tokens - 1, 40)).tolist())
        lines.append(f"  document {number} ({info.source}, row {info.row}, {info.tokens:,} tokens): {text!r}")
    return lines


def _histogram(lengths: np.ndarray[tuple[int], np.dtype[np.int32]]) -> str:
    """Documents by powers of two of their lengths."""
    exponents, counts = np.unique(np.floor(np.log2(np.maximum(lengths, 1))).astype(int), return_counts=True)
    return ", ".join(f"{2**e:,}-{2 ** (e + 1) - 1:,}: {n:,}" for e, n in zip(exponents, counts, strict=True))
