"""A look at the corpus reads as much as it says, whatever the units hold."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import xxhash

from pipeline.data.preparing import survey as surveying
from pipeline.data.preparing.survey import holds_validation, survey, training_texts
from pipeline.data.reading.corpus import find_corpus
from pipeline.data.reading.formats import TextRules
from pipeline.data.reading.plan import Unit, plan_units

RULES = TextRules(unit_bytes=4000)
TEXTS = [f"text {number} {'of a few words ' * (number % 7)}" for number in range(5000)]


def packed(path: Path) -> tuple[Unit, ...]:
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()))
    return plan_units(find_corpus([str(path)]).sources, RULES)


def test_one_unit_of_any_size_is_read_up_to_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = packed(tmp_path / "a.jsonl.gz")
    assert len(units) == 1
    assert units[0].may_be_any_size
    read, real = 0, surveying.read_unit

    def counting(*args: Any) -> Iterator[Any]:
        nonlocal read
        for record in real(*args):
            read += 1
            yield record

    monkeypatch.setattr(surveying, "read_unit", counting)
    monkeypatch.setattr(surveying, "TRAINING_POOL_BYTES", 10_000)
    monkeypatch.setattr(surveying, "TRAINING_SAMPLE_BYTES", 2_000)
    pool, size = [], 0
    for text in TEXTS:
        pool.append(text)
        size += len(text)
        if size >= 10_000:
            break
    pool.sort(key=lambda text: xxhash.xxh3_64_intdigest(text.encode()))
    found = training_texts(units, RULES)
    assert found == pool[: len(found)]
    assert 1_900 < sum(map(len, found)) <= 2_000
    assert read <= len(pool) + 1
    assert training_texts(units, RULES) == found


def test_sizes_of_zero_tell_nothing_and_break_nothing(tmp_path: Path) -> None:
    units = [
        replace(unit, pieces=tuple(replace(piece, size=0) for piece in unit.pieces))
        for unit in packed(tmp_path / "a.jsonl.gz")
    ]
    found = survey(units, RULES)
    assert found.documents == found.expected >= 4000


@pytest.mark.parametrize(
    ("content", "holds"),
    [
        (b'{"text": ""}\n' * 5, False),
        (b"broken\n" * 3999, False),
        (b"broken\n" * 5 + b'{"text": "a"}\n', True),
        (b"broken\n" * 4001, True),  # not to be told soon
    ],
)
def test_inputs_for_validation_are_looked_into(tmp_path: Path, content: bytes, holds: bool) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "for training"}) + "\n")
    (tmp_path / "b.jsonl").write_bytes(content)
    corpus = find_corpus([str(tmp_path / "a.jsonl")], held_out=[str(tmp_path / "b.jsonl")])
    assert holds_validation(plan_units(corpus.sources, TextRules()), TextRules()) is holds
