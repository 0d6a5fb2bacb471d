"""Text from tokens: characters come out whole, stop strings do not come out at all.

In: a model, its tokenizer and prompts as text. Out: `Piece` events, whose texts of one row joined are its whole text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.data.tokenizer import TextTokenizer
from pipeline.errors import UserError
from pipeline.generate.decode import Finish, Options, Token, generate
from pipeline.model.transformer import Decoder


@dataclass(frozen=True)
class Piece:
    """One event of row (prompt, sample): text that is now certain (may be ""), its token, and how the row ended."""

    prompt: int
    sample: int
    text: str
    token: int | None
    finish: Finish | None


@dataclass(frozen=True)
class Sample:
    """A finished row: its text, every token generated for it (those of a stop string too), and how it ended."""

    prompt: int
    sample: int
    text: str
    tokens: tuple[int, ...]
    finish: Finish


class RowText:
    """The growing text of one row. `context`: ids before it, which may decide how its first token is spelled."""

    def __init__(self, tokenizer: TextTokenizer, *, context: Sequence[int], stops: Sequence[str]) -> None:
        self.stopped = False
        self._stream = tokenizer.stream(context=context)
        self._stops = tuple(stops)
        self._held = ""  # decoded, but it may become a stop string

    def push(self, token: int) -> str:
        """Text that `token` makes certain; what may still grow into a character or a stop string is held back."""
        return self._release(self._stream.push(token))

    def flush(self) -> str:
        """The rest at the end of the row; bytes that fit nothing become U+FFFD."""
        text = self._release(self._stream.finish()) + self._held
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        # The stop string that is complete first ends the text, however its characters were cut into tokens.
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def write(
    model: Decoder,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    *,
    options: Options,
    eos_ids: Collection[int] = (),
    stops: Sequence[str] = (),
) -> Iterator[Piece]:
    """Continue texts, yielding pieces as they come, one per token; see `generate`.

    Prompts are encoded as `TextTokenizer.prompt` says; an empty one starts from the token that begins texts. A row ends
    with "stop" when one of `stops` appears in its text, which is cut before it. Raises `UserError` for a character the
    tokenizer lacks.
    """
    if not all(stops):
        raise UserError("an empty stop string would stop before the first token: leave it out")
    starts = [tokenizer.prompt(prompt) for prompt in prompts]
    texts: dict[tuple[int, int], RowText] = {}
    fresh: dict[tuple[int, int], str] = {}

    def until(prompt: int, sample: int, token: int) -> bool:
        key = prompt, sample
        if key not in texts:
            texts[key] = RowText(tokenizer, context=starts[prompt], stops=stops)
        fresh[key] = texts[key].push(token)
        return texts[key].stopped

    def piece(event: Token) -> Piece:
        key = event.prompt, event.sample
        text, finish = fresh.pop(key, ""), event.finish
        if finish is not None and key in texts:
            row = texts.pop(key)
            text += row.flush()
            finish = "stop" if row.stopped else finish
        return Piece(*key, text=text, token=event.id, finish=finish)

    return map(piece, generate(model, starts, options=options, eos_ids=eos_ids, until=until))


def finished(pieces: Iterable[Piece]) -> Iterator[Sample]:
    """Whole samples, each as soon as it and all before it are done, in the order of prompts and their samples."""
    running: dict[tuple[int, int], list[Piece]] = {}
    done: dict[tuple[int, int], Sample] = {}
    for piece in pieces:
        key = piece.prompt, piece.sample
        running.setdefault(key, []).append(piece)
        if piece.finish is None:
            continue
        parts = running.pop(key)
        tokens = tuple(part.token for part in parts if part.token is not None)
        done[key] = Sample(*key, text="".join(part.text for part in parts), tokens=tokens, finish=piece.finish)
        while done and (first := min(done)) < min(running, default=(first[0] + 1, 0)):
            yield done.pop(first)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins, short of all of it."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
