"""What a section of the settings is: the base of the schema in config.py, and the types of its numbers.

In: plain values. Out: a frozen section, or every fault of it. The text under a key is its documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Beta = Annotated[float, Field(gt=0, lt=1)]


FIELDS_ONLY: dict[str, Any] = {}
"""Validation context that leaves contradictions out, so that the command line can list them all."""


class Clash(NamedTuple):
    """Settings that do not go together: one sentence, and every key that the verdict depends on."""

    text: str
    keys: tuple[str, ...]

    def within(self, section: str) -> Clash:
        """The same, seen from outside a section."""
        return Clash(f"{section}: {self.text}", tuple(f"{section}.{key}" for key in self.keys))


def clash(text: str, *keys: str) -> Clash:
    """Settings `keys` do not go together, for the reason `text`."""
    return Clash(text, keys)


class Section(BaseModel):
    """Base of all sections: frozen, closed to unknown keys, documented by its attributes."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    other_names: ClassVar[Mapping[str, str]] = {}
    """What other tools call keys of this schema (see `names.meant`)."""

    def clashes(self) -> list[Clash]:
        """Contradictions between the keys of this section."""
        return []

    def _changed(self, key: str) -> bool:
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    @model_validator(mode="after")
    def _no_faults(self, info: ValidationInfo) -> Self:
        clashes = [] if info.context is FIELDS_ONLY else self.clashes()
        if clashes:
            raise ValueError("; ".join(clash.text for clash in clashes))
        return self

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Take the line breaks of the source out of the documentation of keys."""
        for field in cls.model_fields.values():
            field.description = field.description and " ".join(field.description.split())
