"""The end of a preparation: judge what the units reported, write the quarantine, compose the manifest.

In: one report per unit, in order. Out: a `Manifest`, or a `UserError` when the result is not worth having.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from pipeline.data.manifest import (
    FORMAT_VERSION,
    SPLITS,
    TOKENIZER_NAME,
    FailedUnit,
    Manifest,
    ShardInfo,
    SplitName,
    data_digest,
)
from pipeline.data.preparing.ledger import ledgers
from pipeline.data.preparing.request import input_infos
from pipeline.data.preparing.unit import UnitReport, UnitSettings
from pipeline.data.reading.corpus import Corpus
from pipeline.data.reading.formats import EMPTY, Rejected, with_remedy
from pipeline.data.reading.plan import Unit
from pipeline.data.reading.readers import count_rows
from pipeline.data.shards import token_dtype
from pipeline.errors import UserError, counted
from pipeline.untrusted import DamagedFileError, parse_json

QUARANTINE_NAME = "quarantine.jsonl"


def too_many_bad(reports: Sequence[UnitReport], corpus: Corpus, *, max_bad: float) -> UserError | None:
    """The error, with three examples, when more than `max_bad` of all records were rejected.

    `reports`: those of all units, in order.
    """
    bad = sum(report.bad for report in reports)
    records = sum(report.dropped + report.documents for report in reports)
    if bad <= max_bad * records:
        return None
    return _too_many_bad(reports, corpus, bad, records, max_bad=max_bad)


def _too_many_bad(
    reports: Sequence[UnitReport], corpus: Corpus, bad: int, records: int, *, max_bad: float, so_far: str = ""
) -> UserError:
    return UserError(
        f"{bad} of {records} records{so_far} are bad ({bad / records:.2%}), --max-bad allows {max_bad:.2%}"
        f"{_examples(reports, corpus)}\n"
        "  mend the input, or allow more with --max-bad F; finished units are kept"
    )


class Beginning:
    """The units from the first on that are done, without a gap, and what their reports come to.

    `done` are the reports as they come. Each is looked at once, however often `advance` is called: there may be a
    hundred thousand units, and they are judged after each.
    """

    def __init__(self, units: Sequence[Unit], done: Mapping[tuple[int, int], UnitReport]) -> None:
        self._units, self._done = units, done
        self._reports: list[UnitReport] = []
        self._next = 0  # the unit that comes next
        self._parts: list[UnitReport] = []  # those of it that are known to be done
        self._size, self._total = 0, sum(unit.size for unit in units)
        self.records = self._bad = 0

    def advance(self) -> None:
        """Take in what was done since."""
        while self._next < len(self._units) and self._is_done(unit := self._units[self._next]):
            self._take(unit)
            self._next, self._parts = self._next + 1, []

    def _is_done(self, unit: Unit) -> bool:
        while report := self._done.get((unit.number, len(self._parts))):
            self._parts.append(report)
            if report.last:
                return True
        return False

    def _take(self, unit: Unit) -> None:
        reports = self._parts
        self._reports += reports
        self._size += unit.size
        self._bad += sum(report.bad for report in reports)
        self.records += sum(report.dropped + report.documents for report in reports)

    def too_many_bad(self, corpus: Corpus, *, max_bad: float) -> UserError | None:
        """The error when so many are bad that the rest of the corpus, by size, can hardly make up for it."""
        share = self._size / (self._total or 1)
        if not share or self._bad <= max_bad * self.records / share:
            return None
        so_far = "" if share == 1 else " so far"
        return _too_many_bad(self._reports, corpus, self._bad, self.records, max_bad=max_bad, so_far=so_far)


def no_documents(drops: Counter[str], examples: Sequence[Rejected], corpus: Corpus) -> UserError:
    """The error for inputs without a single document."""
    inputs = counted(len(corpus.sources), "input")
    if bad := drops.total() - drops[EMPTY]:
        table = _table(drops) + _lines(examples, corpus)
        return UserError(f"no document in {inputs}, {counted(bad, 'bad record')}{table}")
    return UserError(f"no document in {inputs}: nothing but empty files and empty texts")


def _examples(reports: Sequence[UnitReport], corpus: Corpus) -> str:
    counts = sum((Counter(report.drops) for report in reports), Counter[str]())
    for report, earlier in zip(reports, earlier_rows(reports), strict=True):
        if report.examples:
            shown = [record._replace(row=record.row + earlier[record.source]) for record in report.examples]
            return _table(counts) + _lines(shown, corpus)
    return _table(counts)


def _table(counts: Counter[str]) -> str:
    return "".join(
        f"\n  {count} x {with_remedy(reason)}" for reason, count in sorted(counts.items()) if reason != EMPTY
    )


def _lines(rejected: Sequence[Rejected], corpus: Corpus) -> str:
    return "".join(
        f"\n  {corpus.sources[record.source].name}, row {record.row}: {record.reason}: {record.excerpt[:80]}"
        for record in rejected
    )


def refuse_empty_split(reports: Sequence[UnitReport], settings: UnitSettings) -> None:
    """Raise `UserError` when a split that was asked for got nothing.

    The units, of no use to anyone, are removed; but not where inputs were given for validation: those of the other
    split are good, and the next run keeps them.
    """
    documents = sum(report.documents for report in reports)
    rule = settings.split
    wanted = SPLITS if rule.mode != "none" else SPLITS[:1]
    empty = [split for split in wanted if not any(split in report.shards for report in reports)]
    if not empty:
        return
    if rule.mode == "given":
        raise empty_inputs(empty[0], kept=True)
    for name in [name for report in reports for name in report.files()] + [TOKENIZER_NAME]:
        (settings.output / name).unlink(missing_ok=True)
    for ledger in ledgers(settings.output):  # shares had theirs; they would hold the user to the settings that failed
        ledger.path.unlink()
    if empty == ["val"] and rule.mode == "hash":
        lowest = min(report.lowest_draw for report in reports)
        scale = 10.0 ** (2 - math.floor(math.log10((lowest + 1) / 2**64)))
        remedy = f"--val-fraction {math.ceil(lowest / 2**64 * scale + 1) / scale:g} would hold out at least one"
    else:
        remedy = "choose another --val-fraction (0 for no validation split), or give more text"
    raise UserError(
        f"--val-fraction {rule.fraction:g} leaves {empty[0]} empty with {counted(documents, 'document')}; {remedy}"
    )


def empty_inputs(split: SplitName, *, kept: bool) -> UserError:
    """The error for a split without a document where --val-input says which inputs are whose."""
    inputs = "the inputs of --val-input" if split == "val" else "the other inputs"
    units = "; finished units are kept" if kept else ""
    return UserError(f"{split} is empty: no document in {inputs}; mend them and run the same command again{units}")


def done_without(unit: Unit, reason: str) -> tuple[FailedUnit, UnitReport]:
    """A unit that gave nothing more, as the manifest tells of it; and in the place of its report, the rows it has.

    So rows that follow in the same source keep their numbers. Where its own cannot be counted, the reason says so.
    """
    rows: dict[int, int] = {}
    for piece in unit.pieces:
        own = count_rows(piece)
        if own is None and not piece.whole:  # nothing follows these
            reason += f"; rows of {piece.source.name} after it are numbered as if it had none"
        rows[piece.index] = rows.get(piece.index, 0) + (own or 0)
    report = UnitReport(
        unit=unit.number,
        part=unit.begun.parts,
        last=True,
        key="",
        shards={},
        first_sources={},
        documents=0,
        text_bytes=0,
        rows=rows,
        drops={},
        examples=(),
        noticed={},
        quarantine=None,
        lowest_draw=2**64 - 1,
    )
    return FailedUnit(unit=unit.name, reason=reason), report


def earlier_rows(reports: Sequence[UnitReport]) -> list[dict[int, int]]:
    """For each report, in order, the rows of each of its sources that units before it hold."""
    counted: Counter[int] = Counter()
    earlier = []
    for report in reports:
        earlier.append({source: counted[source] for source in report.rows})
        counted.update(report.rows)
    return earlier


def write_quarantine(output: Path, reports: Sequence[UnitReport], corpus: Corpus) -> None:
    """Write every rejected record as a line of `quarantine.jsonl`: source, row, reason, excerpt.

    Raises `DamagedFileError` for a list of rejected records that is not as its unit left it.
    """
    temporary = output / f"{QUARANTINE_NAME}.tmp"
    with temporary.open("wb") as file:
        for report, earlier in zip(reports, earlier_rows(reports), strict=True):
            for record in _quarantined(output / report.quarantine, earlier) if report.quarantine else ():
                source = corpus.sources[record.source].name
                values = record._asdict() | {"source": source, "row": record.row + earlier[record.source]}
                file.write(orjson.dumps(values) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(output / QUARANTINE_NAME)


def _quarantined(path: Path, sources: Collection[int]) -> Iterator[Rejected]:
    """The rejected records of a unit, which are of these sources."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                record = parse_json(Rejected, line, origin=where)
                if record.source not in sources:
                    raise DamagedFileError(f"{where} is of an input that its unit does not have")
            except DamagedFileError as error:
                raise DamagedFileError(f"{error}; remove the file and run the same command again") from None
            yield record


def manifest_of(
    reports: Sequence[UnitReport],
    settings: UnitSettings,
    corpus: Corpus,
    *,
    identity: dict[str, Any],
    failed: Sequence[FailedUnit],
) -> Manifest:
    """Compose the manifest of a finished dataset from its reports, in order."""
    splits: dict[SplitName, list[ShardInfo]] = {split: [] for split in SPLITS}
    for report, earlier in zip(reports, earlier_rows(reports), strict=True):
        for split, shard in report.shards.items():
            continues = earlier[report.first_sources[split]]
            splits[split].append(shard.model_copy(update={"continues": continues}))
    dtype = token_dtype(settings.vocab_size).name
    total = {
        name: dict(sorted(sum((Counter(getattr(report, name)) for report in reports), Counter[str]()).items()))
        for name in ("drops", "noticed")
    }
    return Manifest.model_validate(
        {
            "format_version": FORMAT_VERSION,
            "dtype": dtype,
            "vocab_size": settings.vocab_size,
            "eos_id": settings.eos_id,
            "tokenizer_fingerprint": settings.tokenizer_fingerprint,
            "data_digest": data_digest(splits, tokenizer_fingerprint=settings.tokenizer_fingerprint, dtype=dtype),
            "split_rule": settings.split.describe(),
            "splits": splits,
            "records": sum(report.documents + report.dropped for report in reports),
            **total,
            "failed": tuple(failed),
            "settings": identity,
            "inputs": input_infos(corpus),
        }
    )
