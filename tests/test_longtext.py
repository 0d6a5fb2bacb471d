"""Long strings of JSON, decoded by parts, are what the json module makes of them whole."""

from __future__ import annotations

import json
import re
import tempfile
import tracemalloc
from pathlib import Path
from typing import Literal

import pytest
import xxhash
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.data.reading import longtext, readers
from pipeline.data.reading.corpus import find_corpus, read_unit
from pipeline.data.reading.formats import Document, Rejected, TextRules
from pipeline.data.reading.longtext import LongText, without_long_strings
from pipeline.data.reading.plan import plan_units
from pipeline.errors import UserError
from tests.reading import drain, read

PIECES = st.sampled_from(
    [
        "a",
        "é",
        "€",
        "😀",
        " ",
        "\\n",
        '\\"',
        "\\\\",
        "\\u0041",
        "\\u20ac",
        "\\ud83d\\ude00",
        "\\ud83d",
        "\\ude00",
        "\\/",
    ]
)
BROKEN = st.sampled_from(["\\x", "\\u12", "\\u12g4", "\n", "\x01", "\\"])


def whole(content: bytes) -> str | None:
    try:
        text: str = json.loads(b'"%s"' % content)
    except ValueError:
        return None
    return text


def by_parts(content: bytes) -> str | None:
    try:
        return "".join(LongText(b"<" + content + b">", 1, 1 + len(content)).parts())
    except ValueError:
        return None


@given(st.lists(PIECES, max_size=30), st.integers(0, 5000))
def test_parts_add_up_to_the_whole(pieces: list[str], fill: int) -> None:
    content = ("".join(pieces) + "x" * fill + "".join(pieces)).encode()
    assert by_parts(content) == whole(content)


@given(st.lists(PIECES, max_size=8), BROKEN, st.lists(PIECES, max_size=8))
def test_what_is_no_json_is_found(before: list[str], broken: str, after: list[str]) -> None:
    content = ("".join(before) + broken + "".join(after)).encode()
    assert by_parts(content) == whole(content)


def test_parts_are_many_and_part_neither_characters_nor_escapes() -> None:
    for shift in range(12):
        content = b"a" * shift + b"\\ud83d\\ude00" * 400_000
        text = LongText(content, 0, len(content))
        assert len(list(text.parts())) > 1
        assert "".join(text.parts()) == json.loads(b'"%s"' % content)


@given(st.dictionaries(st.text(max_size=4), st.one_of(st.text(max_size=40), st.integers(), st.lists(st.text()))))
def test_names_stand_for_long_strings(values: dict[str, object]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(longtext, "LONG_BYTES", 12)
        skeleton, longs = without_long_strings(json.dumps(values, ensure_ascii=False).encode())

    def filled(found: object) -> object:
        if isinstance(found, list):
            return [filled(one) for one in found]
        if isinstance(found, dict):
            return {filled(key): filled(one) for key, one in found.items()}
        return "".join(longs[found].parts()) if isinstance(found, str) and found in longs else found

    assert filled(json.loads(skeleton)) == values


def test_a_string_that_does_not_end_is_told() -> None:
    with pytest.raises(ValueError, match="the string at byte 5 does not end"):
        without_long_strings(b'{"a":"xyz')


LONG = st.lists(PIECES, min_size=8, max_size=40).map("".join)
VALUE = st.one_of(
    LONG.map(lambda body: f'"{body}"'.encode()),
    st.tuples(LONG, BROKEN, LONG).map(lambda parts: f'"{"".join(parts)}"'.encode()),
    st.tuples(LONG, st.sampled_from([b"\xff", b"\xe3\x81", b"\xed\xa0\x80", b"\xc0\xaf"]), LONG).map(
        lambda parts: b'"%s%s%s"' % (parts[0].encode(), parts[1], parts[2].encode())
    ),
    st.sampled_from([b'"short"', b'""', b"null", b"[1, 2]", b"NaN", b"-", b'{"text": "inner text that is long"}']),
)
KEY = st.sampled_from([b'"text"', b'"te\\u0078t"', b'"other"', b'"a key that is rather long"'])
RECORD = st.one_of(
    st.lists(st.tuples(KEY, VALUE), max_size=3).map(lambda pairs: b"{%s}" % b", ".join(b": ".join(p) for p in pairs)),
    VALUE,
)


def records_of(content: bytes, rules: TextRules) -> list[Document | Rejected]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.jsonl")
        path.write_bytes(content)
        return read(path, rules=rules)


@given(
    st.lists(RECORD.filter(lambda record: b"\n" not in record), min_size=1, max_size=4).map(b"\n".join),
    st.sampled_from(["quarantine", "cut"]),
    st.sampled_from(["quarantine", "replace"]),
    st.integers(4, 60),
)
@settings(deadline=None, max_examples=400)
def test_long_records_are_read_as_short_ones(
    content: bytes,
    long_documents: Literal["quarantine", "cut"],
    invalid_utf8: Literal["quarantine", "replace"],
    limit: int,
) -> None:
    assume(not content.startswith(b"PAR1"))
    rules = TextRules(max_document_bytes=limit, long_documents=long_documents, invalid_utf8=invalid_utf8)
    whole = records_of(content, rules)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "LONG_RECORD_BYTES", 1)
        patch.setattr(longtext, "LONG_BYTES", 12)
        patch.setattr(longtext, "_PART", re.compile(longtext._PART.pattern.replace(b"{1,1024}+", b"{1,3}+"), re.DOTALL))
        parted = records_of(content, rules)
    assert [one for one in parted if isinstance(one, Document)] == [one for one in whole if isinstance(one, Document)]
    refused = [[one[:3] for one in found if isinstance(one, Rejected)] for found in (parted, whole)]
    assert refused[0] == refused[1], "where it stands and why; what is quoted of it may be shorter"


def test_long_records_count_what_they_replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONG_RECORD_BYTES", 1)
    monkeypatch.setattr(longtext, "LONG_BYTES", 12)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "bad \xff\xc3 bytes, \\ud800 and \xed\xa0\x80"}\n')
    (unit,) = plan_units(find_corpus([str(tmp_path)]).sources, TextRules())
    (record,), counted = drain(unit, TextRules(invalid_utf8="replace"))
    assert isinstance(record, Document)
    assert record.content.decode() == "bad \ufffd\ufffd bytes, \ufffd and \ufffd\ufffd\ufffd"
    assert counted.replaced == 6


def test_text_that_looks_like_a_name_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONG_RECORD_BYTES", 1)
    monkeypatch.setattr(longtext, "LONG_BYTES", 60)
    mark = xxhash.xxh3_128_hexdigest(b"")
    for text in ("long string 0.0", "long string 0\\u002e0", f"long string 0 of {mark}"):
        content = b'{"text": "%s", "other": "%s"}' % (text.encode(), b"x" * 100)
        (record,) = records_of(content, TextRules())
        assert isinstance(record, Document)
        assert record.content.decode() == json.loads(content)["text"]


def test_a_long_line_is_never_held_as_a_string() -> None:
    text = "words and \n lines, \u00e9, \U0001f600. " * 800_000
    content = json.dumps({"text": text}).encode() + b"\n"
    del text
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.jsonl")
        path.write_bytes(content)
        size = len(content)
        del content
        (unit,) = plan_units(find_corpus([str(path)]).sources, TextRules())
        rules = TextRules(max_document_bytes=2**20 * 8, long_documents="cut")
        tracemalloc.start()
        try:
            documents = sum(1 for _ in read_unit(unit, rules))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert documents > 2
    assert peak < 2 * size + 3 * rules.max_document_bytes, "the line while it is gathered, and a few documents"


def parts_of(count: int, kind: str) -> bytes:
    """JSON in which much is beside the text, none of it a long string."""
    fill = {"lists": b"[],", "texts": b'"%s",' % (b"x" * 2000), "numbers": b"1.5,"}[kind]
    return b'{"text": "a text", "more": [%s 0]}' % (fill * (count // len(fill)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "one.json"])
@pytest.mark.parametrize("kind", ["lists", "texts", "numbers"])
def test_a_record_of_very_many_parts_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    monkeypatch.setattr(readers, "LONG_RECORD_BYTES", 20_000)
    monkeypatch.setattr(longtext, "LONG_BYTES", 4000)
    monkeypatch.setattr(longtext, "SKELETON_BYTES", 30_000)
    small, large = parts_of(28_000, kind), parts_of(32_000, kind)
    if name == "one.json":
        (tmp_path / name).write_bytes(large.replace(b":", b":\n", 1))
        with pytest.raises(UserError, match=r"one\.json is one record over 30000 bytes beside its long strings"):
            read(tmp_path)
        return
    good = b'{"text": "good"}'
    rows = [good, large, small, b'{"text": "%s", "more": %s}' % (b"x" * 25_000, b"[" * 9 + b"]" * 9), good]
    layout = b"[" + b",".join(rows) + b"]" if name == "a.json" else b"\n".join(rows)
    (tmp_path / name).write_bytes(layout)
    found = read(tmp_path)
    assert [record[:3] for record in found if isinstance(record, Rejected)] == [
        (0, 1, "record over 30000 bytes beside its long strings")
    ]
    assert [len(record.content) for record in found if isinstance(record, Document)] == [4, 6, 25_000, 4]


def test_a_record_of_very_many_parts_takes_little_memory(tmp_path: Path) -> None:
    content = parts_of(40 * 2**20, "lists")
    (tmp_path / "a.jsonl").write_bytes(content)
    (unit,) = plan_units(find_corpus([str(tmp_path)]).sources, TextRules())
    tracemalloc.start()
    try:
        assert len(list(read_unit(unit, TextRules()))) == 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(content), "the line while it is gathered; its lists would be 20 times as much"
