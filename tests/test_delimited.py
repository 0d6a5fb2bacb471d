"""A quote too few or too many in a CSV file costs its row, or is said; it joins no rows into one text."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.reading import delimited
from pipeline.data.reading.corpus import find_corpus, read_unit
from pipeline.data.reading.delimited import csv_fields, csv_records, csv_rows, is_tangled
from pipeline.data.reading.formats import Document, Record, TextRules
from pipeline.data.reading.plan import plan_units
from pipeline.errors import UserError
from tests.reading import faults_of, read

TANGLED = "malformed CSV: a quote that does not close"
TEXTS = [f"text {i}, of two\nlines" if i % 3 else f"text {i}" for i in range(1300)]


def rows_of(texts: list[str], order: str = "id,text") -> list[str]:
    layout = {"id,text": '{0},"{1}"\r\n', "text,id": '"{1}",{0}\n', "text": '"{1}"\n'}[order]
    return [order + "\n", *(layout.format(i, text) for i, text in enumerate(texts))]


def before_damage(path: Path) -> tuple[list[Record], str]:
    (unit,) = plan_units(find_corpus([str(path)]).sources, TextRules())
    records: list[Record] = []
    with pytest.raises(UserError) as error:
        records.extend(read_unit(unit, TextRules()))
    return records, str(error.value)


@pytest.mark.parametrize("order", ["id,text", "text,id"])
def test_a_quote_that_is_not_closed_costs_its_row(tmp_path: Path, order: str) -> None:
    for bad in (30, 33):
        rows = rows_of(TEXTS, order)
        rows[bad + 1] = rows[bad + 1].replace('"\r', "\r").replace(f'",{bad}', f",{bad}")
        (tmp_path / "a.csv").write_text("".join(rows), newline="")
        records = read(tmp_path)
        assert faults_of(records) == [(bad, TANGLED)]
        texts = [record[0].decode() for record in records if isinstance(record, Document)]
        assert texts == TEXTS[:bad] + TEXTS[bad + 1 :]
        assert [record.row for record in records] == list(range(1300))


def test_lines_of_a_text_are_no_rows_where_there_is_one_column(tmp_path: Path) -> None:
    rows = rows_of(TEXTS[:40], "text")
    rows[32] = rows[32].replace('"\n', "\n")
    (tmp_path / "a.csv").write_text("".join(rows))
    records = read(tmp_path)
    assert faults_of(records) == [(31, TANGLED)], "with the row after it, which closes it"
    assert [record[0].decode() for record in records if isinstance(record, Document)][:31] == TEXTS[:31]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("order", ["id,text", "text"])
def test_a_quote_that_is_open_at_the_end_is_damage(tmp_path: Path, order: str, packed: bool) -> None:
    rows = rows_of(TEXTS, order)
    for content in (
        "".join(rows)[:-8],
        "".join([*rows[:1300], '7,"open\n' if "id" in order else '"open\n', "8,x\n" * 99]),
    ):
        data = b"\xef\xbb\xbf" + content.encode()
        path = tmp_path / ("a.csv.gz" if packed else "a.csv")
        path.write_bytes(gzip.compress(data) if packed else data)
        records, message = before_damage(path)
        assert [record[0].decode() for record in records] == TEXTS[:-1]
        begun = len("".join(rows[:1300]).encode())
        assert f"past byte {begun} of its text: row 1299 begins there and has a quote that does not end" in message


def test_a_header_that_does_not_end_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,"text\n1,a\n')
    assert "past byte 0 of its text: the header begins there" in before_damage(tmp_path / "a.csv")[1]


def test_text_after_a_quote_within_a_line_is_what_the_csv_module_says(tmp_path: Path) -> None:
    content = 'id,text\n1,"a"b\n2,"a" \n3,a"b\n4,"two\nlines"\n'
    (tmp_path / "a.csv").write_text(content)
    expected = [row[1] for row in csv.reader(io.StringIO(content, newline=""))][1:]
    assert [record[0].decode() for record in read(tmp_path)] == expected


def records_of(content: bytes) -> Iterator[bytes]:
    for record in csv_records(io.BufferedReader(io.BytesIO(content)), 1000, name="x"):
        assert isinstance(record, bytes)
        yield record


@given(st.lists(st.sampled_from(['"', '""', "a", ",", "\n", "\r\n", '","', 'a"b,"\n']), max_size=40), st.integers(1, 3))
@settings(deadline=None, max_examples=300)
def test_untangling_loses_no_byte_and_ends(pieces: list[str], columns: int) -> None:
    content = "".join(pieces).encode() + b"\n"
    found: list[bytes] = []
    with pytest.MonkeyPatch.context() as patch, suppress(UserError):
        patch.setattr(delimited, "_UNTANGLED", 3)
        for row, sound in csv_rows(records_of(content), columns):
            assert isinstance(row, bytes)
            assert not (sound and is_tangled(row))
            found.append(row)
    assert content.startswith(b"".join(found))
    if b"".join(found) == content and not any(map(is_tangled, records_of(content))):
        assert [csv_fields(row) for row in found] == list(csv.reader(io.StringIO(content.decode(), newline="")))
