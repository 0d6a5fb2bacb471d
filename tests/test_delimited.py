"""CSV is what the strict csv module says: a broken row costs itself, and a quote without an end is told."""

from __future__ import annotations

import csv
import gzip
import io
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.reading.corpus import check_text_key, find_corpus, read_unit
from pipeline.data.reading.delimited import BadRow, Overlong, csv_rows
from pipeline.data.reading.formats import Document, Record, TextRules
from pipeline.data.reading.plan import plan_units
from pipeline.errors import UserError
from tests.reading import faults_of, read, texts_of

TEXTS = [f"text {i}, of two\nlines" if i % 3 else f"text {i}" for i in range(1300)]
LIMIT = 10**6


def table(texts: list[str]) -> list[str]:
    return ["id,text\n", *(f'{i},"{text}"\r\n' for i, text in enumerate(texts))]


def before_damage(path: Path) -> tuple[list[Record], str]:
    (unit,) = plan_units(find_corpus([str(path)]).sources, TextRules())
    records: list[Record] = []
    with pytest.raises(UserError) as error:
        records.extend(read_unit(unit, TextRules()))
    return records, str(error.value)


def rows_of(content: bytes, limit: int = LIMIT) -> list[list[str] | Overlong | BadRow]:
    return list(csv_rows(io.BufferedReader(io.BytesIO(content)), limit, name="x"))


@given(st.text('a",\r\né\0', max_size=40))
@settings(max_examples=250)
def test_csv_is_what_the_strict_csv_module_says(text: str) -> None:
    expected: list[list[str]] = []
    reader, error = csv.reader(io.StringIO(text, newline=""), strict=True), ""
    try:
        expected.extend(row for row in reader if row)
    except csv.Error as found:
        error = str(found)
    got: list[object] = []
    with pytest.raises(UserError, match="does not end") if "end of data" in error else suppress(UserError):
        got.extend(csv_rows(io.BufferedReader(io.BytesIO(text.encode())), LIMIT, name="x"))
    assert got[: len(expected)] == expected
    if error and "end of data" not in error:
        assert isinstance(got[len(expected)], BadRow), "and reading goes on with the next line"
    elif not error:
        assert len(got) == len(expected)


def test_a_broken_row_costs_itself(tmp_path: Path) -> None:
    rows = table(TEXTS)
    rows[31] = '30,"text"30\n'
    rows[41] = '40,"open\n'  # up to the quote that opens the next text
    (tmp_path / "a.csv").write_text("".join(rows), newline="")
    records = read(tmp_path)
    expected, fields = "malformed CSV: ',' expected after '\"'", "malformed CSV: not as many fields as the header"
    assert faults_of(records) == [(30, expected), (40, expected), (41, fields)], "the last is what is left of text 41"
    texts = [record[0].decode() for record in records if isinstance(record, Document)]
    assert texts == TEXTS[:30] + TEXTS[31:40] + TEXTS[42:]


def test_a_row_with_a_field_too_many_or_too_few_is_broken(tmp_path: Path) -> None:
    """A comma without quotes would cut the text off without a word."""
    (tmp_path / "a.csv").write_text("id,text\n1,hello, world\n2,good\n3\n")
    records = read(tmp_path)
    assert faults_of(records) == [(row, "malformed CSV: not as many fields as the header") for row in (0, 2)]
    assert [record.content for record in records if isinstance(record, Document)] == [b"good"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_quote_that_is_open_at_the_end_is_damage(tmp_path: Path, packed: bool) -> None:
    rows = table(TEXTS)
    for content in ("".join(rows)[:-8], "".join([*rows[:1300], '7,"open\n', "8,x\n" * 99])):
        data = b"\xef\xbb\xbf" + content.encode()
        path = tmp_path / ("a.csv.gz" if packed else "a.csv")
        path.write_bytes(gzip.compress(data) if packed else data)
        records, message = before_damage(path)
        assert [record[0].decode() for record in records] == TEXTS[:-1]
        begun = len("".join(rows[:1300]).encode())
        assert f"past byte {begun} of its text: row 1299 begins there and has a quote that does not end" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('id,"text\n1,a\n', "past byte 0 of its text: the header begins there"),
        ('id,"te"xt\n1,a\n', 'is not valid CSV: its first row begins with \'id,"te"xt'),
    ],
)
def test_a_header_that_is_none_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    assert message in before_damage(tmp_path / "a.csv")[1]


def test_long_fields_and_long_headers_are_read(tmp_path: Path) -> None:
    """Over 131,072 bytes, at which the csv module stops unless told otherwise."""
    long = "h" * 200_000
    (tmp_path / "a.csv").write_text(f"{long},text\n1,{long}\n")
    assert texts_of(read(tmp_path)) == [long]
    with pytest.raises(UserError, match=r"a\.csv has no key 'body'"):
        check_text_key(find_corpus([str(tmp_path)]).sources, "body")


@pytest.mark.parametrize(
    "long",
    [
        "x" * 3000,
        '"' + "x" * 3000 + '"',
        '"' + "x,\n" * 1000 + '"',
        '"' + 'x""y\r\n' * 600 + '"',
        "é" * 1500,
        "a," * 999,
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_row_over_the_limit_costs_itself(long: str, end: str) -> None:
    content = end.join(["id,text", '1,"a\nb"', f"2,{long}", "3,c", ""])
    header, first, over, last = rows_of(content.encode(), 1000)
    assert (header, first, last) == (["id", "text"], ["1", "a\nb"], ["3", "c"])
    assert isinstance(over, Overlong)
    assert over.head.startswith(f"2,{long[:100]}".encode()[:100])


def test_a_row_over_the_limit_that_does_not_end_is_damage() -> None:
    content = b'id,text\n1,a\n2,"' + b"x\n" * 3000
    found: list[object] = []
    with pytest.raises(
        UserError, match=r"past byte 12 of its text: row 1 begins there and has a quote that does not end"
    ):
        found.extend(csv_rows(io.BufferedReader(io.BytesIO(content)), 1000, name="x"))
    assert found == [["id", "text"], ["1", "a"]]
