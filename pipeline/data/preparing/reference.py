"""The ids that `tokenizers` gives, or one message: some tokenizers take a process down with them.

In: a tokenizer and texts. Out: ids; `UserError` for regular expressions that give up, and for normalizers that would
make a kilobyte more than the memory holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
from numpy.typing import NDArray

from pipeline.data.tokenizer import TextTokenizer
from pipeline.data.tokenizer_library import GROWTH_REMEDY, growth
from pipeline.errors import UserError, sized

UNSEEN_BYTES = 2**28
"""What texts may come to at the worst without being looked at first."""
MOST_BYTES, MOST_FACTOR = 2**26, 32
"""What a normalizer may make of texts: this many bytes, or this many times as many, whatever is more."""


def reference(tokenizer: TextTokenizer, pieces: Sequence[bytes]) -> list[NDArray[np.uint32]]:
    """What `tokenizers` gives for each piece. Raises `UserError` for text that it cannot encode or makes too long."""
    refuse_growth(tokenizer, pieces)
    texts = [piece.decode() for piece in pieces]
    steps = json.dumps([tokenizer.outline.get("normalizer"), tokenizer.outline.get("pre_tokenizer")])
    with _quiet() if '"Regex"' in steps else nullcontext():
        ids, lengths = tokenizer.encode_batch(texts)
    return np.split(ids, np.cumsum(lengths)[:-1])


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


def refuse_growth(tokenizer: TextTokenizer, pieces: Sequence[bytes]) -> None:
    """Raise `UserError` for texts, encoded together, that the normalizer would make too long.

    What cannot become long is not looked at; the rest is normalized a little at a time. That is little: a normalizer
    that can make a letter a megabyte was refused when the tokenizer was loaded.
    """
    normalizer = tokenizer.outline.get("normalizer")
    factor, size = growth(normalizer), sum(map(len, pieces))
    if normalizer is None or size * factor <= UNSEEN_BYTES:
        return
    normalize = tokenizer.tokenizer.normalizer.normalize_str
    limit, total = max(MOST_BYTES, MOST_FACTOR * size), 0
    step = max(UNSEEN_BYTES // factor // 4, 1)  # of characters
    for text in (piece.decode() for piece in pieces):
        for start in range(0, len(text), step):
            total += len(normalize(text[start : start + step]).encode())
            if total > limit:
                raise UserError(
                    f"the normalizer of this tokenizer makes {sized(size)} of text longer than {sized(limit)}, "
                    f"such as what begins with {text[:40]!r}; {GROWTH_REMEDY}"
                )
