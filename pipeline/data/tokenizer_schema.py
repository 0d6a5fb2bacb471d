"""What a `tokenizer.json` has to hold before anything is made of it, beyond what the `tokenizers` library checks.

In: a parsed `tokenizer.json`. Out: nothing, or a `UserError` with the first fault. The library takes an id for what it
is; tables of a program have an entry for each id up to the largest, so one of four thousand million would fill memory.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from pipeline.untrusted import check

LARGEST_TOKENIZER = 2**28
"""Bytes of a tokenizer.json; those of the largest vocabularies take a fourth of it."""
MOST_TOKENS = 2**24
"""Ids; the largest vocabularies in use have a sixteenth of it."""

_Id = Annotated[int, Field(ge=0, lt=MOST_TOKENS)]


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _AddedToken(_Checked):
    id: _Id
    content: str
    special: bool = False


class _Model(_Checked):
    """The vocabulary: ids by token, or for Unigram tokens and their scores in the order of ids."""

    type: str | None = None
    vocab: dict[str, _Id] | Annotated[list[list[str | float]], Field(max_length=MOST_TOKENS)] | None = None
    merges: list[str | list[str]] | None = None
    unk_token: str | None = None
    unk_id: _Id | None = None
    continuing_subword_prefix: str | None = None


class _Definition(_Checked):
    model: _Model
    added_tokens: list[_AddedToken] | None = None


def check_definition(definition: Any, *, origin: str) -> None:
    """Raise `UserError` for what is no `tokenizer.json`."""
    check(_Definition, definition, origin=f"{origin} is not a tokenizer.json: it")
