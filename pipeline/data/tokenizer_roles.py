"""Which token begins a text, ends it, pads it and masks it: by the files beside a `tokenizer.json`, or by its own.

In: a folder, the special tokens of a `tokenizer.json`. Out: what the folder says, as `Beside`, and the candidates for a
role, each with the reason for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, StrictBool, StrictInt, StrictStr

from pipeline.errors import UserError
from pipeline.untrusted import DamagedFileError, read_json

Content = TypeVar("Content", bound=BaseModel)
Role = Literal["bos", "eos", "pad", "mask"]
ROLES: tuple[Role, ...] = ("bos", "eos", "pad", "mask")
BESIDE_NAMES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
"""Files beside a `tokenizer.json` that say what its tokens are for, the most trusted first."""

SPELLINGS: Mapping[Role, tuple[str, ...]] = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "[BOS]", "<BOS>"),
    "eos": (
        "<|endoftext|>",
        "</s>",
        "<eos>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<｜end▁of▁sentence｜>",
        "<EOS>",
        "[EOS]",
        "[SEP]",
    ),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<｜▁pad▁｜>", "<PAD>"),
    "mask": ("<mask>", "[MASK]", "<|mask|>", "<MASK>"),
}
"""How published tokenizers spell the token of a role. Asked only where no file names it, and of special tokens only."""


def _content(token: Any) -> Any:
    """The text of a token, which may be written as an object with its flags."""
    return token.get("content") if isinstance(token, dict) else token


def _each(ids: Any) -> Any:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


_Token = Annotated[StrictStr | None, BeforeValidator(_content)]
_Ids = Annotated[list[StrictInt], BeforeValidator(_each)]


class _Tokens(BaseModel):
    """What `special_tokens_map.json` holds."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    bos_token: _Token = None
    eos_token: _Token = None
    pad_token: _Token = None
    mask_token: _Token = None


class _TokenizerConfig(_Tokens):
    """What `tokenizer_config.json` holds beyond that.

    Its `add_bos_token` and `add_eos_token` are not read: beside a `tokenizer.json`, transformers ignores them.
    """

    split_special_tokens: StrictBool | None = None


class _ModelConfig(BaseModel):
    """What `generation_config.json` and `config.json` hold about tokens."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    bos_token_id: _Ids = []
    eos_token_id: _Ids = []
    pad_token_id: _Ids = []


@dataclass(frozen=True)
class Beside:
    """What the files beside a `tokenizer.json` say.

    `named`: for each role (file, token or id), the most trusted file first. `splits_specials`: whether the text of a
    special token is encoded as text by default. `end_ids`: what ends a generated text, empty where no file says.
    """

    named: Mapping[Role, Sequence[tuple[str, str | int]]] = field(default_factory=dict)
    splits_specials: bool = False
    end_ids: frozenset[int] = frozenset()


def read_beside(folder: Path) -> Beside:
    """Read what a folder says of its tokenizer, missing files included. Raises `UserError` that names a damaged one."""
    config = _read(folder / "tokenizer_config.json", _TokenizerConfig)
    tokens = {
        "tokenizer_config.json": config,
        "special_tokens_map.json": _read(folder / "special_tokens_map.json", _Tokens),
    }
    models = {name: _read(folder / name, _ModelConfig) for name in ("generation_config.json", "config.json")}
    named: dict[Role, list[tuple[str, str | int]]] = {}
    for role in ROLES:
        words = [(name, getattr(file, f"{role}_token")) for name, file in tokens.items()]
        ids = [(name, number) for name, file in models.items() for number in getattr(file, f"{role}_token_id", ())]
        named[role] = [(name, word) for name, word in words if word is not None] + ids
    return Beside(
        named=named,
        splits_specials=bool(config.split_special_tokens),
        end_ids=frozenset(next((file.eos_token_id for file in models.values() if file.eos_token_id), ())),
    )


def _read(file: Path, content: type[Content]) -> Content:
    """A JSON file as its model; a missing one says nothing."""
    try:
        return read_json(content, file)
    except FileNotFoundError:
        return content()
    except DamagedFileError as error:
        raise UserError(f"{error}; mend or remove it") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error}; mend or remove it") from None


def candidates(
    role: Role, beside: Beside, *, specials: Mapping[str, int], id_of: Callable[[str | int], int | None]
) -> dict[int, str]:
    """Ids that may have a role, the best first, each with its reason.

    They are the tokens that the files name; where no file names one that exists, the special tokens with a common
    spelling. `specials`: special tokens and their ids. `id_of`: the id of a token or of an id, None if there is none.
    """
    by_file = [(id_of(token), f"by {name}") for name, token in beside.named.get(role, ())]
    by_name = [(specials.get(spelling), "by its name") for spelling in SPELLINGS[role]]
    for found in (by_file, by_name):
        known = {number: reason for number, reason in reversed(found) if number is not None}
        if known:
            return dict(reversed(known.items()))
    return {}
