"""Evaluation texts inside training documents: found, counted, and deleted if asked.

In: a complete dataset folder and files of evaluation texts. Out: a manifest that says how many training documents share
an n-gram of words with each file, and, with `delete`, bitmaps that take these documents out of the dataset (see
`deletion.py`; they can be restored). The training text is decoded from the ids: it is what a model would see.

Validation documents are not looked at. Documents deleted for another reason are looked at like the others, so that
the result does not depend on what was done first. What counts as a word and as an n-gram is written in `ngrams.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from pipeline.data.dataset import open_shards
from pipeline.data.deleting.deletion import delete_documents, open_shard
from pipeline.data.deleting.each import run_each
from pipeline.data.deleting.ngrams import SHORTEST, NgramIndex
from pipeline.data.manifest import TOKENIZER_NAME, Contamination, Manifest, ShardInfo, read_manifest
from pipeline.data.reading.corpus import check_text_key, find_corpus, read_unit
from pipeline.data.reading.formats import Document, Source, TextRules
from pipeline.data.reading.plan import plan_units
from pipeline.data.shards import REMEDY, outside
from pipeline.data.tokenizer import TextTokenizer
from pipeline.data.tokenizer_files import byte_symbols
from pipeline.errors import UserError

_INDEX_FILES = ".contamination-*.npz"
_EXAMPLES = 3
_TEXT_BYTES = 2**30
"""Plain texts of evaluation are not cut up to this size."""
_BLOCK_TOKENS = 2**18
"""Tokens searched at once; a longer document is searched whole."""

_GATHERED = 2**15
"""Tokens whose bytes are gathered at once: their places fit a cache."""

Pairs = npt.NDArray[np.int64]


def check_contamination(
    folder: Path,
    files: Sequence[Path],
    *,
    ngram: int = 13,
    delete: bool,
    text_key: str,
    executor: Executor | None,
    console: Console,
) -> Manifest:
    """Look for the n-grams of `files` in the training documents, and write the result into the manifest.

    `files` are JSON lines, text, parquet or CSV, their texts under `text_key`; none at all undoes an earlier check and
    its deletions, as `delete=False` undoes deletions. The shards are searched through `executor` (None: here). The
    caller holds the folder's lock. Raises `UserError` for a dataset that is not complete, a file that cannot be read
    or has no text long enough, and when no training document would be left.
    """
    manifest = read_manifest(folder)
    if ngram < 2:
        raise UserError(f"n-grams of {ngram} words say nothing; wanted at least 2, commonly 13")
    names = list(dict.fromkeys(str(file) for file in files))
    if not names:
        console.print("contamination: nothing checked, nothing deleted", markup=False)
        return delete_documents(folder, manifest, reason="contaminated", deleted={}, record={"contamination": None})
    index = _index_of(names, ngram, text_key, console)
    shards = manifest.splits.get("train", ())
    found = dict(zip((info.name for info in shards), _search(folder, manifest, index, executor, console), strict=True))
    deleted = {info.name: np.zeros(info.documents, np.bool_) for info in shards}
    for name, pairs in found.items():
        deleted[name][pairs[:, 0]] = True
    record = Contamination(
        ngram=ngram,
        files={
            name: sum(int((pairs[:, 1] == owner).sum()) for pairs in found.values()) for owner, name in enumerate(names)
        },
        documents=sum(int(chosen.sum()) for chosen in deleted.values()),
        deleted=delete,
    )
    changed = delete_documents(
        folder,
        manifest,
        reason="contaminated",
        deleted=deleted if delete else {},
        record={"contamination": record},
    )
    lines = _summary(record, sum(info.documents for info in shards))
    for owner, (name, count) in enumerate(record.files.items()):
        examples = ", ".join(_examples(folder, manifest, found, owner))
        lines.append(f"  {name}: {count:,}" + (f", such as {examples}" if examples else ""))
    console.print("\n".join(lines), markup=False)
    return changed


def _summary(record: Contamination, documents: int) -> list[str]:
    line = (
        f"contamination: {record.documents:,} of {documents:,} training documents share {record.ngram} words in a row "
        "with an evaluation file"
    )
    action = "deleted" if record.deleted else "kept; --delete-contaminated deletes them"
    return [f"{line}: {action}" if record.documents else line]


def evaluation_sources(file: str, text_key: str) -> tuple[Source, ...]:
    """What one file of evaluation texts comes to. Raises `UserError` if it is not there or lacks the key."""
    sources = find_corpus([file]).sources
    check_text_key(sources, text_key)
    return sources


def evaluation_texts(file: str, text_key: str) -> Iterator[str]:
    """The texts of one file, read like a corpus. Records that are no text are passed over."""
    sources = evaluation_sources(file, text_key)
    rules = TextRules(key=text_key, unit_bytes=_TEXT_BYTES, max_document_bytes=_TEXT_BYTES)
    for unit in plan_units(sources, rules):
        for record in read_unit(unit, rules):
            if isinstance(record, Document):
                yield record.content.decode()


def _index_of(names: Sequence[str], ngram: int, text_key: str, console: Console) -> NgramIndex:
    texts = ((owner, text) for owner, name in enumerate(names) for text in evaluation_texts(name, text_key))
    index, tally = NgramIndex.build(texts, ngram=ngram)
    for owner, name in enumerate(names):
        indexed, short = tally.get(owner, (0, 0))
        if not indexed:
            raise UserError(
                f"{name}: none of its {short} texts has {min(SHORTEST, ngram)} words, so there is nothing to look for; "
                f"is {text_key!r} the key of the whole text? Choose another with --text-key"
            )
        if short:
            console.print(
                f"note: {name}: {short:,} of {indexed + short:,} texts have fewer than {min(SHORTEST, ngram)} words "
                "and are not looked for",
                markup=False,
            )
    return index


@dataclass(frozen=True)
class _Task:
    """One shard to search, and where the index is. The dataset's tokenizer decodes it."""

    folder: Path
    info: ShardInfo
    dtype: str
    index: Path
    vocab_size: int
    eos_id: int


def _search(
    folder: Path, manifest: Manifest, index: NgramIndex, executor: Executor | None, console: Console
) -> list[Pairs]:
    """For each training shard the pairs (document, owner) found, (found, 2), each once and ascending."""
    for left in folder.glob(_INDEX_FILES):
        left.unlink()  # of a process that was killed
    path = folder / _INDEX_FILES.replace("*", token_hex(8))
    try:
        index.save(path)
        tasks = [
            (info.text_bytes, _Task(folder, info, manifest.dtype, path, manifest.vocab_size, manifest.eos_id))
            for info in manifest.splits.get("train", ())
        ]
        size = sum(size for size, _ in tasks)
        return list(run_each(executor, _search_shard, tasks, what="contamination", total=size, console=console))
    finally:
        path.unlink(missing_ok=True)
        _load_index.cache_clear()


def _search_shard(task: _Task) -> Pairs:
    index, decoder = _load_index(task.index), _load_decoder(task.folder / TOKENIZER_NAME, task.eos_id)
    shard = open_shard(task.folder, task.info, dtype=task.dtype)
    ends = np.cumsum(shard.lengths, dtype=np.int64)
    found = []
    first = 0
    while first < len(ends):
        start = int(ends[first]) - int(shard.lengths[first])
        last = max(int(np.searchsorted(ends, start + _BLOCK_TOKENS, side="right")), first + 1)
        ids = shard.tokens[start : ends[last - 1]]
        place = outside(ids, task.vocab_size)
        if place is not None:
            raise UserError(f"{shard.path}: id {ids[place]} is outside the vocabulary of {task.vocab_size}; {REMEDY}")
        texts = list(decoder.texts(ids, ends[first:last] - start))
        suspects = index.sieve.suspects(texts)
        if suspects:
            found.append(_search_texts(index, [texts[number] for number in suspects], np.array(suspects) + first))
        first = last
    return np.concatenate(found) if found else np.zeros((0, 2), np.int64)


def _search_texts(index: NgramIndex, texts: Sequence[str], documents: npt.NDArray[np.int64]) -> Pairs:
    """Pairs (document, owner) of texts, whose documents are numbered `documents` (texts,)."""
    # an unknown word between documents: no n-gram reaches from one into the next
    words = [index.word_ids(text) for text in texts]
    stream = np.concatenate([part for ids in words for part in (ids, np.zeros(1, np.int32))])
    numbers = np.repeat(documents, [len(ids) + 1 for ids in words])
    places, owners = index.search(stream)
    return np.unique(np.stack((numbers[places], owners.astype(np.int64)), axis=1), axis=0)


class TextDecoder:
    """Decodes documents in bulk, as `TextTokenizer.decode` would one by one.

    A token of a byte-level vocabulary stands for the same bytes wherever it is: those are gathered from a table.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer.tokenizer
        self._is_byte_level = (tokenizer.outline.get("decoder") or {}).get("type") == "ByteLevel"
        table = [b""] * (tokenizer.vocab_size if self._is_byte_level else 0)
        values = {symbol: value for value, symbol in enumerate(byte_symbols())}
        for token, number in self._tokenizer.get_vocab(with_added_tokens=True).items() if table else ():
            spelled = all(symbol in values for symbol in token)
            table[number] = bytes(values[symbol] for symbol in token) if spelled else token.encode()
        self._bytes = np.frombuffer(b"".join(table), np.uint8)
        self._sizes = np.array([len(token) for token in table], np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes

    def texts(self, tokens: npt.NDArray[Any], ends: npt.NDArray[np.int64]) -> Iterator[str]:
        """Texts of documents whose ids (tokens,) lie end to end, each with EOS before its end `ends` (documents,)."""
        starts, stops = np.concatenate(([0], ends[:-1])), ends - 1
        if not self._is_byte_level:
            for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
                yield str(self._tokenizer.decode(tokens[start:stop].tolist(), skip_special_tokens=False))
            return
        content = b"".join(self._gather(tokens[at : at + _GATHERED]) for at in range(0, len(tokens), _GATHERED))
        places = np.concatenate(([0], np.cumsum(self._sizes[tokens])))
        for start, stop in zip(places[starts].tolist(), places[stops].tolist(), strict=True):
            yield content[start:stop].decode(errors="replace")

    def _gather(self, tokens: npt.NDArray[Any]) -> bytes:
        sizes = self._sizes[tokens]
        ends = np.cumsum(sizes)
        places = np.repeat(self._starts[tokens] - ends + sizes, sizes) + np.arange(ends[-1])
        return bytes(self._bytes[places])


@lru_cache(maxsize=1)
def _load_index(path: Path) -> NgramIndex:
    """One a process, not one a shard; the name of the file is never used again."""
    return NgramIndex.load(path)


@lru_cache(maxsize=1)
def _load_decoder(path: Path, eos_id: int) -> TextDecoder:
    return TextDecoder(TextTokenizer.from_file(path, eos=eos_id))


def _examples(folder: Path, manifest: Manifest, found: dict[str, Pairs], owner: int) -> Iterator[str]:
    """Up to three training documents that share an n-gram with a file, as the user knows them."""
    left = _EXAMPLES
    for shard in open_shards(folder, manifest).get("train", []):
        pairs = found[shard.info.name]
        for document in pairs[pairs[:, 1] == owner, 0][:left].tolist():
            info = shard.describe(document)
            yield f"{info.source} row {info.row}"
            left -= 1
        if not left:
            return
