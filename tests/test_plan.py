"""Cutting: a pure function of sources and rules, found by seeking."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.reading.bytestream import CutFinder
from pipeline.data.reading.corpus import find_corpus, read_unit
from pipeline.data.reading.formats import TEXT_CHUNK_BYTES, Source, TextRules
from pipeline.data.reading.plan import Unit, plan_units
from pipeline.data.reading.readers import column_bytes
from pipeline.errors import UserError
from tests.reading import drain, read, read_sources, texts_of

GIB = 2**30


def plan(*paths: Path, rules: TextRules) -> tuple[Unit, ...]:
    return plan_units(find_corpus([str(path) for path in paths]).sources, rules)


def line_of(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def test_planning_seeks(tmp_path: Path) -> None:
    path, newlines = tmp_path / "a.jsonl", [2**26 * k + 100 * k for k in range(1, 250)]
    with path.open("wb") as file:  # a sparse file: reading 16 GiB would take a while
        for newline in newlines:
            file.seek(newline)
            file.write(b"\n")
        file.truncate(16 * GIB)
    source = Source(str(path), "jsonl", "", 16 * GIB, "")
    cuts = [(piece.start, piece.stop) for unit in plan_units([source], TextRules()) for piece in unit.pieces]
    stops = [newline + 1 for newline in newlines]
    assert cuts == list(zip([0, *stops], [*stops, 16 * GIB], strict=True))


@pytest.mark.parametrize("separator", [None, "|"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_ranges_tile_a_file_and_end_where_records_do(tmp_path: Path, name: str, separator: str | None) -> None:
    end = b"|" if separator and name == "a.txt" else b"\n"
    content = b"\xef\xbb\xbf" + b"".join(b"x" * (i % 300) + end for i in range(400))
    (tmp_path / name).write_bytes(content)
    units = plan(tmp_path, rules=TextRules(unit_bytes=1000, separator=separator))
    pieces = [piece for unit in units for piece in unit.pieces]
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
    assert pieces[-1].stop == len(content)
    assert all(content[piece.stop - 1 : piece.stop] == end for piece in pieces)
    assert all(1000 < piece.stop - piece.start <= 1300 for piece in pieces[:-1])
    assert not any(piece.whole for piece in pieces)
    assert units == plan(tmp_path, rules=TextRules(unit_bytes=1000, separator=separator))


def test_text_without_newlines_is_cut_between_characters(tmp_path: Path) -> None:
    content = "日本é😀" * 1000
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    pieces = [piece for unit in plan(tmp_path, rules=TextRules(unit_bytes=999)) for piece in unit.pieces]
    assert all(1998 <= piece.stop - piece.start <= 2001 for piece in pieces[:-1])
    assert "".join(texts_of(read(tmp_path, rules=TextRules(unit_bytes=999)))) == content


def test_every_part_of_a_long_text_is_chunked_and_a_short_one_is_whole(tmp_path: Path) -> None:
    content = ("x" * 99 + "\n") * 75_000
    (tmp_path / "a.txt").write_text(content)
    sizes = [len(text) for text in texts_of(read(tmp_path, rules=TextRules(unit_bytes=4 * 2**20)))]
    assert sum(sizes) == len(content)
    assert len(sizes) >= 6
    assert max(sizes) <= TEXT_CHUNK_BYTES + 100
    assert texts_of(read(tmp_path, rules=TextRules(unit_bytes=8 * 2**20))) == [content]


def test_chunks_of_a_long_text_fit_the_longest_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x é " * 5000)
    rules = TextRules(unit_bytes=10_000, max_document_bytes=1000)
    texts = texts_of(read(tmp_path, rules=rules))
    assert "".join(texts) == "x é " * 5000
    assert max(len(text.encode()) for text in texts) <= 1000


@given(st.text("a\n", max_size=30), st.integers(1, 12), st.integers(1, 4), st.integers(1, 4))
def test_a_cut_ends_a_separator_that_counting_from_the_left_finds(text: str, size: int, block: int, many: int) -> None:
    separator, content = "\n" * many, text.encode()
    finder, ends, position = CutFinder(0, size=size, delimiter=separator.encode(), flexible=False), set(), 0
    for part in text.split(separator)[:-1]:
        position += len(part) + many
        ends.add(position)
    cut = None
    while cut is None and finder.position < len(content):
        cut = finder.find(content[finder.position : finder.position + block])
    assert cut is None or (cut in ends and cut >= size + many)
    if many == 1:
        assert cut == min((end for end in ends if end > size), default=None)


def test_large_compressed_files_have_a_unit_of_their_own_and_small_ones_are_grouped(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl.gz", "c.txt", "e.csv.gz", "f.txt"):
        packed = gzip.compress(b"") if name.endswith(".gz") else b"x" * 20
        (tmp_path / name).write_bytes(packed)
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(b"".join(line_of(str(i)) for i in range(1000))))
    (tmp_path / "e.json.gz").write_bytes(gzip.compress(b" " * 2000))
    units = plan(tmp_path, rules=TextRules(unit_bytes=500))
    names = [[Path(piece.source.name).name for piece in unit.pieces] for unit in units]
    assert names == [["a.txt", "b.jsonl.gz", "c.txt"], ["d.jsonl.zst"], ["e.csv.gz", "e.json.gz", "f.txt"]]
    assert [unit.name for unit in units] == ["00000", "00001", "00002"]
    assert [unit.may_be_any_size for unit in units] == [True] * 3
    assert not any(unit.may_be_any_size for unit in plan(tmp_path / "a.txt", tmp_path / "f.txt", rules=TextRules()))


def test_empty_texts_join_a_unit_and_begin_none(tmp_path: Path) -> None:
    for name in ("a.txt", "c.txt", "e.txt", "f.jsonl"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(line_of("x" * 60) * 9)
    (tmp_path / "d.txt").write_bytes(b"x" * 80)
    units = plan(tmp_path, rules=TextRules(unit_bytes=100))
    names = [[Path(piece.source.name).name for piece in unit.pieces] for unit in units]
    assert names == [["a.txt", "b.jsonl"], *[["b.jsonl"]] * 3, ["b.jsonl"], ["c.txt", "d.txt", "e.txt"]]
    assert [len(unit.pieces) for unit in plan(tmp_path / "a.txt", rules=TextRules())] == [1]


def test_a_byte_order_mark_is_dropped_at_the_very_start_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + b"abcdefgh|\xef\xbb\xbfdef" * 9))
    sources = find_corpus([str(tmp_path)]).sources
    texts = texts_of(read_sources(sources, TextRules(unit_bytes=5, separator="|")))
    assert "".join(texts) == "abcdefgh" + "\ufeffdefabcdefgh" * 8 + "\ufeffdef"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["csv", "json"])
def test_tables_and_arrays_are_one_unit(tmp_path: Path, kind: str, packed: bool) -> None:
    texts = [f"text {i}, {'x' * (i % 40)}" + '\n"quoted"' * (i % 3) for i in range(600)]
    rows = io.StringIO(newline="")
    csv.writer(rows).writerows([["text", "id"], *([text, i] for i, text in enumerate(texts))])
    objects = json.dumps([{"text": text, "id": i} for i, text in enumerate(texts)], indent=1)
    content = b"\xef\xbb\xbf" + (rows.getvalue() if kind == "csv" else objects).encode()
    path = tmp_path / (f"a.{kind}.gz" if packed else f"a.{kind}")
    path.write_bytes(gzip.compress(content) if packed else content)
    rules = TextRules(unit_bytes=2000)
    (unit,) = plan(path, rules=rules)
    records, counted = drain(unit, rules)
    assert texts_of(records) == texts
    assert counted.rows == {0: 600}


@given(
    st.lists(st.text('ab",\n\r é', max_size=9).filter(bool), max_size=20),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=100)
def test_rows_are_the_same_wherever_they_are_cut(texts: list[str], unit_bytes: int, table: bool, ends: bool) -> None:
    rows = io.StringIO(newline="")
    csv.writer(rows).writerows([["id", "text"], *([i, text] for i, text in enumerate(texts))])
    content = (
        (rows.getvalue() if ends else rows.getvalue().removesuffix("\r\n"))
        if table
        else json.dumps([{"text": text} for text in texts])
    )
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder, "a.csv" if table else "a.json")).write_text(content, newline="", encoding="utf-8")
        records = read(path, rules=TextRules(unit_bytes=unit_bytes))
    assert texts_of(records) == texts
    assert [record.row for record in records] == list(range(len(texts)))


def test_rows_run_on_over_pieces_of_one_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(line_of("x") + b"\n" + line_of("y") + line_of("z"))
    pieces = tuple(piece for unit in plan(tmp_path, rules=TextRules(unit_bytes=1)) for piece in unit.pieces)
    records, counted = drain(Unit(0, pieces), TextRules())
    assert [record.row for record in records] == [0, 2, 3]
    assert counted.rows == {0: 4}


def test_row_groups_are_joined_up_to_a_unit(tmp_path: Path) -> None:
    texts = [f"{i:04}" + "x" * 96 for i in range(100)]
    pq.write_table(
        pa.table({"id": range(100), "text": texts}),
        tmp_path / "a.parquet",
        row_group_size=10,
        use_dictionary=False,
        write_statistics=False,
    )
    units = plan(tmp_path, rules=TextRules(unit_bytes=3500))
    assert [(piece.start, piece.stop) for unit in units for piece in unit.pieces] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert texts_of(read(tmp_path, rules=TextRules(unit_bytes=3500))) == texts


@pytest.mark.parametrize("key", ["data.text", "text", "text.en", "nested"])
def test_a_dot_in_the_name_of_a_column_is_part_of_it(tmp_path: Path, key: str) -> None:
    """Sizes are those that pyarrow tells of files with that column alone."""
    names = ["text.en", "text", "data.text", "data"]
    texts = {name: [f"{name} {i} " + "x" * (i * len(name) % 50) for i in range(60)] for name in names}
    nested = [{"text": text, "more": [text]} for text in texts["data"]]
    layout = {"row_group_size": 20, "use_dictionary": False, "compression": "none"}
    pq.write_table(pa.table(texts | {"nested": nested}), tmp_path / "a.parquet", **layout)
    alone = pa.table({key: texts.get(key, nested)})
    pq.write_table(alone, tmp_path / "alone.bin", **layout)
    groups = [pq.read_metadata(tmp_path / "alone.bin").row_group(number) for number in range(3)]
    sizes = [sum(group.column(leaf).total_uncompressed_size for leaf in range(group.num_columns)) for group in groups]
    rules = TextRules(key=key, unit_bytes=1)
    assert [unit.size for unit in plan(tmp_path, rules=rules)] == sizes
    if key in texts:
        assert texts_of(read(tmp_path, rules=rules)) == texts[key]


def test_a_row_group_with_rows_has_a_size() -> None:
    metadata = mock.Mock(num_columns=1)
    metadata.schema.column.return_value.path = "text"
    metadata.row_group.return_value = mock.Mock(num_rows=5)
    metadata.row_group.return_value.column.return_value.total_uncompressed_size = 0
    assert column_bytes(metadata, 0, "text") == 1, "some writers leave sizes out"


def test_names_in_parquet_that_are_no_text_are_damage(tmp_path: Path) -> None:
    """A bit that flips in the footer may be one of a name."""
    pq.write_table(pa.table({"text": ["good"], "other": ["x"]}), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    for bad in (b"\xffther", b"oth\xe9r"):
        (tmp_path / "a.parquet").write_bytes(content.replace(b"other", bad))
        with pytest.raises(UserError, match=r"a\.parquet: .*damaged or incomplete"):
            read(tmp_path)


def test_a_parquet_file_without_the_text_column_stops_the_plan_and_a_damaged_one_does_not(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["good"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    sources = find_corpus([str(tmp_path)]).sources
    (unit,) = plan_units(sources, TextRules())
    records = read_unit(unit, TextRules())
    assert next(records)[0] == b"good"
    with pytest.raises(UserError, match=r"cannot read .*b.parquet"):
        next(records)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes())  # mended since: still no silence
    with pytest.raises(UserError, match=r"b.parquet is another file than when the work was planned"):
        list(read_unit(unit, TextRules()))
    pq.write_table(pa.table({"body": ["good"]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c.parquet has no key 'text'; found 'body'"):
        plan(tmp_path, rules=TextRules())


def test_sizes_that_hold_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="documents of at least 4"):
        TextRules(max_document_bytes=3)
    with pytest.raises(UserError, match="units of at least 1"):
        TextRules(unit_bytes=0)
