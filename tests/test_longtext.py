"""Long strings of JSON, decoded by parts, are what the json module makes of them whole."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.reading import longtext
from pipeline.data.reading.longtext import LongText, without_long_strings

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
