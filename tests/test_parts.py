"""Parts of a unit add up to what is read at once, and a unit goes on from any of them as if it had never stopped."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.data.preparing.parts import DamagedInputError, PartCounts, PartReader
from pipeline.data.reading.corpus import find_corpus
from pipeline.data.reading.formats import Document, Record, TextRules
from pipeline.data.reading.plan import Begun, Unit, plan_units
from tests.reading import read_sources

RULES = TextRules(unit_bytes=700, max_document_bytes=300, long_documents="cut", invalid_utf8="replace")


def make_inputs(folder: Path, seed: int) -> None:
    """Packed lines with blank ones, bad ones, long ones and bad bytes, beside a table and a damaged file."""
    generator = random.Random(seed)
    lines = [
        generator.choice(
            [
                json.dumps({"text": "x" * generator.randrange(900)}).encode(),
                json.dumps({"text": f"row {number} of some words"}).encode(),
                b'{"text": "bad \xff\xfe bytes"}',
                b"broken",
                b'{"text": ""}',
                b"",
            ]
        )
        for number in range(120)
    ]
    content = b"\n".join(lines) + b"\n\n\n"
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (folder / "b.csv").write_text("text,id\n" + "".join(f"row {number},1\n\n" for number in range(90)))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(content)[:-6])
    (folder / "d.txt.gz").write_bytes(gzip.compress(b"words\n" * 900))


def unit_of(folder: Path) -> Unit:
    """All the inputs in one unit."""
    units = plan_units(find_corpus([str(folder)]).sources, RULES)
    return Unit(0, tuple(piece for unit in units for piece in unit.pieces))


Part = tuple[list[Record], PartCounts]


def parts_of(unit: Unit) -> list[Part]:
    reader = PartReader(unit, RULES, allow_failed=True)
    parts: list[Part] = []
    while not (parts and reader.ended):
        parts.append((list(reader.part()), reader.end_part()))
    return parts


@pytest.mark.parametrize("seed", range(4))
def test_parts_add_up_to_the_whole_and_go_on_from_anywhere(tmp_path: Path, seed: int) -> None:
    make_inputs(tmp_path, seed)
    unit = unit_of(tmp_path)
    parts = parts_of(unit)
    assert len(parts) > 20
    rows: Counter[int] = Counter()
    found: list[Record] = []
    begun: list[Begun] = []
    for records, counts in parts:
        begun.append(Begun(len(begun), len(found), tuple(rows.items())))
        assert all(0 <= record.row < counts.rows[record.source] for record in records)
        found += [record._replace(row=record.row + rows[record.source]) for record in records]
        rows.update(counts.rows)
        size = sum(len(record.content) for record in records if isinstance(record, Document))
        assert size < 700 + 900 + 300, "a part ends with the row that fills it"
    sound = [piece.source for piece in unit.pieces if "c.jsonl" not in piece.source.name]
    for source in sound:
        index = next(piece.index for piece in unit.pieces if piece.source == source)
        own = [record._replace(source=0) for record in found if record.source == index]
        assert own == read_sources([source], RULES)
    assert rows[0] == gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()).count(b"\n"), "blank lines are rows"
    assert sum(len(counts.failed) for _, counts in parts) == 1
    assert sum(counts.replaced for _, counts in parts) == 2 * sum(
        isinstance(record, Document) and b"bad" in record.content and record.source == 0 for record in found
    ), "those of the damaged file are not counted"
    for number in {1, 2, len(parts) // 2, len(parts) - 1, *random.Random(seed).sample(range(len(parts)), 5)}:
        assert parts_of(replace(unit, begun=begun[number])) == parts[number:], number


def test_what_was_cut_by_looking_is_one_part(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "some words"}\n' * 200)
    (piece, *_) = (piece for unit in plan_units(find_corpus([str(tmp_path)]).sources, RULES) for piece in unit.pieces)
    whole = replace(piece, stop=piece.source.size)
    ((records, counts),) = parts_of(Unit(0, (whole,)))
    assert (len(records), counts.rows) == (200, {0: 200})


def test_damage_ends_a_unit_and_keeps_the_parts_before_it(tmp_path: Path) -> None:
    lines = b"".join(json.dumps({"text": random.Random(i).randbytes(300).hex()}).encode() + b"\n" for i in range(400))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-3000])
    reader = PartReader(unit_of(tmp_path), RULES, allow_failed=False)
    done: list[PartCounts] = []

    def read() -> None:
        while True:
            list(reader.part())
            done.append(reader.end_part())

    with pytest.raises(DamagedInputError, match=r"a\.jsonl\.gz past byte"):
        read()
    assert len(done) > 50


def test_damage_that_comes_where_parts_are_done_is_told(tmp_path: Path) -> None:
    """And what is done stays: its rows are those of the file as it was."""
    lines = b"".join(json.dumps({"text": random.Random(i).randbytes(300).hex()}).encode() + b"\n" for i in range(400))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines))
    unit = unit_of(tmp_path)
    assert len(parts_of(unit)) > 100
    path.write_bytes(gzip.compress(lines)[:5000])
    ((records, counts),) = parts_of(replace(unit, begun=Begun(100, 200, ((0, 200),))))
    assert records == []
    assert len(counts.failed) == 1
    assert counts.rows == {0: 0}
