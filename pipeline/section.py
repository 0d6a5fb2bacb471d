"""What a section of the settings is: the base of the schema in config.py, and the types of its numbers.

In: plain values. Out: a frozen section, or every fault of it. The text under a key is its documentation.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Beta = Annotated[float, Field(gt=0, lt=1)]


FIELDS_ONLY: dict[str, Any] = {}
"""Validation context that leaves contradictions out, so that the command line can list them all."""


class Section(BaseModel):
    """Base of all sections: frozen, closed to unknown keys, documented by its attributes."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def faults(self) -> list[str]:
        """Contradictions between the keys of this section, each one sentence."""
        return []

    def _changed(self, key: str) -> bool:
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    @model_validator(mode="after")
    def _no_faults(self, info: ValidationInfo) -> Self:
        faults = [] if info.context is FIELDS_ONLY else self.faults()
        if faults:
            raise ValueError("; ".join(faults))
        return self
