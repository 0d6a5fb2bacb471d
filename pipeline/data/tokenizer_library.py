"""The `tokenizers` library, as training uses it, and how a `tokenizer.json` differs from that by default.

In: the content of a `tokenizer.json`. Out: the library's tokenizer, ids, the token that ends documents, and the parts
to replace in a file whose default encoding is to be that of training.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import orjson
from tokenizers import Encoding, Tokenizer

from pipeline.data.tokenizer_roles import Beside, candidates
from pipeline.errors import UserError, counted, nearest

Result = TypeVar("Result")

MOST_GROWTH = 2**20
"""Growth from which a normalizer is refused unseen: of any text a single letter could take a megabyte."""
GROWTH_REMEDY = "remove its `Replace` steps from tokenizer.json, or choose another --tokenizer"
_OTHERS = 12
"""Unicode's own forms make a character at most 11 times as long (NFKC of U+FDFA)."""


def serialized(definition: dict[str, Any], *, origin: str) -> bytes:
    """The bytes of a `tokenizer.json`. Raises `UserError` for text that is no UTF-8 and numbers that are too large."""
    try:
        return orjson.dumps(definition)
    except TypeError as error:
        raise UserError(f"{origin} is not a tokenizer.json: {error}") from None


def build(content: bytes, *, origin: str) -> Tokenizer:
    """The library's tokenizer of a `tokenizer.json`: special tokens in text are text, nothing is left to chance."""
    try:
        tokenizer = called(lambda: Tokenizer.from_buffer(content))
    except UserError as error:
        raise UserError(f"{origin} is not a tokenizer.json that `tokenizers` understands: {error}") from None
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a document is text, not an end
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer


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


def refuse_unbounded(normalizer: dict[str, Any] | None) -> None:
    """Raise `UserError` for a normalizer that can make a letter a megabyte, before any text is encoded."""
    if growth(normalizer) > MOST_GROWTH:
        raise UserError(f"the normalizer of this tokenizer may make text over a million times as long; {GROWTH_REMEDY}")


def called(call: Callable[[], Result]) -> Result:
    """What a call of the library gives; what it raises as `UserError`."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library raises nothing narrower, and its panics are no `Exception`
        raise UserError(str(error).strip() or repr(error)) from None


def encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """Ids of all texts end to end, (tokens,), and the tokens of each, (len(texts),). Nothing is added.

    Raises `UserError` that names the first text on which the library fails: for a word outside a WordLevel vocabulary,
    or for a regular expression that gives up.
    """

    def encode(these: Sequence[str]) -> list[Encoding]:
        return called(lambda: tokenizer.encode_batch_fast(list(these), add_special_tokens=False))

    try:
        encodings = encode(texts)
    except UserError as error:
        text = next(text for text in texts if text is texts[-1] or _fails(encode, text))
        raise UserError(
            f"`tokenizers` fails with this tokenizer ({error}) on a text of {counted(len(text), 'character')} that "
            f"begins with {text[:40]!r}; choose a --tokenizer that covers all text, mend the regular expressions in "
            "tokenizer.json, or leave this text out"
        ) from None
    lengths = np.array([len(encoding) for encoding in encodings], np.int64)
    flat = chain.from_iterable(encoding.ids for encoding in encodings)
    return np.fromiter(flat, np.uint32, count=int(lengths.sum())), lengths


def _fails(encode: Callable[[Sequence[str]], object], text: str) -> bool:
    try:
        encode([text])
    except UserError:
        return True
    return False


def id_finder(tokenizer: Tokenizer) -> Callable[[str | int], int | None]:
    """The id of a token, or of an id; None if there is none."""

    def id_of(token: str | int) -> int | None:
        if isinstance(token, int):
            return token if 0 <= token < 2**32 and tokenizer.id_to_token(token) is not None else None
        number = tokenizer.token_to_id(token)
        return None if number is None else int(number)

    return id_of


def find_eos(
    tokenizer: Tokenizer, eos: str | int | None, *, specials: Mapping[str, int], beside: Beside, origin: str
) -> tuple[int, str]:
    """The id of the token that ends documents, and in words which it is where there was a choice."""
    id_of = id_finder(tokenizer)
    listed = sorted(str(token.content) for token in tokenizer.get_added_tokens_decoder().values())
    names = f"its special tokens: {', '.join(listed[:20]) or 'none'}"
    if eos is not None:
        number = id_of(eos)
        if number is not None:
            return number, ""
        if isinstance(eos, int):
            raise UserError(f"{origin} has no token with the id {eos}, which was to end documents")
        raise UserError(f"{origin} has no token {eos!r} to end documents with{nearest(eos, listed)} ({names})")
    found = candidates("eos", beside, specials=specials, id_of=id_of)
    if not found:
        raise UserError(
            f"{origin} has no special token known to end documents; choose one with --eos TOKEN ({names}), or name it "
            "as eos_token in the tokenizer_config.json beside it"
        )
    (taken, reason), *others = found.items()
    if not others:
        return taken, ""
    named = ", ".join(f"{tokenizer.id_to_token(number)!r} ({number}, {why})" for number, why in others)
    chosen = f"documents end with {tokenizer.id_to_token(taken)!r} ({taken}, {reason})"
    return taken, f"{chosen}, not with {named}; --eos TOKEN chooses"


def changes_of(definition: dict[str, Any], tokenizer: Tokenizer, eos_id: int) -> tuple[dict[str, Any], list[str]]:
    """What of a definition must be other for its default encoding to be that of training, and notes on it."""
    changes: dict[str, Any] = {}
    notes = []
    for key, what in (("truncation", "cuts texts off"), ("padding", "fills texts up")):
        if definition.get(key) is not None:
            notes.append(f"the tokenizer {what} by default ({key}); here it does not")
    if dropout := definition["model"].get("dropout"):
        notes.append(f"the tokenizer leaves out merges at random (dropout {dropout:g}); here it does not")
    if tokenizer.num_special_tokens_to_add(False):
        changes["post_processor"] = None
        notes.append(
            f"the tokenizer puts {_put(tokenizer)} each text by default; documents are their text and "
            f"{tokenizer.id_to_token(eos_id)!r} alone, and a folder that pipeline.export writes encodes without, too"
        )
    entry = next((entry for entry in definition.get("added_tokens") or [] if entry["id"] == eos_id), None)
    if entry is not None and entry.get("special") and len(token := entry["content"]) > 1:
        vocabulary = definition["model"]["vocab"]
        pieces = isinstance(vocabulary, list) and any(piece == token for piece, _ in vocabulary)
        if pieces or (token in vocabulary and reaches(tokenizer, eos_id, [token])):
            # Special tokens are not looked for in text, but a model that has the token in its vocabulary (T5's) can
            # still come to it: so no word that the model sees holds it whole.
            pattern = {"Regex": f"{re.escape(token[0])}(?={re.escape(token[1:])})"}
            cut = {"type": "Split", "pattern": pattern, "behavior": "MergedWithPrevious", "invert": False}
            words = [words] if (words := definition.get("pre_tokenizer")) else []
            changes["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*words, cut]}
    return changes, notes


def reaches(tokenizer: Tokenizer, number: int, texts: Sequence[str]) -> bool:
    """Whether one of some texts, alone or among others, is encoded with an id. Passes over what cannot be encoded."""
    for text in texts:
        for trial in (text, f"a{text}", f"{text} {text}", f"a {text} b"):
            try:
                if number in encoded(tokenizer, [trial])[0]:
                    return True
            except UserError:
                continue
    return False


def _put(tokenizer: Tokenizer) -> str:
    """What a tokenizer adds to a text by default, in words."""
    try:
        encoding = called(lambda: tokenizer.encode("a"))
    except UserError:
        return "special tokens around"
    within = [place for place, added in enumerate(encoding.special_tokens_mask) if not added] or [0]
    before, after = encoding.tokens[: within[0]], encoding.tokens[within[-1] + 1 :]
    sides = [(before, "before"), (after, "after")]
    return " and ".join(f"{' '.join(tokens)} {where}" for tokens, where in sides if tokens)
