"""Equal and nearly equal documents of a prepared dataset, deleted but for the first.

In: a complete dataset folder. Out: bitmaps and a new manifest (see `deletion.py`); the shards stay as they are, so it
can be done again in another way, or undone, without tokenizing again.

Validation documents go before training documents, and each split in the order of its stream: the first of equals
stays. So a training document like a validation document is deleted, and validation documents only in favour of
others of their kind. Whether documents are deleted for another reason too does not matter here.

`exact` compares the 128-bit hashes of the texts. `near` also deletes documents whose sketches (see `minhash.py`) agree
in at least `threshold` of their numbers with those of another: being alike is passed on, so that of a chain of
documents, each like the next, the first stays. Pairs worth comparing share one of several bands of their sketches. A
document shorter than an n-gram is compared for equality only.

The result depends on nothing but content and order, in particular not on the executor. Memory, all in the calling
process: about 100 bytes a document (of which 16 are its hash) and 1 GiB.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from rich.console import Console

from pipeline.data.deleting.deletion import Bits, counts, delete_documents, open_shard
from pipeline.data.deleting.each import run_each
from pipeline.data.deleting.minhash import BINS, has_ngrams, signature_path, write_signatures
from pipeline.data.manifest import Counts, Deduplication, Manifest, ShardInfo, read_manifest
from pipeline.data.shards import Shard, load_array
from pipeline.errors import UserError

Method = Literal["exact", "near", "none"]
LOWEST_THRESHOLD = 0.5
"""Below it, most of any corpus would have to be compared with itself."""
_RECALL = 0.98
"""Share of the pairs at the threshold that a choice of bands must bring together."""
_KEY_BYTES = 2**29
"""Band keys held at once; a second array of that size sorts them."""
_NEIGHBOURS = 32
"""Documents that share a band are compared with the first of them and with this many that follow."""
_PAIRS = 2**17
"""Pairs compared at once: 64 MiB of sketches."""

Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


def deduplicate(
    folder: Path, *, method: Method, threshold: float = 0.8, executor: Executor | None, console: Console
) -> Manifest:
    """Delete duplicates, logically; `none` restores what duplicates deleted. The caller holds the folder's lock.

    `threshold`: Jaccard similarity of the sets of token 5-grams from which `near` deletes, 0.5 to 1. Sketches are made
    through `executor` (None: here) and stay beside the shards as long as the method is `near`. Raises
    `UserError` for a threshold out of range and for a dataset that is not complete.
    """
    check_threshold(threshold)
    manifest = read_manifest(folder)
    documents = _Documents(folder, manifest)
    for shard in documents.shards():
        shard.check()
    _remove_sketches(folder, documents.infos if method == "near" else ())
    if method == "none":
        changed = delete_documents(folder, manifest, reason="duplicates", deleted={}, record={"deduplication": None})
        console.print("duplicates: none deleted", markup=False)
        return changed
    exact = equal_documents(documents.hashes())
    near = np.zeros(len(exact), np.bool_)
    if method == "near":
        _write_missing_sketches(documents, executor, console)
        near = _near_documents(documents, np.flatnonzero(documents.have_ngrams() & ~exact), threshold)
    found = Deduplication(
        method=method,
        threshold=threshold if method == "near" else None,
        exact=documents.count(exact),
        near=documents.count(near),
    )
    changed = delete_documents(
        folder, manifest, reason="duplicates", deleted=documents.by_shard(exact | near), record={"deduplication": found}
    )
    console.print(_summary(found, len(exact)), markup=False)
    return changed


def _write_missing_sketches(documents: _Documents, executor: Executor | None, console: Console) -> None:
    infos = [info for info in documents.infos if not signature_path(documents.folder, info).exists()]
    names = {info.name for info in infos}
    # not a list: done here, each shard closes its files before the next one opens
    missing = ((shard.info.text_bytes, shard) for shard in documents.shards() if shard.info.name in names)
    size = sum(info.text_bytes for info in infos)
    for _ in run_each(executor, write_signatures, missing, what="near copies", total=size, console=console):
        pass


def check_threshold(threshold: float) -> None:
    """Raise `UserError` for a similarity from which nothing sensible would be deleted."""
    if not LOWEST_THRESHOLD <= threshold <= 1:
        raise UserError(f"--near-threshold {threshold:g}: wanted a similarity from {LOWEST_THRESHOLD} to 1, like 0.8")


def equal_documents(hashes: Words) -> Bits:
    """(documents,) which hashes (documents, 2) occurred before."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equals stay in order
    ordered = hashes[order]
    repeated = np.zeros(len(hashes), np.bool_)
    repeated[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
    return repeated


def choose_bands(threshold: float) -> tuple[int, int]:
    """How many bands of how many numbers: as long as possible while pairs at the threshold are found.

    Two sketches that agree in a share s share a band of r numbers with the probability 1 - (1 - s^r)^b.
    """
    rows = max(
        rows for rows in range(1, BINS + 1) if threshold >= 1 or 1 - (1 - threshold**rows) ** (BINS // rows) >= _RECALL
    )
    return BINS // rows, rows


class _Documents:
    """The documents of a dataset, deleted ones too, numbered from 0: those of validation, then those of training."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self._dtype = folder, manifest.dtype
        val, train = manifest.splits.get("val", ()), manifest.splits.get("train", ())
        self.infos = (*val, *train)
        self.n_val = sum(info.documents for info in val)
        self.starts = np.concatenate(([0], np.cumsum([info.documents for info in self.infos]))).astype(np.int64)

    def shards(self) -> Iterator[Shard]:
        """Shards in order, each as if never opened."""
        return (open_shard(self.folder, info, dtype=self._dtype) for info in self.infos)

    def hashes(self) -> Words:
        """(documents, 2) halves of the hashes of the texts."""
        found = np.empty((int(self.starts[-1]), 2), np.uint64)
        for start, shard in zip(self.starts.tolist(), self.shards(), strict=False):
            found[start : start + shard.n_documents] = shard.documents["hash"]
        return found

    def have_ngrams(self) -> Bits:
        """(documents,) which ones are long enough to be sketched."""
        return np.concatenate([has_ngrams(shard.lengths) for shard in self.shards()])

    def sketches(self, documents: Integers) -> Iterator[tuple[slice, npt.NDArray[np.uint16]]]:
        """Sketches (n, BINS) of ascending documents, shard by shard, and which of `documents` they belong to."""
        edges = np.searchsorted(documents, self.starts).tolist()
        for number, info in enumerate(self.infos):
            low, high = edges[number], edges[number + 1]
            if low < high:
                shape = (info.documents, BINS)
                stored = load_array(signature_path(self.folder, info), dtype=np.dtype(np.uint16), shape=shape)
                yield slice(low, high), stored[documents[low:high] - self.starts[number]]

    def by_shard(self, chosen: Bits) -> dict[str, Bits]:
        """Parts of an array (documents,) by the names of the shards."""
        parts = np.split(chosen, self.starts[1:-1])
        return {info.name: part for info, part in zip(self.infos, parts, strict=True)}

    def count(self, chosen: Bits) -> Counts:
        """How much the chosen documents (documents,) are."""
        parts = self.by_shard(chosen)
        found = [counts(shard, parts[shard.info.name]) for shard in self.shards()]
        return Counts(
            documents=sum(count.documents for count in found),
            tokens=sum(count.tokens for count in found),
            text_bytes=sum(count.text_bytes for count in found),
        )


def _near_documents(documents: _Documents, candidates: Integers, threshold: float) -> Bits:
    """(documents,) which candidates are like an earlier one; validation documents only if that one is of their kind."""
    clusters = np.arange(documents.starts[-1])
    val_clusters = np.arange(documents.n_val)
    for first, second in _pairs(documents, candidates, threshold):
        val = second < documents.n_val  # of the second, then of both: pairs ascend
        apart = find(clusters, first) != find(clusters, second)
        apart[val] |= find(val_clusters, first[val]) != find(val_clusters, second[val])
        first, second = first[apart], second[apart]
        for start in range(0, len(first), _PAIRS):
            low, high = first[start : start + _PAIRS], second[start : start + _PAIRS]
            alike = _similarities(documents, low, high) >= threshold
            low, high = low[alike], high[alike]
            join(clusters, low, high)
            val = high < documents.n_val
            join(val_clusters, low[val], high[val])
    repeated: Bits = find(clusters, np.arange(len(clusters))) != np.arange(len(clusters))
    repeated[: documents.n_val] = find(val_clusters, np.arange(documents.n_val)) != np.arange(documents.n_val)
    return repeated


def _pairs(documents: _Documents, candidates: Integers, threshold: float) -> Iterator[tuple[Integers, Integers]]:
    """Pairs (first, second), first < second, of candidates that share a band."""
    bands, rows = choose_bands(threshold)
    at_once = max(1, _KEY_BYTES // (8 * max(len(candidates), 1)))
    for start in range(0, bands, at_once):
        columns = [slice(band * rows, (band + 1) * rows) for band in range(start, min(start + at_once, bands))]
        keys = np.empty((len(columns), len(candidates)), np.uint64)
        for where, sketches in documents.sketches(candidates):
            for number, column in enumerate(columns):
                keys[number, where] = _band_keys(sketches[:, column])
        for band_keys in keys:
            yield from ((candidates[first], candidates[second]) for first, second in pairs_of_equals(band_keys))


def _band_keys(band: npt.NDArray[np.uint16]) -> Words:
    """(n,) one number for each row of (n, r); equal rows have equal numbers, others hardly ever."""
    keys = np.zeros(len(band), np.uint64)
    for column in band.T:
        keys = (keys ^ column) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(32)
    return keys


def pairs_of_equals(keys: Words) -> Iterator[tuple[Integers, Integers]]:
    """Indices (first, second) of equal keys (n,), first < second, all pairs where fewer than 33 are equal.

    Of more, each with the first of all and with the next 32: work grows with their number and not with its square.
    """
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    same = ordered[1:] == ordered[:-1]
    if not same.any():
        return
    shared = np.concatenate((same, [False])) | np.concatenate(([False], same))
    order, ordered = order[shared], ordered[shared]
    begins = np.concatenate(([True], ordered[1:] != ordered[:-1]))
    first = np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))
    far = np.flatnonzero(np.arange(len(order)) - first > _NEIGHBOURS)
    if len(far):
        yield order[first[far]], order[far]
    for distance in range(1, min(_NEIGHBOURS, len(order) - 1) + 1):
        near = np.flatnonzero(ordered[distance:] == ordered[:-distance])
        if not len(near):
            return
        yield order[near], order[near + distance]


def _similarities(documents: _Documents, first: Integers, second: Integers) -> npt.NDArray[np.float64]:
    """(pairs,) share of the numbers in which the sketches of two documents agree."""
    wanted, where = np.unique(np.concatenate((first, second)), return_inverse=True)
    table = np.empty((len(wanted), BINS), np.uint16)
    for part, sketches in documents.sketches(wanted):
        table[part] = sketches
    agree: npt.NDArray[np.float64] = (table[where[: len(first)]] == table[where[len(first) :]]).mean(axis=1)
    return agree


def find(clusters: Integers, members: Integers) -> Integers:
    """(members,) the smallest member of the cluster of each, and shorter ways to it, in place."""
    while True:
        parents = clusters[members]
        grandparents = clusters[parents]
        if np.array_equal(parents, grandparents):
            return parents
        clusters[members] = grandparents


def join(clusters: Integers, first: Integers, second: Integers) -> None:
    """Make one cluster of those of `first[i]` and `second[i]`, for each i, in place."""
    while len(first):
        roots, others = find(clusters, first), find(clusters, second)
        apart = roots != others
        first, second, roots, others = first[apart], second[apart], roots[apart], others[apart]
        low, high = np.minimum(roots, others), np.maximum(roots, others)
        np.minimum.at(clusters, high, low)
        find(clusters, high)  # roots that hang on roots that hang on others: halved together, not walked one by one


def _remove_sketches(folder: Path, infos: Sequence[ShardInfo]) -> None:
    """Remove the sketches of other content or of no further use than for `infos`."""
    wanted = {signature_path(folder, info) for info in infos}
    for path in sorted(folder.glob("*.minhash-*")):
        if path not in wanted:
            path.unlink(missing_ok=True)


def _summary(found: Deduplication, documents: int) -> str:
    parts = [f"{found.exact.documents:,} equal to another"]
    if found.method == "near":
        parts.append(f"{found.near.documents:,} similar to another (Jaccard {found.threshold:g} or more)")
    tokens = found.exact.tokens + found.near.tokens
    return f"duplicates: deleted {' and '.join(parts)} of {documents:,} documents, {tokens:,} tokens in all"
