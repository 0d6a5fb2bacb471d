"""Whether inputs are still what a dataset was made of.

In: a dataset and its manifest. Out: which inputs changed, which only bear another time, how many are not here. A file
of the same size and another time is read again, and its documents are compared with the hashes in the shards.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from pipeline.data.deleting.deletion import open_shard
from pipeline.data.manifest import MANIFEST_NAME, SPLITS, InputInfo, Manifest, SplitName
from pipeline.data.reading.corpus import find_corpus, read_unit
from pipeline.data.reading.formats import Document, Source, TextRules
from pipeline.data.reading.plan import Unit, plan_units
from pipeline.errors import UserError
from pipeline.untrusted import check

_WHAT = ("a file, found a folder", "a saved dataset, found a file")


@dataclass
class InputState:
    """Findings about inputs that changed, names of those with another time alone, how many are not here."""

    changed: list[str] = field(default_factory=list)
    touched: list[str] = field(default_factory=list)
    gone: int = 0


def compare_inputs(folder: Path, manifest: Manifest) -> InputState:
    """Compare the inputs that are here with what the manifest and the shards say of them."""
    state = InputState()
    for number, info in enumerate(manifest.inputs):
        if not Path(info.name).exists():
            state.gone += 1
            continue
        if Path(info.name).is_dir() != (info.kind == "saved"):  # a whole tree is not searched for what was a file
            state.changed.append(f"{info.name}: an input changed since: expected {_WHAT[info.kind == 'saved']}")
            continue
        try:
            found = find_corpus([info.name]).sources
        except UserError as error:
            state.changed.append(f"{info.name}: an input changed since: {error}")
            continue
        if [(now.size, now.fingerprint) for now in found] == [(info.size, info.fingerprint)]:
            continue
        if _is_touched(found, info) and _holds_what_was_prepared(folder, manifest, number, found[0]):
            state.touched.append(info.name)
            continue
        now = ", ".join(f"{source.size} bytes, fingerprint {source.fingerprint}" for source in found)
        state.changed.append(
            f"{info.name}: an input changed since: expected {info.size} bytes, fingerprint {info.fingerprint}, "
            f"found {now}; prepare again to take it in"
        )
    return state


def _is_touched(found: tuple[Source, ...], info: InputInfo) -> bool:
    """Whether a file differs in its time alone. The fingerprint of a saved dataset is one of its content."""
    return [(now.size, now.kind) for now in found] == [(info.size, info.kind)] and info.kind != "saved"


def _holds_what_was_prepared(folder: Path, manifest: Manifest, number: int, source: Source) -> bool:
    """Whether the documents of a source are those that the shards hold of input `number`, in order and row by row."""
    rules = _rules_of(manifest)
    if rules is None:
        return False
    heads = {split: _Recorded(_records(folder, manifest, split, number)) for split in SPLITS}
    try:
        alike = all(_take(row, content, heads) for row, content in _documents(source, rules))
    except UserError:  # damaged
        return False
    return alike and all(head.record is None for head in heads.values())


def _rules_of(manifest: Manifest) -> TextRules | None:
    """What made documents of inputs; None for a manifest that does not say."""
    wanted = ("unit_bytes", "max_document_bytes", "max_record_bytes", "long_documents", "invalid_utf8")
    settings = manifest.settings
    if not settings.keys() >= {"text_key", "text_separator", *wanted}:
        return None
    rules = {"key": settings["text_key"], "separator": settings["text_separator"]}
    return check(TextRules, rules | {name: settings[name] for name in wanted}, origin=f"{MANIFEST_NAME}: settings")


def _documents(source: Source, rules: TextRules) -> Iterator[tuple[int, bytes]]:
    """(row, text) of every document of a source, as units of its own would give them."""
    first = 0
    for unit in plan_units((source,), rules):
        first += yield from _numbered(unit, rules, first)


def _numbered(unit: Unit, rules: TextRules, first: int) -> Generator[tuple[int, bytes], None, int]:
    records = read_unit(unit, rules)
    while True:
        try:
            record = next(records)
        except StopIteration as end:
            return sum(end.value.rows.values())
        if isinstance(record, Document):
            yield first + record.row, record.content


class _Record(NamedTuple):
    row: int
    text_bytes: int
    low: int
    high: int

    def is_of(self, row: int, content: bytes) -> bool:
        """Whether this is a document of that row with that text."""
        if (self.row, self.text_bytes) != (row, len(content)):
            return False
        return xxhash.xxh3_128_intdigest(content) == self.low | self.high << 64


class _Recorded:
    """What a split holds of an input, of which `record` is the next."""

    def __init__(self, records: Iterator[_Record]) -> None:
        self._records = records
        self.record = next(records, None)

    def take(self) -> None:
        self.record = next(self._records, None)


def _records(folder: Path, manifest: Manifest, split: SplitName, number: int) -> Iterator[_Record]:
    """The documents that a split holds of input `number`, rows counted in the input."""
    for info in manifest.splits.get(split, ()):
        shard = open_shard(folder, info, dtype=manifest.dtype)
        documents = shard.documents
        chosen = documents[documents["source"] == number]
        rows = chosen["row"] + (info.continues if documents["source"][0] == number else 0)
        columns = (rows, chosen["text_bytes"], *np.ascontiguousarray(chosen["hash"]).reshape(-1, 2).T)
        yield from map(_Record, *(column.tolist() for column in columns))


def _take(row: int, content: bytes, heads: dict[SplitName, _Recorded]) -> bool:
    """Take a document off the split that holds it, or its two parts off both; False where neither is so."""
    train, val = (heads[split].record for split in SPLITS)
    for head, record in ((heads["train"], train), (heads["val"], val)):
        if record and record.is_of(row, content):
            head.take()
            return True
    if train and val and train.is_of(row, content[: train.text_bytes]) and val.is_of(row, content[train.text_bytes :]):
        heads["train"].take()
        heads["val"].take()
        return True
    return False
