"""Text that tokenizers have got wrong: on what two of them must agree before one may stand in for the other.

In: the content of a `tokenizer.json`, for its added tokens. Out: strings, about 50 KB, the same on every machine
with one Python; nothing here is read from a corpus.
"""

from __future__ import annotations

import unicodedata
from itertools import pairwise
from typing import Any

import numpy as np

from pipeline.data.preparing.cuts import added_tokens

NASTY = (
    "",
    " ",
    "\n",
    "\r",
    "\0",
    "a\0b \0\0",
    "a b  c   d    e\t\tf \t g\n\n\nh\n \n  i\r\n\r\nj\rk \r l\v\fm",
    "   leading, trailing   ",
    "end\n",
    "end\n  ",
    " \n\t \n",
    " " * 333,
    "\t" * 65 + "\n" * 67 + " " * 63 + "x",
    "0 1 12 123 1234 12345678901234567890 3.14 1,000 1e-9 \u0661\u0662\u0663 \u00bd \u2167 \u2460",
    "I'm you're he'd we'll they've it's DON'T I'M WE'LL 'tis rock'n'roll ''s \u2019s '\u017f \u212aelvin",
    (
        "\U0001f600\U0001f44d\U0001f3fd "
        "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \u2764\ufe0f \U0001f1eb\U0001f1f7 1\ufe0f\u20e3"
    ),
    "\u65e5\u672c\u8a9e\u306e\u6587\u3001\u30ab\u30bf\u30ab\u30ca\u3002\u4e2d\u6587\uff0c\u6d4b\u8bd5\u3000",
    "\ud55c\uad6d\uc5b4 \U00020000\U0002a6df",
    (
        "e\u0301 \u00e9 a\u0308\u0323 \u0928\u093f \u0e01\u0e33 \u1100\u1161 \u0300 "
        "\u0301\u0302x \u00c5 \u212b \ufb01 \uff21"
    ),
    (
        "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u200f\u202eabc\u202c "
        "\u0434\u0430 \u0391\u03c3\u03c2 \u01c5 \u0130i\u0307 \u00df\u1e9e"
    ),
    ("\ufeffmark in\ufeffside \u2028line\u2029paragraph\u0085next\u00a0hard\u2003em\u200bzero\u202fnarrow\u180e\u1680"),
    "\ufffd \ufffe \uffff \ue000 \U000e0001 \U0010ffff \u0378 \x7f \x80 \x1b[0m",
    "<|endoftext|> <|im_start|>user<|im_end|> <s> </s> [INST] <unk> <0x0A> \u2581word\u2581 <|endoftext",
    (
        'https://example.org/a/b?c=d&e=%20#f C:\\dir\\n.txt ./x\n/y //\n// {"k": [1, null]} '
        "<a href='b'>c</a> !!!???...---***"
    ),
    "def f(x):\n    if x:\n\t\treturn x  # _private__name camelCaseWord SHOUTING iPhone\n\n\n",
    "pneumono" * 40 + "x" * 1000 + "\u00e9" * 300 + "!" * 300 + "7" * 300,
)
"""Strings that tokenizers have got wrong."""

ASSIGNED = 0x40000
"""Beyond it Unicode has tags and private use alone, of which `NASTY` holds some."""


def nasty_texts(definition: dict[str, Any]) -> list[str]:
    """Strings that have broken tokenizers, and the added tokens of this one, each in several places."""
    strings = [*NASTY, "".join(NASTY)]
    for token in [*added_tokens(definition, special=True)[:32], *added_tokens(definition, special=False)[:64]]:
        text = token["content"]
        strings += [text, f"a{text}b", f" {text} ", f"{text}{text}", f"A.\n{text}\n \t{text}7"]
    mixed = "Don't  stop\r\n\u00e9t\u00e9 \u65e5\u672c 12345 \U0001f600\n\n  x"
    return strings + [f"{'a' * shift} {mixed}{' ' * shift}." for shift in range(70)]  # blocks of 16, 32 and 64 bytes


def unicode_texts() -> list[str]:
    """Both ends and the middle of each stretch of code points of one category: where two tables of Unicode differ."""
    names = "".join(map(unicodedata.category, map(chr, range(ASSIGNED))))  # two letters for each
    categories = np.frombuffer(names.encode(), np.uint16)
    stops = (np.flatnonzero(np.diff(categories)) + 1).tolist()
    points: set[int] = set()
    for start, stop in pairwise([0, *stops, len(categories)]):
        points |= {start, (start + stop) // 2, stop - 1}
    characters = [chr(point) for point in sorted(points) if not 0xD800 <= point < 0xE000]  # surrogates are no text
    return [f"x{c}y1{c}2.{c},  {c} X{c}Y'{c}" for c in characters]
