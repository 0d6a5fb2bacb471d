"""Look into a dataset and prove it whole.

In: a dataset folder. Out: a description, or the verdict on its checksums, boundaries, ids and texts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import xxhash

from pipeline.data.dataset import TokenSplit, open_dataset
from pipeline.data.deleting.deletion import REASONS, counts, kept_by_reasons, open_shard
from pipeline.data.manifest import TOKENIZER_NAME, Counts, Manifest, SplitName, data_digest, read_manifest
from pipeline.data.preparing.by_source import describe_inputs, excerpts
from pipeline.data.preparing.compare import InputState, compare_inputs
from pipeline.data.shards import Shard
from pipeline.data.tokenizer import TextTokenizer
from pipeline.errors import UserError, counted, readable
from pipeline.files import expanded

_BLOCK = 2**24
_SAMPLED_DOCUMENTS = 20
_SAMPLED_TOKENS = 100_000
"""Longer documents are not decoded in the sample."""


def verify(path: str | Path) -> str:
    """Check every byte of a dataset and return a line that says so.

    Checksums, document boundaries, ids below the vocabulary's size, exactly one EOS in a document, at its end, the
    order of documents, what bitmaps delete, the text of a sample of documents; and that of a whole dataset the inputs
    which are still there are what they were. Raises `UserError` that lists all findings.
    """
    open_dataset(path)  # refuses what cannot be opened at all
    folder = expanded(path)
    manifest = read_manifest(folder)
    tokenizer = TextTokenizer.from_file(folder / TOKENIZER_NAME, eos=manifest.eos_id)
    findings = list(_check_identity(manifest, tokenizer))
    incomparable: list[str] = []
    for infos in manifest.splits.values():
        last = (0, 0)
        for info in infos:
            shard = open_shard(folder, info, dtype=manifest.dtype)
            findings += _check_files(shard)
            try:
                _check_boundaries(shard)
                faults, last = _check_order(shard, last, inputs=len(manifest.inputs))
                faults += _check_bitmaps(shard)
                ids = list(_check_ids(shard, manifest))
                findings += [*faults, *ids, *([] if ids else _check_texts(shard, tokenizer, incomparable))]
            except UserError as error:  # what reads a file has found it damaged
                findings.append(str(error))
    inputs = compare_inputs(folder, manifest) if not findings else InputState()
    if findings or inputs.changed:
        state = "is damaged" if findings else "is whole, but not made of what its inputs are now"
        remedy = [] if not findings else ["remove the files named and run the command that prepared it again"]
        raise UserError("\n  ".join([f"{path} {state}:", *findings, *inputs.changed, *remedy]))
    notes = [f"\nnote: {name} bears another time, but holds the same documents" for name in inputs.touched]
    if incomparable:
        notes.append(
            f"\nnote: {counted(len(incomparable), 'document')} of the sample, such as {incomparable[0]}, could not be "
            "compared with the text: unknown tokens stand for some of it"
        )
    if inputs.gone:
        notes.append(f"\nnote: not here to be compared: {inputs.gone} of {counted(len(manifest.inputs), 'input')}")
    documents = sum(info.documents for infos in manifest.splits.values() for info in infos)
    return f"{path} is whole: {counted(documents, 'document')}, digest {manifest.data_digest[:16]}{''.join(notes)}"


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


def _check_boundaries(shard: Shard) -> None:
    """Raise `UserError` for an index or records that are not of these documents; other tools read all of the index."""
    n = shard.info.documents
    if not np.array_equal(shard.sequence_numbers, np.arange(n + 1)) or len(shard.lengths) != len(shard.documents):
        raise UserError(f"{shard.info.name}.idx: expected one sequence a document, 0 to {n}")


def _check_order(shard: Shard, last: tuple[int, int], *, inputs: int) -> tuple[list[str], tuple[int, int]]:
    """Documents stand in the order of the inputs and their rows, after `last`; also returns the last (input, row)."""
    sources = shard.documents["source"].astype(np.int64)
    rows = shard.documents["row"] + np.where(sources == sources[0], shard.info.continues, 0)
    before = [np.concatenate(([start], part[:-1])) for start, part in zip(last, (sources, rows), strict=True)]
    back = np.flatnonzero((sources < before[0]) | ((sources == before[0]) & (rows < before[1])))
    faults = []
    if len(back):
        place = int(back[0])
        faults.append(
            f"{shard.info.name}, document {place}: input {sources[place]}, row {rows[place]} stands after input "
            f"{before[0][place]}, row {before[1][place]}"
        )
    unknown = sources[(sources < 0) | (sources >= inputs)]
    if len(unknown):
        faults.append(f"{shard.info.name}.docs.npy: input {int(unknown[0])} named, the manifest has {inputs}")
    return faults, (int(sources[-1]), int(rows[-1]))


def _check_bitmaps(shard: Shard) -> Iterator[str]:
    """`keep` is what all reasons to delete leave, and `deleted` says how much that is not."""
    keep = shard.keep if shard.keep is not None else np.ones(shard.n_documents, np.bool_)
    wrong = int((keep != kept_by_reasons(shard)).sum())
    if wrong:
        against = " and ".join(REASONS)
        yield f"{shard.info.name}: {counted(wrong, 'document')} kept or deleted against what {against} say"
    found = counts(shard, ~keep)
    if found != shard.info.deleted:
        expected = shard.info.deleted.model_dump()
        yield f"{shard.info.name}: expected as deleted {expected}, the bitmap deletes {found.model_dump()}"


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


def _check_texts(shard: Shard, tokenizer: TextTokenizer, incomparable: list[str]) -> Iterator[str]:
    """A document decodes to the text whose hash was recorded, or, where decoding loses something, encodes alike.

    `incomparable` is told of those that can do neither: what an unknown token stood for is lost.
    """
    count = shard.info.documents
    for number in sorted({count * i // _SAMPLED_DOCUMENTS for i in range(_SAMPLED_DOCUMENTS)}):
        length, start = int(shard.lengths[number]), int(shard.pointers[number]) // shard.dtype.itemsize
        if length > _SAMPLED_TOKENS:
            continue
        ids = shard.tokens[start : start + length - 1].tolist()
        text = tokenizer.decode(ids)
        digest = xxhash.xxh3_128_intdigest(text.encode(errors="replace"))
        low, high = (int(half) for half in shard.documents["hash"][number])
        if digest == low | high << 64:
            continue
        if tokenizer.unknown_id is not None and tokenizer.unknown_id in ids:
            incomparable.append(f"{shard.info.name}, document {number}")
        elif tokenizer.encode(text) != ids:
            yield f"{shard.info.name}, document {number}: decodes to another text than it was made from"


def inspect(path: str | Path, *, excerpts_of_each: int = 3, seed: int | None = None) -> str:
    """Describe a dataset: counts, by input too, what was dropped, noticed and deleted, lengths, how documents begin.

    Args:
        path: the folder.
        excerpts_of_each: documents of each input to show.
        seed: decides which; None: another draw each time, which the description names.
    """
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    dataset, manifest = open_dataset(path), read_manifest(expanded(path))
    tokenizer = TextTokenizer.from_file(dataset.path / TOKENIZER_NAME, eos=dataset.eos_id)
    lines = [
        f"{path}: vocabulary {dataset.vocab_size:,}, {manifest.dtype}, EOS {dataset.eos_id} {tokenizer.eos_token!r}",
        f"digest {dataset.data_digest}",
        f"tokenizer {dataset.tokenizer_fingerprint}",
        f"split: {manifest.split_rule}",
        f"records: {manifest.records:,}, dropped: {_listed(manifest.drops)}",
        f"noticed: {_listed(manifest.noticed)}",
        *(f"failed: {failure.unit}: {failure.reason}" for failure in manifest.failed),
        *_describe_deletions(manifest),
        f"inputs: {len(manifest.inputs):,}",
        *describe_inputs(dataset.path, manifest),
        "settings:",
        *(f"  {key}: {value}" for key, value in manifest.settings.items()),
    ]
    for name in manifest.splits:
        split = dataset.split(name)
        lines += _describe_split(name, split, manifest)
        if split.n_documents and excerpts_of_each:
            lines.append(f"  excerpts, drawn with --seed {seed}:")
            lines += excerpts(dataset.path, manifest, name, split, tokenizer, count=excerpts_of_each, seed=seed)
    return "\n".join(map(readable, lines))


def _listed(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} x {what}" for what, count in numbers.items()) or "none"


def _describe_deletions(manifest: Manifest) -> Iterator[str]:
    """What was deleted as duplicate and found contaminated."""
    duplicates, contamination = manifest.deduplication, manifest.contamination
    if duplicates is None:
        yield "duplicates: not looked for"
    else:
        yield f"duplicates deleted: {_amount(duplicates.exact)} equal to another"
        if duplicates.method == "near":
            yield f"  and {_amount(duplicates.near)} of Jaccard similarity {duplicates.threshold} or more"
    if contamination is None:
        yield "contamination: not looked for"
        return
    yield (
        f"contamination: {contamination.documents:,} training documents share {contamination.ngram} words in a row "
        f"with an evaluation file, {'deleted' if contamination.deleted else 'kept'}"
    )
    yield from (f"  {name}: {documents:,}" for name, documents in contamination.files.items())


def _amount(amount: Counts) -> str:
    size = f"{counted(amount.tokens, 'token')}, {counted(amount.text_bytes, 'byte')}"
    return f"{counted(amount.documents, 'document')} ({size})"


def _describe_split(name: SplitName, split: TokenSplit, manifest: Manifest) -> list[str]:
    shards = manifest.splits[name]
    tokens, text = counted(split.n_tokens, "token"), counted(split.text_bytes, "byte")
    lines = [
        f"{name}: {counted(split.n_documents, 'document')}, {tokens}, {text} of text",
        f"  shards: {len(shards)}, of which {sum(info.continues > 0 for info in shards)} continue an input",
    ]
    if any(info.deleted.documents for info in shards):
        deleted = [
            sum(numbers) for numbers in zip(*(info.deleted.model_dump().values() for info in shards), strict=True)
        ]
        lines.append("  without " + _amount(Counts(documents=deleted[0], tokens=deleted[1], text_bytes=deleted[2])))
    if not split.n_documents:
        return lines
    lines.append("  tokens a document: " + _histogram(split.lengths))
    return lines


def _histogram(lengths: np.ndarray[tuple[int], np.dtype[np.int32]]) -> str:
    """Documents by powers of two of their lengths."""
    exponents, counts = np.unique(np.floor(np.log2(np.maximum(lengths, 1))).astype(int), return_counts=True)
    return ", ".join(f"{2**e:,}-{2 ** (e + 1) - 1:,}: {n:,}" for e, n in zip(exponents, counts, strict=True))
