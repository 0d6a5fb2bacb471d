"""The judgement on the beginning of a corpus: as if all were looked at after each unit, at the cost of one look."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.preparing.finish import Beginning
from pipeline.data.preparing.unit import UnitReport
from pipeline.data.reading.corpus import Corpus
from pipeline.data.reading.formats import Piece, Source
from pipeline.data.reading.plan import Unit

CORPUS = Corpus((), ())


def report(unit: int, part: int, *, documents: int, dropped: int, last: bool = True) -> UnitReport:
    values: dict[str, Any] = {
        "unit": unit, "part": part, "last": last, "key": "", "shards": {}, "first_sources": {}, "documents": documents,
        "text_bytes": 0, "rows": {}, "drops": {"bad": dropped}, "examples": (), "noticed": {}, "quarantine": None,
        "lowest_draw": 0,
    }  # fmt: skip
    return UnitReport(**values)


def plan(sizes: list[int]) -> list[Unit]:
    source = Source("a", "text", "", 1, "1")
    return [Unit(number, (Piece(source, 0, 0, size, size),)) for number, size in enumerate(sizes)]


def expected(units: list[Unit], done: dict[tuple[int, int], UnitReport], parts: list[int]) -> str | None:
    """All units that are done from the first on, added up from nothing."""

    def is_done(unit: Unit) -> bool:
        return all((unit.number, part) in done for part in range(parts[unit.number]))

    begun = list(takewhile(is_done, units))
    numbers = {unit.number for unit in begun}
    reports = [done[place] for place in done if place[0] in numbers]
    dropped = sum(one.drops["bad"] for one in reports)
    records = dropped + sum(one.documents for one in reports)
    size, total = sum(unit.size for unit in begun), sum(unit.size for unit in units)
    if not size or not records or dropped <= 0.1 * records / (size / total):
        return None
    return f"{dropped} of {records} records{'' if size == total else ' so far'} are bad"


@pytest.mark.parametrize("seed", range(20))
def test_the_verdict_is_that_on_all_units_without_a_gap(seed: int) -> None:
    generator = random.Random(seed)
    sizes = [generator.choice([0, 1, 7, 50]) for _ in range(30)]
    units = plan(sizes)
    parts = [generator.choice([1, 1, 1, 4]) for _ in units]
    events: list[UnitReport] = []
    for unit in units:
        share, count = generator.choice([0, 0, 3]), parts[unit.number]
        events += [
            report(unit.number, part, documents=generator.randrange(9), dropped=share, last=part == count - 1)
            for part in range(count)
        ]
    generator.shuffle(events)
    events.sort(key=lambda event: event.unit // 6)  # nearly in order
    done: dict[tuple[int, int], UnitReport] = {}
    beginning = Beginning(units, done)
    verdicts = set()
    for event in events:
        done[event.place] = event
        beginning.advance()
        found, wanted = beginning.too_many_bad(CORPUS, max_bad=0.1), expected(units, done, parts)
        assert (found is None) == (wanted is None)
        assert found is None or str(found).startswith(f"{wanted} (")
        verdicts.add(wanted is None)
    assert beginning.records == sum(one.documents + one.drops["bad"] for one in done.values())


class Looks(dict[tuple[int, int], UnitReport]):
    """Counts how often anything is asked of it."""

    count = 0

    def get(self, key: tuple[int, int], default: Any = None) -> Any:
        self.count += 1
        return super().get(key, default)

    def __getitem__(self, key: tuple[int, int]) -> UnitReport:
        self.count += 1
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        raise AssertionError("walks over all that is done")


@pytest.mark.parametrize("parts", [1, 4000])
def test_each_report_is_looked_at_once_however_many_there_are(parts: int) -> None:
    """One unit each, and then as many as parts of one unit."""
    count = 4000
    units = plan([10] * (count // parts))
    done = Looks()
    beginning = Beginning(units, done)
    for number in range(count):
        part = number % parts
        one = report(number // parts, part, documents=9, dropped=1, last=part == parts - 1)
        done[one.place] = one
        beginning.advance()
        assert beginning.too_many_bad(CORPUS, max_bad=0.2) is None
    assert beginning.records == 10 * count
    assert done.count <= 5 * count


def test_a_corpus_of_no_size_is_not_judged_before_its_end(tmp_path: Path) -> None:
    beginning = Beginning(plan([0, 0]), {(0, 0): report(0, 0, documents=0, dropped=9)})
    beginning.advance()
    assert beginning.records == 9
    assert beginning.too_many_bad(CORPUS, max_bad=0.0) is None
