"""Reading a corpus as preparation does: units in order, rows made absolute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.reading.corpus import UnitRows, find_corpus, read_unit
from pipeline.data.reading.formats import Document, Rejected, Source, TextRules
from pipeline.data.reading.plan import Unit, plan_units

Records = list[Document | Rejected]


def drain(unit: Unit, rules: TextRules) -> tuple[Records, UnitRows]:
    """Records and return value of `read_unit`."""
    records: Records = []
    reading = read_unit(unit, rules)
    while True:
        try:
            records.append(next(reading))
        except StopIteration as end:
            return records, end.value


def read_sources(sources: Sequence[Source], rules: TextRules) -> Records:
    """All records; rows count from the beginning of their source."""
    rows: Counter[int] = Counter()
    found: Records = []
    for unit in plan_units(sources, rules):
        records, counted = drain(unit, rules)
        found += [record._replace(row=record.row + rows[record.source]) for record in records]
        rows.update(counted.rows)
    return found


def read(*inputs: Path | str, rules: TextRules | None = None, exclude: tuple[str, ...] = ()) -> Records:
    """All records of what is named."""
    corpus = find_corpus([str(path) for path in inputs], exclude=exclude)
    return read_sources(corpus.sources, rules or TextRules())


def texts_of(records: Records) -> list[str]:
    """The texts, where nothing was rejected."""
    assert all(isinstance(record, Document) for record in records), records
    return [record.content.decode() for record in records if isinstance(record, Document)]


def faults_of(records: Records) -> list[tuple[int, str]]:
    """Rows and reasons of what was rejected."""
    return [(record.row, record.reason) for record in records if isinstance(record, Rejected)]
