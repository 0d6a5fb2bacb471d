"""Reading: any bytes give the same records wherever they are cut, and every record is a document or named."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.data.reading.corpus import find_corpus, read_unit
from pipeline.data.reading.delimited import HEAD_BYTES, Overlong, json_elements, separated
from pipeline.data.reading.formats import Document, Rejected, TextRules, cut_long, excerpt
from pipeline.data.reading.plan import plan_units
from pipeline.data.reading.signatures import unreadable
from pipeline.errors import UserError
from tests.reading import Records, drain, faults_of, read, read_sources, texts_of

LINE = st.one_of(
    st.sampled_from(
        [b'{"text": "good \xc3\xa9"}', b'{"text": "a\\u0000b"}', b'{"text": "\\ud800"}', b"", b" \r", b"[1]"]
    ),
    st.sampled_from([b'{"text": "\xff"}', b'\xef\xbb\xbf{"text": "marked"}', b'{"text": ""}', b'{"text": 1', b"\0"]),
    st.text("abé日 ", min_size=1).map(lambda text: json.dumps({"text": text}).encode()),
    st.binary(max_size=12),
)
LINES = st.builds(
    lambda lines, ends, last: b"".join(a + b for a, b in zip(lines, ends, strict=True)) + last,
    *[st.shared(st.integers(0, 12), key="n").flatmap(lambda n: st.lists(LINE, min_size=n, max_size=n))],
    st.shared(st.integers(0, 12), key="n").flatmap(
        lambda n: st.lists(st.sampled_from([b"\n", b"\r\n"]), min_size=n, max_size=n)
    ),
    LINE,
)


@contextmanager
def blocks_of(size: int) -> Iterator[None]:
    """Blocks so small that everything crosses their borders."""
    modules = ["bytestream", "delimited", "readers", "plan"]
    patches = [mock.patch(f"pipeline.data.reading.{module}.BLOCK_BYTES", size) for module in modules]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def records_of(content: bytes, name: str, rules: TextRules) -> Records:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        return read(path, rules=rules)


def json_of(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def naive_documents(content: bytes) -> list[tuple[int, str]]:
    """Rows and texts of the lines that any JSON reader takes for objects with a text."""
    found = []
    for row, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n")):
        record = json_of(line) if not line.startswith(b"\xef\xbb\xbf") else None
        text = record.get("text") if isinstance(record, dict) else None
        if isinstance(text, str) and text and not any(0xD800 <= ord(character) < 0xE000 for character in text):
            found.append((row, text))
    return found


@given(LINES, st.integers(1, 200), st.integers(1, 9))
@settings(max_examples=100)
def test_json_lines_are_the_same_wherever_they_are_cut_and_packed(content: bytes, unit_bytes: int, block: int) -> None:
    assume(not content.startswith((b"PAR1", b"\x1f\x8b", b"\x28\xb5\x2f\xfd")) and content[1:4] != b"*M\x18")
    assume(unreadable(content) is None)  # they are what they say they are
    whole = records_of(content, "a.jsonl", TextRules())
    small = TextRules(unit_bytes=unit_bytes)
    with blocks_of(block):
        assert records_of(content, "a.jsonl", small) == whole
        assert records_of(gzip.compress(content[:9]) + gzip.compress(content[9:]), "a.jsonl.gz", small) == whole
        frames = zstandard.compress(content[:9]) + zstandard.compress(content[9:])
        assert records_of(frames, "a.jsonl.zst", small) == whole
    documents = [(record.row, record.content.decode()) for record in whole if isinstance(record, Document)]
    assert documents == naive_documents(content)
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert [record.row for record in whole] == [row for row, line in enumerate(lines) if line and not line.isspace()]


@given(
    st.text("ab\n-", max_size=60),
    st.sampled_from(["\n\n", "--", "a", "-a-", "aba"]),
    st.integers(1, 40),
    st.integers(1, 7),
)
@settings(max_examples=150)
def test_separated_text_is_what_split_says(text: str, separator: str, unit_bytes: int, block: int) -> None:
    rules = TextRules(separator=separator, unit_bytes=unit_bytes)
    with blocks_of(block):
        plain = records_of(text.encode(), "a.txt", rules)
        packed = records_of(gzip.compress(text.encode()), "a.txt.gz", rules)
    expected = [(row, part) for row, part in enumerate(text.split(separator)) if part]
    assert [(record.row, record.content.decode()) for record in plain if isinstance(record, Document)] == expected
    assert plain == packed
    assert len(plain) == len(expected)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('a"\\\n[]{},é\x00'),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text('k"\\[,'), values, max_size=3),
    max_leaves=8,
)


@given(st.lists(JSON, max_size=5), st.booleans(), st.integers(1, 9))
@settings(max_examples=100)
def test_json_arrays_are_taken_apart(values: list[object], pretty: bool, block: int) -> None:
    content = json.dumps(values, indent=1 if pretty else None, ensure_ascii=pretty).encode()
    with blocks_of(block):
        found = list(json_elements(io.BufferedReader(io.BytesIO(content[1:])), 10**6, name="x"))
        assert [json.loads(element) for element in found if isinstance(element, bytes)] == values
        cut = io.BufferedReader(io.BytesIO(content[1:-1]))
        with pytest.raises(UserError, match="does not end"):
            list(json_elements(cut, 10**6, name="x"))


SUFFIXES = [".jsonl", ".json", ".csv", ".txt", ".parquet", ".jsonl.gz", ".json.zst", ".csv.gz", ".txt.zst"]
MAGIC = [
    b"",
    b"PAR1",
    b"\x1f\x8b\x08\0",
    b"\x28\xb5\x2f\xfd",
    b"[",
    b'{"text": "',
    b"text\n",
    gzip.compress(b"[1")[:-1],
]


@given(st.sampled_from(SUFFIXES), st.sampled_from(MAGIC), st.binary(max_size=80), st.integers(1, 100))
@settings(max_examples=200)
def test_noise_never_crashes(suffix: str, magic: bytes, content: bytes, unit_bytes: int) -> None:
    try:
        for rules in [TextRules(unit_bytes=unit_bytes), TextRules(max_document_bytes=4, separator="\n\n")]:
            for record in records_of(magic + content, "a" + suffix, rules):
                if isinstance(record, Rejected):
                    assert len(record.excerpt) <= 200
                    record.excerpt.encode()
    except UserError:  # the one way to fail
        pass


def json_array(texts: list[str]) -> bytes:
    return json.dumps([{"text": text} for text in texts]).encode()


def json_lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def csv_rows(texts: list[str]) -> bytes:
    return b"text\n" + "".join(f'"{text}"\r\n' for text in texts).encode()


LAYOUTS: dict[str, Callable[[list[str]], bytes]] = {
    "a.jsonl": json_lines,
    "a.json": json_array,
    "a.csv": csv_rows,
    "a.txt": lambda texts: b"|".join(text.encode() for text in texts),
}
LIMITED = TextRules(separator="|", max_document_bytes=100, max_record_bytes=800)


@pytest.mark.parametrize("block", [7, 2**20])
@pytest.mark.parametrize("length", [700, 900, 5000])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_record_over_the_limit_costs_itself(name: str, length: int, block: int) -> None:
    with blocks_of(block):
        records = records_of(LAYOUTS[name](["one", "x" * length, "three"]), name, LIMITED)
    reasons = {"text over 100 bytes", "record over 800 bytes"} if length < 800 else {"record over 800 bytes"}
    assert [record.row for record in records] == [0, 1, 2]
    assert [record[0] for record in records[::2]] == [b"one", b"three"]
    assert faults_of(records)[0][1] in reasons
    assert all(
        len(record.excerpt) <= 200 and "xxx" in record.excerpt for record in records if isinstance(record, Rejected)
    )


def test_a_limit_on_records_of_its_own(tmp_path: Path) -> None:
    assert TextRules().record_bytes == 64 * 2**20
    assert TextRules(max_document_bytes=2**30).record_bytes == 2**30
    (tmp_path / "a.jsonl").write_bytes(json_lines(["x" * 50]) + b'{"text": "y", "more": "' + b"z" * 500 + b'"}\n')
    rules = TextRules(max_record_bytes=200)
    assert faults_of(read(tmp_path, rules=rules)) == [(1, "record over 200 bytes")]
    assert len(texts_of(read(tmp_path, rules=TextRules(max_record_bytes=600)))) == 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_that_would_take_far_more_memory_than_it_is_long_is_not_parsed(tmp_path: Path, name: str) -> None:
    nested = b'{"text": "x", "more": [1' + b",[]" * 9_000_000 + b"]}"
    between = {"a.jsonl": (b"", b"\n", b"\n"), "a.json": (b"[", b",", b"]")}[name]
    (tmp_path / name).write_bytes(between[0] + nested + between[1] + b'{"text": "good"}' + between[2])
    records = read(tmp_path)
    assert faults_of(records) == [(0, "JSON of over 8388608 arrays and objects")]
    assert [record.content for record in records if isinstance(record, Document)] == [b"good"]


def test_a_long_text_full_of_brackets_is_a_text(tmp_path: Path) -> None:
    text = "f(a[0], {}) " * 1_600_000
    (tmp_path / "a.jsonl").write_bytes(json_lines([text]))
    assert texts_of(read(tmp_path)) == [text]


def test_a_text_at_the_limit_stays_and_one_more_byte_goes() -> None:
    for name, layout in LAYOUTS.items():
        records = records_of(layout(["x" * 100, "é" * 50, "x" * 101]), name, LIMITED)
        assert [isinstance(record, Document) for record in records] == [True, True, False], name
        assert faults_of(records) == [(2, "text over 100 bytes")], name


def test_a_line_at_the_record_limit_is_read() -> None:
    line = json.dumps({"text": "good", "rest": ""}).encode()
    for spare, fate in [(0, Document), (1, Rejected)]:
        padded = line.replace(b'""', b'"' + b"x" * (800 - len(line) + spare) + b'"')
        for end in (b"\n", b""):
            records = records_of(b'{"text": "a"}\n' + padded + end, "a.jsonl", LIMITED)
            assert [type(record) for record in records] == [Document, fate]


@given(st.text("ab é日😀\n", min_size=1, max_size=200), st.integers(4, 40))
def test_cut_documents_add_up_and_part_no_character(text: str, limit: int) -> None:
    parts = list(cut_long(text.encode(), limit))
    assert "".join(part.decode() for part in parts) == text
    assert all(0 < len(part) <= limit for part in parts)


def test_long_documents_are_cut_after_white_space() -> None:
    rules = TextRules(max_document_bytes=100, long_documents="cut")
    words = "seven b " * 40
    records = records_of(json_lines(["short", words, "short"]), "a.jsonl", rules)
    assert "".join(texts_of(records)[1:-1]) == words
    assert [record.row for record in records] == [0, 1, 1, 1, 1, 2]
    assert all(text.endswith(" ") and 88 <= len(text) <= 100 for text in texts_of(records)[1:-2])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_bad_bytes_are_replaced_one_by_one_and_counted(name: str, tmp_path: Path) -> None:
    content = LAYOUTS[name](["good é", "a@b", "\ufffd"]).replace(b"@", b"\xff\xc3")
    (tmp_path / name).write_bytes(content)
    rules = TextRules(separator="|", invalid_utf8="replace")
    (unit,) = plan_units(find_corpus([str(tmp_path)]).sources, rules)
    records, counted = drain(unit, rules)
    assert texts_of(records) == ["good é", "a\ufffd\ufffdb", "\ufffd"]
    assert counted.replaced == 2
    assert counted.rows == {0: 3}
    assert faults_of(read(tmp_path, rules=TextRules(separator="|"))) == [(1, "invalid UTF-8")]


def test_lone_surrogates_and_bad_parquet_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\ud800!\\ud83d\\ude00"}')
    column = pa.Array.from_buffers(pa.string(), 2, pa.array([b"good", b"\xff"]).buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "b.parquet")
    assert texts_of(read(tmp_path, rules=TextRules(invalid_utf8="replace"))) == ["\ufffd!😀", "good", "\ufffd"]


@given(st.one_of(st.text(), st.binary(), st.lists(st.text()), st.floats()))
def test_excerpts_are_short_and_writable(value: object) -> None:
    assert len(excerpt(value)) <= 200
    excerpt(value).encode()
    assert len(excerpt("\udcff" * 500)) == len(excerpt(b"\xff" * 500)) == 200


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a.txt"])
def test_memory_stays_bounded(tmp_path: Path, name: str) -> None:
    texts = ["x" * 1000] * 3000 + ["x" * (40 * 2**20)] + ["x" * 1000] * 3000
    (tmp_path / name).write_bytes(LAYOUTS[name](texts))
    rules = TextRules(separator="|", max_document_bytes=2**18, max_record_bytes=2**21, unit_bytes=2**20)
    sources = find_corpus([str(tmp_path)]).sources
    tracemalloc.start()
    rows = sum(1 for unit in plan_units(sources, rules) for _ in read_unit(unit, rules))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 6001
    assert peak < 24 * 2**20


def test_parquet_with_large_cells_is_read_few_rows_at_a_time(tmp_path: Path) -> None:
    texts = [f"{row}" + "x" * 2**20 for row in range(64)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", use_dictionary=False, write_batch_size=1)
    before = pa.total_allocated_bytes()
    peak = 0
    sources, rows = find_corpus([str(tmp_path)]).sources, 0
    for unit in plan_units(sources, TextRules()):
        for record in read_unit(unit, TextRules()):
            assert record[0] == texts[rows].encode()
            rows, peak = rows + 1, max(peak, pa.total_allocated_bytes() - before)
    assert rows == 64
    assert peak < 32 * 2**20


def test_equal_texts_of_a_dictionary_are_made_once(tmp_path: Path) -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 0]), pa.array(["x" * 1000, "y"]))
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    records = read(tmp_path)
    assert records[0][0] is records[3][0]
    assert faults_of(records) == [(2, "text is null")]


def test_large_and_view_strings_and_binaries_are_texts(tmp_path: Path) -> None:
    for name, kind in {"a": pa.large_string(), "b": pa.binary(), "c": pa.string_view()}.items():
        pq.write_table(pa.table({"text": pa.array(["é", "b"]).cast(kind)}), tmp_path / f"{name}.parquet")
    assert texts_of(read(tmp_path)) == ["é", "b"] * 3


@pytest.mark.parametrize(
    "column",
    [
        pa.array([10**16, None], pa.timestamp("ms")),
        pa.array([10**14, None], pa.duration("s")),
        pa.array([[10**16], None], pa.list_(pa.timestamp("ms"))),
        pa.array([2**30, None], pa.date32()),
    ],
)
def test_times_that_python_cannot_hold_are_no_texts(column: pa.Array, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert [reason for _, reason in faults_of(read(tmp_path))] == ["text is not a string"] * 2


def test_frames_with_long_windows_and_skippable_frames(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(97, 122, 300_000, np.uint8).tobytes()
    content = json_lines([noise.decode()] * 4)
    packed = compress_long(content)
    skippable = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
    (tmp_path / "a.jsonl.zst").write_bytes(packed + skippable + packed)
    assert texts_of(read(tmp_path)) == [noise.decode()] * 8
    (tmp_path / "a.jsonl.zst").write_bytes(packed + packed[:-5])
    with pytest.raises(UserError, match=r"cannot read .*a.jsonl.zst past byte [0-9]+ .*damaged or incomplete"):
        read(tmp_path)


def compress_long(content: bytes) -> bytes:
    """A frame of zstd with a window that Arrow refuses."""
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = frame.compress(content) + frame.flush()
    assert zstandard.get_frame_parameters(packed).window_size > 2**27
    return packed


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress, compress_long])
def test_a_byte_order_mark_may_come_in_pieces(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    content = b"\xef\xbb\xbftext"
    (tmp_path / "a.txt").write_bytes(b"".join(pack(content[i : i + 1]) for i in range(len(content))))
    assert texts_of(read(tmp_path)) == ["text"]


def test_a_file_that_shrank_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(["x" * 50] * 50))
    sources = find_corpus([str(tmp_path)]).sources
    (tmp_path / "a.jsonl").write_bytes(json_lines(["x" * 50] * 40))
    with pytest.raises(UserError, match="ends at byte 2520, 630 bytes sooner than when the work was planned"):
        read_sources(sources, TextRules())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"}, {"text": "b', "element 1 begins at byte 15 of the array and does not end"),
        (b'[{"text": "a"}] [', "more follows the array, which ends at byte 15"),
        (b'{"text": \n "a"} {"text": "b"}', "is not valid JSON.*one object a line"),
        (b'{"text": \n "' + b"x" * 900 + b'"}', "one JSON value of over --max-record-bytes 800"),
    ],
)
def test_json_that_does_not_end_well_is_named_after_what_came_before(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "a.json").write_bytes(content)
    (unit,) = plan_units(find_corpus([str(tmp_path)]).sources, LIMITED)
    records = read_unit(unit, LIMITED)
    if content.startswith(b"["):
        assert next(records) == Document(b"a", 0, 0)
    with pytest.raises(UserError, match=message):
        list(records)


def test_bad_elements_of_an_array_cost_themselves() -> None:
    records = records_of(b'[{"text": "a"}, {"text": 1 2}, , 5, {"text": "b"}, ]', "a.json", TextRules())
    assert faults_of(records) == [
        (1, "malformed JSON"),
        (2, "malformed JSON"),
        (3, "not a JSON object"),
        (5, "malformed JSON"),
    ]
    assert [record[0] for record in records if isinstance(record, Document)] == [b"a", b"b"]
    assert records_of(b" [ ] ", "a.json", TextRules()) == []


def test_a_head_is_all_that_is_kept_of_what_is_overlong() -> None:
    stream = io.BufferedReader(io.BytesIO(b"a|" + b"x" * 9000 + b"|b"))
    with blocks_of(100):
        assert list(separated(stream, b"|", 50)) == [b"a", Overlong(b"x" * HEAD_BYTES), b"b"]
