"""The ids that `tokenizers` gives, or one message: some tokenizers take a process down with them.

In: a tokenizer and texts. Out: ids; `UserError` for regular expressions that give up, and for normalizers that would
make a kilobyte more than the memory holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.tokenizer import TextTokenizer
from pipeline.errors import UserError, counted, sized

MOST_GROWTH = 2**20
"""Growth from which a tokenizer is refused unseen: of any text a single letter could take a megabyte."""
UNSEEN_BYTES = 2**28
"""What texts may come to at the worst without being looked at first."""
MOST_BYTES, MOST_FACTOR = 2**26, 32
"""What a normalizer may make of texts: this many bytes, or this many times as many, whatever is more."""
_REMEDY = "remove its `Replace` steps from tokenizer.json, or choose another --tokenizer"
_OTHERS = 12
"""Unicode's own forms make a character at most 11 times as long (NFKC of U+FDFA)."""


def reference(tokenizer: TextTokenizer, pieces: Sequence[bytes]) -> list[NDArray[np.uint32]]:
    """What `tokenizers` gives for each piece. Raises `UserError` for text that it cannot encode or makes too long."""
    refuse_growth(tokenizer, pieces)
    texts = [piece.decode() for piece in pieces]
    steps = json.dumps([tokenizer.outline.get("normalizer"), tokenizer.outline.get("pre_tokenizer")])
    try:
        with _quiet() if '"Regex"' in steps else nullcontext():
            ids, lengths = tokenizer.encode_batch(texts)
    except BaseException as error:
        if not _is_panic(error):
            raise
        with _quiet():
            text = _first_failing(tokenizer, texts)
        raise UserError(
            f"`tokenizers` fails with this tokenizer ({error}) on a text of {counted(len(text), 'character')} that "
            f"begins with {text[:40]!r}; mend the regular expressions in tokenizer.json, leave this text out, or "
            "choose another --tokenizer"
        ) from None
    return np.split(ids, np.cumsum(lengths)[:-1])


def _is_panic(error: BaseException) -> bool:
    """Whether code in Rust gave up: its error is no `Exception`, and has no module to import it from."""
    return type(error).__name__ == "PanicException"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what native code writes to stderr off the terminal: a page of backtrace that nobody can switch off."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _first_failing(tokenizer: TextTokenizer, texts: Sequence[str]) -> str:
    """The text that the library fails on."""
    for text in texts[:-1]:
        try:
            tokenizer.encode_batch([text])
        except BaseException as error:
            if not _is_panic(error):
                raise
            return text
    return texts[-1]


def growth(normalizer: dict[str, Any] | None) -> int:
    """How many times as long as any text of one byte or more its normalized form may be, at the worst."""
    if not normalizer:
        return 1
    kind = normalizer.get("type")
    if kind == "Sequence":
        product = 1
        for step in normalizer.get("normalizers") or ():
            product *= growth(step)
        return product
    if kind == "Prepend":
        return 1 + len(normalizer["prepend"].encode())
    if kind == "Replace":
        content = len(normalizer["content"].encode())
        # how long a match of an expression is cannot be told: it may be empty, and lie beside every letter
        literal = len(normalizer["pattern"].get("String", "").encode())
        return max(1, -(-content // literal)) if literal else 1 + content
    return 2 if kind in ("ByteLevel", "Lowercase") else _OTHERS


def refuse_growth(tokenizer: TextTokenizer, pieces: Sequence[bytes]) -> None:
    """Raise `UserError` for texts, encoded together, that the normalizer would make too long.

    What cannot become long is not looked at; the rest is normalized a little at a time. A normalizer that can make a
    letter a megabyte is refused unseen.
    """
    normalizer = tokenizer.outline.get("normalizer")
    factor, size = growth(normalizer), sum(map(len, pieces))
    if normalizer is None or size * factor <= UNSEEN_BYTES:
        return
    if factor > MOST_GROWTH:
        raise UserError(f"the normalizer of this tokenizer may make text over a million times as long; {_REMEDY}")
    normalize = tokenizer.tokenizer.normalizer.normalize_str
    limit, total = max(MOST_BYTES, MOST_FACTOR * size), 0
    step = max(UNSEEN_BYTES // factor // 4, 1)  # of characters
    for text in (piece.decode() for piece in pieces):
        for start in range(0, len(text), step):
            total += len(normalize(text[start : start + step]).encode())
            if total > limit:
                raise UserError(
                    f"the normalizer of this tokenizer makes {sized(size)} of text longer than {sized(limit)}, "
                    f"such as what begins with {text[:40]!r}; {_REMEDY}"
                )
