"""Text to token ids and back: what training does with text, and what a file or a folder says of its tokens.

In: a name on the hub, a `tokenizer.json`, a tiktoken rank file, `train:N`, `chars` or `bytes`. Out: a
`TextTokenizer`. Whatever the origin, it is one `tokenizers.Tokenizer` that a `tokenizer.json` describes completely.
A document is the ids of its text and the one that ends it: nothing is put before a text, nothing is cut off or filled
up, nothing is random, and the text of a special token is text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property, partial
from pathlib import Path
from secrets import token_hex
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import orjson
from tokenizers import Tokenizer

from pipeline.data.manifest import TOKENIZER_NAME, canonical_json
from pipeline.data.tokenizer_files import RANK_SUFFIX, hub_tokenizer, placed, read_definition
from pipeline.data.tokenizer_library import (
    build,
    called,
    changes_of,
    encoded,
    find_eos,
    id_finder,
    reaches,
    refuse_unbounded,
    serialized,
)
from pipeline.data.tokenizer_roles import Beside, Role, candidates, read_beside
from pipeline.data.tokenizer_schema import check_definition
from pipeline.data.tokenizer_stream import TextStream
from pipeline.data.tokenizer_training import EOS as EOS
from pipeline.data.tokenizer_training import Report, byte_definition, character_definition, trained_definition
from pipeline.errors import UserError
from pipeline.files import expanded, write_durably
from pipeline.untrusted import Object, parse_json

TRAIN = "train:"
UNKNOWN_NAMED = 10  # characters named when a vocabulary lacks them


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """An exact, frozen tokenizer, the roles of its tokens, and what its folder says of them."""

    tokenizer: Tokenizer
    """Encodes as training does."""
    definition_json: bytes
    """Its `tokenizer.json`. Not kept parsed: the lists and strings of a large vocabulary take ten times the memory."""
    outline: dict[str, Any]
    """What it holds, but for the vocabulary and the merges of the model."""
    changes: Mapping[str, Any]
    """Parts of the `tokenizer.json` to replace in a file whose default encoding is to be that of training."""
    alphabet: frozenset[str] | None
    """All characters of a vocabulary of single characters; such a model drops others without a word."""
    vocab_size: int
    """Highest id + 1, added tokens included."""
    eos_id: int
    """The token that ends documents."""
    others: Mapping[Role, int]
    """Ids of the tokens with other roles: "bos", "pad" and "mask", as far as there are any."""
    beside: Beside | None
    """What the folder of the file says, None for the tokenizer of a dataset or checkpoint."""
    choice: str
    """Which token was taken to end documents, where others could have been; else ""."""
    notes: tuple[str, ...]
    """What the file does by default and training does not."""

    @classmethod
    def from_file(cls, path: str | Path, *, eos: str | int | None = None) -> Self:
        """Load a `tokenizer.json`, a folder that holds one, or a tiktoken rank file.

        `eos`: the token that ends documents, or its id; by default what the folder says, else a common name.
        """
        file = expanded(path)
        return cls.from_definition(read_definition(file), origin=str(file), eos=eos, beside=_beside(file))

    @classmethod
    def from_content(cls, content: bytes, *, origin: object, eos: str | int) -> Self:
        """Build from the bytes of the `tokenizer.json` of a dataset or checkpoint; `origin` names it in errors."""
        return cls.from_definition(parse_json(Object, content, origin=origin), origin=str(origin), eos=eos)

    @classmethod
    def from_definition(
        cls, definition: dict[str, Any], *, origin: str, eos: str | int | None = None, beside: Beside | None = None
    ) -> Self:
        """Build from the content of a `tokenizer.json`; `origin` names it in errors, `beside` is what its folder says.

        Raises `UserError` for a definition that the library does not understand, and where no token ends documents.
        """
        check_definition(definition, origin=origin)
        original, definition = definition, {**definition, "truncation": None, "padding": None}
        content = serialized(definition, origin=origin)
        tokenizer = build(content, origin=origin)
        refuse_unbounded(definition.get("normalizer"))
        added = tokenizer.get_added_tokens_decoder().items()
        specials = {str(token.content): int(number) for number, token in added if token.special}
        eos_id, choice = find_eos(tokenizer, eos, specials=specials, beside=beside or Beside(), origin=origin)
        changes, notes = changes_of(original, tokenizer, eos_id)
        if "pre_tokenizer" in changes:
            tokenizer = build(serialized({**definition, **changes}, origin=origin), origin=origin)
        others: tuple[Role, ...] = ("bos", "pad", "mask")
        found = {
            role: candidates(role, beside or Beside(), specials=specials, id_of=id_finder(tokenizer)) for role in others
        }
        model = {key: value for key, value in definition["model"].items() if key not in ("vocab", "merges")}
        return cls(
            tokenizer=tokenizer,
            definition_json=content,
            outline={**definition, "model": model},
            changes=changes,
            alphabet=_alphabet(definition),
            vocab_size=1 + max(_ids(definition, tokenizer), default=-1),
            eos_id=eos_id,
            others={role: next(iter(ids)) for role, ids in found.items() if ids},
            beside=beside,
            choice=choice,
            notes=tuple(notes),
        )

    @property
    def definition(self) -> dict[str, Any]:
        """Content of its `tokenizer.json`, parsed anew: 0.03 s for 50,000 tokens."""
        definition: dict[str, Any] = orjson.loads(self.definition_json)
        return definition

    @property
    def as_trained(self) -> dict[str, Any]:
        """Content of a `tokenizer.json` whose encoding is that of training also where special tokens are added."""
        definition = {**self.definition, **self.changes}
        if definition["model"].get("dropout"):
            definition["model"]["dropout"] = None
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

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end a generated text: what the folder says, or the one that ends documents."""
        said = self.beside.end_ids if self.beside is not None else frozenset()
        return said or frozenset({self.eos_id})

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added."""
        ids, _ = self.encode_batch([text])
        return [int(i) for i in ids]

    def encode_batch(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Ids of all texts end to end, (tokens,), and the tokens of each, (len(texts),). Nothing is added.

        Raises `UserError` for a character that a `chars` vocabulary lacks.
        """
        if self.alphabet is not None:
            self._check_characters(texts)
        return encoded(self.tokenizer, texts)

    def prompt(self, text: str) -> list[int]:
        """Ids of a text to be continued, as it was encoded in training; those of a folder, as that does by default.

        By default a folder may put a token before each text, and take the text of a special token for the token. What
        it puts after a text is left out, for that would end it. An empty text is the token that begins texts.
        """
        if self.beside is None:
            return self.encode(text) or [self.eos_id]
        if self.alphabet is not None:
            specials = [] if self.beside.splits_specials else self.outline.get("added_tokens") or []
            self._check_characters([_without(text, [entry["content"] for entry in specials])])
        try:
            encoding = called(lambda: self._default.encode(text))
        except UserError as error:
            raise UserError(f"the tokenizer cannot encode this prompt: {error}; mend its {TOKENIZER_NAME}") from None
        within = [place for place, added in enumerate(encoding.special_tokens_mask) if not added]
        if within:
            return [int(number) for number in encoding.ids[: within[-1] + 1]]
        put = [number for number in encoding.ids if number != self.eos_id]
        return [self.others.get("bos", put[0] if put else self.eos_id)]

    @cached_property
    def _default(self) -> Tokenizer:
        """Encodes as the folder does by default."""
        assert self.beside is not None, "a tokenizer without a folder has no other default"
        tokenizer = build(self.definition_json, origin=TOKENIZER_NAME)
        tokenizer.encode_special_tokens = self.beside.splits_specials
        return tokenizer

    def ending_documents(self, *, origin: str) -> TextTokenizer:
        """The tokenizer for documents that end with its EOS: this one, or the same with EOS marked as special.

        Text of a special token is encoded as text; an added token that is not special would end documents within.
        Raises `UserError` for a token that stands for text.
        """
        entries = self.outline.get("added_tokens") or []
        added = {entry["id"]: entry for entry in entries}
        if self.eos_id in added and not added[self.eos_id].get("special"):
            entries = [{**entry, "special": True} if entry["id"] == self.eos_id else entry for entry in entries]
            definition = {**self.definition, "added_tokens": entries}
            marked = TextTokenizer.from_definition(definition, origin=origin, eos=self.eos_id, beside=self.beside)
            notes = tuple(dict.fromkeys(self.notes + marked.notes))
            return replace(marked, choice=self.choice, notes=notes).ending_documents(origin=origin)
        text = self.decode([self.eos_id])
        spelled = "\ufffd" in text and self.eos_id not in added  # bytes within characters
        if spelled or (self.eos_id != self.unknown_id and reaches(self.tokenizer, self.eos_id, [self.eos_token, text])):
            specials = ", ".join(sorted(entry["content"] for entry in added.values())[:20]) or "none"
            raise UserError(
                f"the token {self.eos_token!r} of {origin} cannot end documents, for it stands for text in them; "
                f"choose a special one with --eos TOKEN (its special tokens: {specials}), or list it in the "
                "added_tokens of the tokenizer.json as special"
            )
        return self

    def exported(self, *, context_length: int) -> dict[str, bytes]:
        """Files of a Hugging Face folder, by name, with which `AutoTokenizer` encodes by default as training does.

        `context_length`: tokens that the model of the folder takes.
        """
        names = {role: str(self.tokenizer.id_to_token(number)) for role, number in self.others.items()}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.eos_token,  # a document of the training data begins after an EOS
            "eos_token": self.eos_token,
            **{f"{role}_token": names[role] for role in ("pad", "mask") if role in names},
            "add_bos_token": False,
            "add_eos_token": False,
            "split_special_tokens": True,
            "model_max_length": context_length,
            "clean_up_tokenization_spaces": False,
        }
        return {
            TOKENIZER_NAME: orjson.dumps(self.as_trained),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n",
        }

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens included; bytes that fit nothing are U+FFFD."""
        numbers = [int(number) for number in ids]
        try:
            return str(called(lambda: self.tokenizer.decode(numbers, skip_special_tokens=False))) if numbers else ""
        except UserError as error:
            raise UserError(f"the tokenizer's decoder fails: {error}; mend it in the tokenizer.json") from None

    def stream(self, *, context: Sequence[int] = ()) -> TextStream:
        """An incremental decoder for ids that arrive one by one, after the ids `context` of a whole text."""
        return TextStream(self.decode, self.tokenizer.id_to_token, decoder=self.outline.get("decoder"), context=context)

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


def load_tokenizer(
    name: str, *, texts: Iterable[str] = (), eos: str | None = None, report: Report | None = None
) -> TextTokenizer:
    """Make the tokenizer that `--tokenizer NAME` asks for.

    `texts` is read only by `chars` (all of it) and `train:N` (give it a bounded sample in a fixed order); that takes
    time, of which `report` is called with a line every 30 s. Raises `UserError` for a name that is neither known, nor
    a file, nor reachable, and for a file that contradicts itself.
    """
    if name == "bytes":
        return TextTokenizer.from_definition(byte_definition(), origin=name, eos=eos)
    if name == "chars":
        return TextTokenizer.from_definition(character_definition(texts, report=report), origin=name, eos=eos)
    if name.startswith(TRAIN):
        trained = trained_definition(_trained_size(name), texts, report=report)
        return TextTokenizer.from_definition(trained, origin=name, eos=eos)
    if _is_file(name):
        file = expanded(name)
        definition, beside = read_definition(file), _beside(file)
    else:
        _check_hub_name(name)
        definition, beside = hub_tokenizer(name)
    plain = partial(serialized, definition, origin=name)
    definition = placed(definition, lambda: id_finder(build(plain(), origin=name)), origin=name)
    return TextTokenizer.from_definition(definition, origin=name, eos=eos, beside=beside)


def check_tokenizer_name(name: str) -> None:
    """Raise `UserError` for what is wrong with `--tokenizer NAME` in itself; neither corpus nor network are read."""
    if name.startswith(TRAIN):
        _trained_size(name)
    elif name not in ("bytes", "chars"):
        if _is_file(name):
            read_definition(expanded(name))
        else:
            _check_hub_name(name)


def needs_corpus(name: str) -> bool:
    """Whether `load_tokenizer(name)` reads texts."""
    return name == "chars" or name.startswith(TRAIN)


def _is_file(name: str) -> bool:
    """Whether a name means a file, there or not: no name on the hub looks like these."""
    path = expanded(name)
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


def _beside(file: Path) -> Beside:
    """What the folder of a `tokenizer.json` says; other files are alone."""
    folder = file if file.is_dir() else file.parent
    return read_beside(folder) if file.is_dir() or file.name == TOKENIZER_NAME else Beside()


def _without(text: str, parts: Iterable[str]) -> str:
    for part in parts:
        text = text.replace(part, "")
    return text


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


def _trained_size(name: str) -> int:
    size, smallest = name.removeprefix(TRAIN), 256 + 1
    if not (size.isascii() and size.isdecimal() and len(size) < 10) or int(size) < smallest:
        raise UserError(f"--tokenizer train:N wants a number of tokens of at least {smallest}, got {name!r}")
    return int(size)
