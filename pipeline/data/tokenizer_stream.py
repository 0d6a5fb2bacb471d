"""Ids that arrive one by one, as text that is never taken back.

In: the decoder of a `tokenizer.json`, ids. Out: text, each part as soon as no later id can change it. A text decoded so
far need not begin the text of more ids: bytes that are one character alone become U+FFFD when a wrong one follows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile(r"<0x[+0-9A-Fa-f][0-9A-Fa-f]>")  # what the decoder ByteFallback takes for a byte
_WINDOW = 24
"""Ids that decide how the next one is spelled; older ones are dropped when there are twice as many."""
_EDGE = 8
"""Characters at the beginning of a text that depend on its being the beginning."""
_LOCAL = ("ByteLevel", "Metaspace", "WordPiece", "BPEDecoder", "Strip", "Fuse")
"""Decoders that only add to a text when ids are added, but for what `unsettled_characters` says."""


class TextStream:
    """Decodes ids as they come.

    What `push` and `finish` return, joined, is the text of all ids decoded at once, without that of `context`: ids of
    a whole text before them, which may decide how the first one is spelled.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        token_of: Callable[[int], str | None],
        *,
        decoder: dict[str, Any] | None,
        context: Sequence[int] = (),
    ) -> None:
        self._decode, self._token_of = decode, token_of
        self._unsettled = unsettled_characters(decoder)
        kinds = [step.get("type") for step in _steps(decoder)]
        self._falls_back, self._last_is_open = "ByteFallback" in kinds, "BPEDecoder" in kinds
        self._ids = [int(number) for number in context]
        while self._ids and self._continues(self._token_of(self._ids[-1])):
            self._ids.pop()  # a whole text: bytes that follow are no part of its characters
        self._run = 0  # bytes at the end, of which the next id decides
        self._last = ""  # the last token
        self._given = len(self._decode(self._ids))  # characters of the text of `_ids` that are out

    def push(self, token_id: int) -> str:
        """Text that `token_id` makes certain, possibly none."""
        self._ids.append(int(token_id))
        token = self._token_of(self._ids[-1])
        self._last = self._last if token is None else token
        self._run = self._run + 1 if self._continues(token) else 0
        if self._unsettled is None or self._run:
            return ""
        text = self._decode(self._ids)
        stop = len(text) - self._unsettled - text.endswith(_REPLACEMENT)
        if self._last_is_open:  # ends of words are spaces in all tokens but the last
            stop -= len(self._last)
        new = text[self._given : max(stop, 0)]
        self._given = max(self._given, stop)
        if len(self._ids) >= 2 * _WINDOW:
            self._forget(text)
        return new

    def finish(self) -> str:
        """The rest; bytes that fit nothing are U+FFFD."""
        text = self._decode(self._ids)
        new = text[self._given :]
        self._given = len(text)
        return new

    def _continues(self, token: str | None) -> bool:
        """Whether a token leaves bytes before it open: a byte, or none, which is passed over."""
        return self._falls_back and (token is None or _BYTE.fullmatch(token) is not None)

    def _forget(self, text: str) -> None:
        """Drop all but the last ids, if these alone give the end of `text`."""
        ids = self._ids[-_WINDOW:]
        after = self._decode(ids)
        given = len(after) - (len(text) - self._given)
        if given >= _EDGE and text.endswith(after[_EDGE:]):
            self._ids, self._given = ids, given


def unsettled_characters(decoder: dict[str, Any] | None) -> int | None:
    """How many characters at the end of a text more ids can change; None: any number.

    Not counted are a last U+FFFD, bytes of ByteFallback, and the last token where there is a BPEDecoder. Without a
    decoder, tokens are joined by spaces.
    """
    fused, replaced = False, 0
    for step in _steps(decoder):
        kind = step.get("type")
        if kind == "Replace":
            if not fused:
                continue  # within one token
            pattern = step["pattern"].get("String")
            if pattern is None or replaced:  # a regular expression may look at anything
                return None
            replaced = len(pattern)  # one less, and a last U+FFFD
        elif kind == "ByteFallback" or kind in _LOCAL:
            if fused and kind not in ("Strip", "Fuse"):
                return None
            fused = fused or kind in ("Fuse", "ByteLevel")
        else:
            return None
    return replaced


def _steps(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The decoders that run one after the other."""
    if decoder is None:
        return
    if decoder.get("type") == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    else:
        yield decoder
