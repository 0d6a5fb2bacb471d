"""Secrets that addresses carry, kept out of everything that is shown or stored.

In: any text, or settings that hold texts. Out: the same with user, password and the values of query parameters of each
address (s3://user:password@bucket, https://host/file?token=...) masked.
"""

from __future__ import annotations

import re
from typing import Any

MASK = "***"

# Schemes are short: bounded, so that a text of letters alone is looked through once and not from each letter on.
_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,40}:/{2,})(?P<rest>[^\s'\"<>|]*[^\s'\"<>|,.;:)\]])")
# In front of the host; or user:password where the password holds a slash, as secret keys do (digits are a port).
_USER = re.compile(r"[^/?#]*@|[^/?#:@\[]+:(?!\d*(?:[/?#]|$))[^@]*@")
_CONTAINERS = ("abfs://", "abfss://", "wasb://", "wasbs://")  # Azure's: container@account
_PARAMETER = re.compile(r"([?&#;][^=&#;?/]+=)[^&#;]+")


def mask(text: str) -> str:
    """`text` with the credentials of all addresses in it replaced by `***`."""
    return _ADDRESS.sub(_masked, text) if "://" in text else text


def _masked(found: re.Match[str]) -> str:
    rest, user = found["rest"], _USER.match(found["rest"])
    if user and not (found["scheme"].lower() in _CONTAINERS and ":" not in user[0]):
        rest = f"{MASK}@{rest[user.end() :]}"
    return found["scheme"] + _PARAMETER.sub(rf"\g<1>{MASK}", rest)


def masked(values: Any) -> Any:
    """Nested dicts, lists and tuples with every text in them masked."""
    match values:
        case str():
            return mask(values)
        case dict():
            return {key: masked(value) for key, value in values.items()}
        case list() | tuple():
            return type(values)(masked(value) for value in values)
    return values


def is_masked(text: str) -> bool:
    """Whether a stored address lacks the credentials that were given with it."""
    return "://" in text and (f"{MASK}@" in text or f"={MASK}" in text)
