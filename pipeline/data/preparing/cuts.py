"""Where a long document may be cut without changing its ids.

In: the content of a `tokenizer.json`, documents. Out: whether this tokenizer's ids of a document are those of its
parts end to end, and the parts. Encoding by parts bounds memory: `tokenizers` keeps about 500 bytes a token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pipeline.data.tokenizer_files import CL100K, O200K

_SINCE_GPT4 = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORD_PATTERNS = frozenset(
    {
        # GPT-2, written out
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        # GPT-4 as it was first published, Llama 3
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _SINCE_GPT4,
        # Qwen 2 and 3
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _SINCE_GPT4,
        CL100K,
        O200K,
    }
)
"""Regular expressions for words of which `divisible` holds."""

_SAFE_CUT = re.compile(
    rb"\n(?=[!-.0-~]|[\xc3-\xe0\xe4-\xf4]|\xe3(?!\x80\x80))(?<=[!-~\x80-\xbf]\n)"
    rb"(?<!\xc2[\x80-\xbf]\n)(?<!\xe1[\x80-\xbf]{2}\n)(?<!\xe2[\x80-\xbf]{2}\n)(?<!\xe3\x80\x80\n)"
)
"""A newline, alone between characters that are not white space, of which the second is no slash.

The blocks of Unicode that hold white space are left out whole, so that no two engines can disagree about it. It begins
with the newline, for a single byte is searched for twenty times as fast as a choice of them.
"""


def cut(content: bytes, size: int) -> Iterator[bytes]:
    """`content` in parts of at least `size` bytes, cut where `divisible` tokenizers begin a new word."""
    start = 0
    while len(content) - start > size:
        place = _SAFE_CUT.search(content, start + size)
        if place is None:
            break
        yield content[start : place.end()]
        start = place.end()
    yield content[start:] if start else content


def divisible(definition: dict[str, Any]) -> bool:
    """Whether the ids of a document are those of its parts by `cut`, end to end.

    Told from how text is cut into words. In the patterns listed no match that holds the newline goes on after it
    (one lets newlines and slashes follow punctuation, hence no slash), the newline begins a match only of itself,
    and no match but that of white space looks ahead, so that words left and right of a cut are the same with the
    other side and without. Added tokens must neither hold nor swallow white space; special ones are not looked for.
    """
    if definition.get("normalizer") is not None:
        return False
    for token in added_tokens(definition, special=False):
        if token["lstrip"] or token["rstrip"] or token["single_word"] or re.search(r"\s", token["content"]):
            return False
    words = definition.get("pre_tokenizer") or {}
    steps = words.get("pretokenizers", []) if words.get("type") == "Sequence" else [words]
    if not steps or any(step.get("add_prefix_space") for step in steps):
        return False
    first, *others = steps
    if any(step.get("type") != "ByteLevel" or step.get("use_regex", True) for step in others):
        return False
    if first.get("type") == "ByteLevel":
        return bool(first.get("use_regex", True))
    if first.get("type") != "Split" or first.get("behavior") != "Isolated" or first.get("invert"):
        return False
    return first["pattern"] == {"String": "\n"} or first["pattern"].get("Regex") in WORD_PATTERNS


def added_tokens(definition: dict[str, Any], *, special: bool) -> list[dict[str, Any]]:
    """The added tokens of a `tokenizer.json`: the special ones, or those that are looked for in text."""
    return [token for token in definition.get("added_tokens") or [] if bool(token.get("special")) == special]
