"""Text to token ids and back: loading, training, identity.

In: a name on the hub, a `tokenizer.json`, a tiktoken rank file, `train:N`, `chars` or `bytes`. Out: a
`TextTokenizer`. Whatever the origin, it is one `tokenizers.Tokenizer` that its `tokenizer.json` describes completely;
ids never depend on this file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from itertools import chain
from pathlib import Path
from secrets import token_hex
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import orjson
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.decoders import DecodeStream

from pipeline.data.manifest import canonical_json
from pipeline.data.tokenizer_files import RANK_SUFFIX, byte_symbols, hub_definition, read_definition
from pipeline.errors import UserError, nearest
from pipeline.files import write_durably

EOS = "<|endoftext|>"
TRAIN = "train:"
UNKNOWN_NAMED = 10  # characters named when a vocabulary lacks them
_UNREACHABLE = "\U0010ffff\ufdd0" * 8  # noncharacters: no text holds them in this way
COMMON_EOS = (EOS, "</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "<｜end▁of▁sentence｜>", "<EOS>", "[EOS]", "[SEP]")


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """An exact, frozen tokenizer: no truncation, no padding, special-token text in documents is plain text."""

    tokenizer: Tokenizer
    definition_json: bytes
    """Its `tokenizer.json`. Not kept parsed: the lists and strings of a large vocabulary take ten times the memory."""
    outline: dict[str, Any]
    """What it holds, but for the vocabulary and the merges of the model."""
    alphabet: frozenset[str] | None
    """All characters of a vocabulary of single characters; such a model drops others without a word."""
    vocab_size: int
    """Highest id + 1, added tokens included."""
    eos_id: int

    @classmethod
    def from_file(cls, path: str | Path, *, eos: str | int | None = None) -> Self:
        """Load a `tokenizer.json`, a folder that holds one, or a tiktoken rank file.

        `eos`: the token that ends documents, or its id; by default one of the common names.
        """
        file = Path(path).expanduser()
        return cls.from_definition(read_definition(file), origin=str(file), eos=eos)

    @classmethod
    def from_definition(cls, definition: dict[str, Any], *, origin: str, eos: str | int | None = None) -> Self:
        """Build from the content of a `tokenizer.json`; `origin` names it in errors."""
        if not isinstance(definition, dict) or "model" not in definition:
            raise UserError(f"{origin} is not a tokenizer.json: it has no 'model'")
        definition = {**definition, "truncation": None, "padding": None}
        try:
            content = orjson.dumps(definition)
            tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{origin} is not a tokenizer.json that `tokenizers` understands: {error}") from None
        tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a document is text, not an end
        model = {key: value for key, value in definition["model"].items() if key not in ("vocab", "merges")}
        return cls(
            tokenizer=tokenizer,
            definition_json=content,
            outline={**definition, "model": model},
            alphabet=_alphabet(definition),
            vocab_size=1 + max(_ids(definition, tokenizer), default=-1),
            eos_id=_find_eos(tokenizer, eos, origin=origin),
        )

    @property
    def definition(self) -> dict[str, Any]:
        """Content of its `tokenizer.json`, parsed anew: 0.03 s for 50,000 tokens."""
        definition: dict[str, Any] = orjson.loads(self.definition_json)
        return definition

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of the definition."""
        return hashlib.sha256(canonical_json(self.definition)).hexdigest()

    @property
    def eos_token(self) -> str:
        """The token that ends a document."""
        return str(self.tokenizer.id_to_token(self.eos_id))

    @cached_property
    def unknown_id(self) -> int | None:
        """Id of the token for unknown text, None if there is none."""
        model = self.outline["model"]
        if model.get("unk_id") is not None:  # Unigram
            return int(model["unk_id"])
        token = model.get("unk_token")
        number = None if token is None else self.tokenizer.token_to_id(token)
        return None if number is None else int(number)

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, nothing added."""
        ids, _ = self.encode_batch([text])
        return [int(i) for i in ids]

    def encode_batch(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Ids of all texts end to end, (tokens,), and the tokens of each, (len(texts),). Nothing is added.

        Raises `UserError` for a character that a `chars` vocabulary lacks.
        """
        if self.alphabet is not None:
            self._check_characters(texts)
        ids, lengths = _encoded(self.tokenizer, texts)
        if bool((ids == self.eos_id).any()) and self._without_end is not None:
            return self._spelled(texts, np.split(ids, np.cumsum(lengths)[:-1]), self._without_end)
        return ids, lengths

    def _spelled(
        self, texts: Sequence[str], encoded: list[npt.NDArray[np.uint32]], without_end: Tokenizer
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Ids and lengths once more, where the end of a document stood for its text: that is made of other tokens."""
        for number, text in enumerate(texts):
            if self.eos_id in encoded[number]:
                before, (encoded[number], _) = encoded[number], _encoded(without_end, [text])
                if self.unknown_id is None and self.decode(encoded[number]) != self.decode(before):
                    raise UserError(
                        f"the tokenizer has no way to write {self.eos_token!r}, with which documents end, in other "
                        "tokens; leave it out of the text, or choose another end with --eos"
                    )
        return np.concatenate(encoded), np.array([len(ids) for ids in encoded], np.int64)

    @cached_property
    def _without_end(self) -> Tokenizer | None:
        """The same tokenizer, but no text is encoded with the token that ends documents.

        Special tokens are not looked for in text, but a model that has the token in its vocabulary (T5's) can still
        come to it. None where that is as it was meant: it is no added token, or the one for unknown text.
        """
        added, token = self.outline.get("added_tokens") or [], self.eos_token
        if self.eos_id == self.unknown_id or all(entry["id"] != self.eos_id for entry in added):
            return None
        definition = self.definition
        model = definition["model"]
        if isinstance(model["vocab"], list):  # Unigram: token and score, in the order of ids
            vocabulary: Any = [[_UNREACHABLE if word == token else word, score] for word, score in model["vocab"]]
        else:
            vocabulary = {_UNREACHABLE if word == token else word: number for word, number in model["vocab"].items()}
        model = {**model, "vocab": vocabulary}
        if "merges" in model:
            prefix = model.get("continuing_subword_prefix") or ""
            pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
            model["merges"] = [
                [left, right] for left, right in pairs if token not in (left, right, left + right.removeprefix(prefix))
            ]
        definition["added_tokens"] = [  # each keeps its place, from which ids follow
            {**entry, "content": _UNREACHABLE, "special": True} if entry["id"] == self.eos_id else entry
            for entry in added
        ]
        twin = Tokenizer.from_str(json.dumps({**definition, "model": model, "post_processor": None}))
        twin.encode_special_tokens = True
        return twin

    def ending_documents(self, *, origin: str) -> TextTokenizer:
        """The tokenizer for documents that end with its EOS: this one, or the same with EOS marked as special.

        Text of a special token is encoded as text; an added token that is not special would end documents within.
        Raises `UserError` for an ordinary token, which stands for text.
        """
        entries = self.outline.get("added_tokens") or []
        added = {entry["id"]: entry for entry in entries}
        if self.eos_id not in added:
            text = self.decode([self.eos_id])
            trials = [self.eos_token, text, f"a{text}", f"{text} {text}"]
            if "\ufffd" in text or any(self.eos_id in self.encode(trial) for trial in self._writable(trials)):
                specials = ", ".join(sorted(entry["content"] for entry in added.values())[:20]) or "none"
                raise UserError(
                    f"the token {self.eos_token!r} of {origin} cannot end documents, for it stands for text in them; "
                    f"choose a special one with --eos TOKEN (its special tokens: {specials}), or list it in the "
                    "added_tokens of the tokenizer.json as special"
                )
        elif not added[self.eos_id].get("special"):
            entries = [{**entry, "special": True} if entry["id"] == self.eos_id else entry for entry in entries]
            definition = {**self.definition, "added_tokens": entries}
            return TextTokenizer.from_definition(definition, origin=origin, eos=self.eos_id)
        return self

    def _writable(self, texts: Iterable[str]) -> Iterator[str]:
        """Those of which the tokenizer knows all characters and words."""
        for text in texts:
            try:
                self.encode(text)
            except UserError:
                continue
            yield text

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens included."""
        return str(self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))

    def stream(self) -> TextStream:
        """An incremental decoder for ids that arrive one by one."""
        return TextStream(self.tokenizer)

    def save(self, path: Path) -> None:
        """Write the `tokenizer.json`; loading it again gives the same fingerprint."""
        # shares of one preparation save the same tokenizer at the same time
        write_durably(path, self.definition_json, writer=f".{token_hex(4)}")

    def _check_characters(self, texts: Sequence[str]) -> None:
        assert self.alphabet is not None, "only vocabularies of characters have an alphabet"
        unknown = sorted(set().union(*texts) - self.alphabet)
        if unknown:
            names = ", ".join(f"{character!r} (U+{ord(character):04X})" for character in unknown[:UNKNOWN_NAMED])
            more = f" and {len(unknown) - UNKNOWN_NAMED} more" if len(unknown) > UNKNOWN_NAMED else ""
            verb = "character {} is" if len(unknown) == 1 else "characters {} are"
            raise UserError(
                f"{verb.format(names + more)} not among the {len(self.alphabet)} characters of this vocabulary; "
                "leave them out, or prepare the data with text that holds them or with --tokenizer bytes"
            )


class TextStream:
    """Decodes ids one by one; a character that spans several tokens comes out with its last."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream([], skip_special_tokens=False)

    def push(self, token_id: int) -> str:
        """Text that `token_id` completes, possibly none yet."""
        return self._stream.step(self._tokenizer, int(token_id)) or ""


def load_tokenizer(name: str, *, texts: Iterable[str] = (), eos: str | None = None) -> TextTokenizer:
    """Make the tokenizer that `--tokenizer NAME` asks for.

    `texts` is read only by `chars` (all of it) and `train:N` (give it a bounded sample in a fixed order).
    Raises `UserError` for a name that is neither known, nor a file, nor reachable.
    """
    if name == "bytes":
        return TextTokenizer.from_definition(_byte_definition(), origin=name, eos=eos)
    if name == "chars":
        return TextTokenizer.from_definition(_character_definition(texts), origin=name, eos=eos)
    if name.startswith(TRAIN):
        return TextTokenizer.from_definition(_trained_definition(_trained_size(name), texts), origin=name, eos=eos)
    if _is_file(name):
        return TextTokenizer.from_file(name, eos=eos)
    _check_hub_name(name)
    return TextTokenizer.from_definition(hub_definition(name), origin=name, eos=eos)


def check_tokenizer_name(name: str) -> None:
    """Raise `UserError` for what is wrong with `--tokenizer NAME` in itself; neither corpus nor network are read."""
    if name.startswith(TRAIN):
        _trained_size(name)
    elif name not in ("bytes", "chars"):
        if _is_file(name):
            read_definition(Path(name).expanduser())
        else:
            _check_hub_name(name)


def needs_corpus(name: str) -> bool:
    """Whether `load_tokenizer(name)` reads texts."""
    return name == "chars" or name.startswith(TRAIN)


def _is_file(name: str) -> bool:
    """Whether a name means a file, there or not: no name on the hub looks like these."""
    path = Path(name).expanduser()
    return path.exists() or path.suffix in (".json", ".model", RANK_SUFFIX) or name.startswith((".", "/", "~"))


def _check_hub_name(name: str) -> None:
    """What is no name of the hub (a name, or OWNER/NAME) or nearly a name of ours costs no request."""
    known = ("bytes", "chars", "train")
    word = re.split(r"[^a-z]", name.lower())[0]
    alike = re.fullmatch(r"[A-Za-z]+\W*\d*", name)  # char, trian:500, train32000
    ours = get_close_matches(word, known, n=1, cutoff=0.75) if alike else []
    legal = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
    if legal and not ours:
        return
    spelling = {"train": f"{TRAIN}N with a number of tokens, such as {TRAIN}32000"}
    hint = f"did you mean {spelling.get(ours[0], ours[0])}? " if ours else ""
    raise UserError(
        f"unknown tokenizer {name!r}; {hint}wanted: chars, bytes, {TRAIN}N, the path of a tokenizer.json or of a rank "
        f"file ENCODING{RANK_SUFFIX}, or a name on the Hugging Face hub such as gpt2"
    )


def _encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    try:
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    except Exception as error:  # the library raises nothing narrower, e.g. for a word outside a WordLevel vocabulary
        raise UserError(f"the tokenizer cannot encode this text: {error}; use one that covers all text") from None
    lengths = np.array([len(encoding) for encoding in encodings], np.int64)
    flat = chain.from_iterable(encoding.ids for encoding in encodings)
    return np.fromiter(flat, np.uint32, count=int(lengths.sum())), lengths


def _ids(definition: dict[str, Any], tokenizer: Tokenizer) -> Iterator[int]:
    vocabulary = definition["model"]["vocab"]
    yield from range(len(vocabulary)) if isinstance(vocabulary, list) else vocabulary.values()  # a list: Unigram
    yield from tokenizer.get_added_tokens_decoder()


def _alphabet(definition: dict[str, Any]) -> frozenset[str] | None:
    model = definition["model"]
    silent = model.get("type") == "BPE" and not model.get("merges") and not model.get("byte_fallback")
    if not silent or model.get("unk_token") is not None or "ByteLevel" in json.dumps(definition.get("pre_tokenizer")):
        return None
    return frozenset(token for token in model["vocab"] if len(token) == 1)


def _find_eos(tokenizer: Tokenizer, eos: str | int | None, *, origin: str) -> int:
    if isinstance(eos, int):
        if not 0 <= eos < 2**32 or tokenizer.id_to_token(eos) is None:
            raise UserError(f"{origin} has no token with the id {eos}, which was to end documents")
        return eos
    for wanted in COMMON_EOS if eos is None else (eos,):
        number = tokenizer.token_to_id(wanted)
        if number is not None:
            return int(number)
    specials = sorted(str(token.content) for token in tokenizer.get_added_tokens_decoder().values())
    candidates = f"its special tokens: {', '.join(specials[:20]) or 'none'}"
    if eos is not None:
        raise UserError(f"{origin} has no token {eos!r} to end documents with{nearest(eos, specials)} ({candidates})")
    raise UserError(f"{origin} has no token known to end documents; choose one with --eos TOKEN ({candidates})")


def _with_eos(tokenizer: Tokenizer) -> dict[str, Any]:
    tokenizer.add_special_tokens([EOS])
    definition: dict[str, Any] = json.loads(tokenizer.to_str())
    return definition


def _lines() -> Any:
    """Cut before and after each newline: words stay short, so that no book becomes one word of a million symbols."""
    return pre_tokenizers.Split("\n", behavior="isolated")


def _byte_definition() -> dict[str, Any]:
    """Id = byte value, EOS = 256. A BPE without merges over the printable stand-ins of GPT-2 for bytes."""
    vocabulary = {symbol: value for value, symbol in enumerate(byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, EOS: 256}, merges=[]))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([_lines(), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return _with_eos(tokenizer)


def _character_definition(texts: Iterable[str]) -> dict[str, Any]:
    """One id per character of the corpus in order of code points, EOS last. A BPE without merges."""
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    vocabulary = {character: number for number, character in enumerate(sorted(characters))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, EOS: len(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = _lines()
    tokenizer.decoder = decoders.Fuse()
    return _with_eos(tokenizer)


def _trained_size(name: str) -> int:
    size, smallest = name.removeprefix(TRAIN), 256 + 1
    if not (size.isascii() and size.isdecimal() and len(size) < 10) or int(size) < smallest:
        raise UserError(f"--tokenizer train:N wants a number of tokens of at least {smallest}, got {name!r}")
    return int(size)


def _trained_definition(size: int, texts: Iterable[str]) -> dict[str, Any]:
    """Byte-level BPE with GPT-2's word pattern: every byte is in its alphabet, so no text is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    definition: dict[str, Any] = json.loads(tokenizer.to_str())
    return definition
