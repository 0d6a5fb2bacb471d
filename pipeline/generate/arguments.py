"""The command line of sample.py, read without torch, which takes seconds to import.

In: its arguments. Out: what to continue, and how. Raises `UserError` for values out of range.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.errors import UserError

Texts = Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction]


@dataclass(frozen=True)
class Options:
    """How to continue prompts."""

    max_new_tokens: int = 256
    """Tokens after which a row ends with "length"."""
    temperature: float = 1.0
    """Below 1 sharpens the distribution, above 1 flattens it; 0 takes the most likely token."""
    top_k: int | None = None
    """Draw from the k most likely tokens."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens that holds this probability."""
    min_p: float = 0.0
    """Draw from the tokens at least this times as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of the prompt and of the text so far less likely."""
    num_samples: int = 1
    """Continuations of each prompt."""
    seed: int = 1337
    """Sample s of prompt p always draws from the same stream, whatever else is in the batch."""
    cache: bool = True
    """Keep keys and values. False recomputes the window for every token: the reference, and slow."""
    batch_rows: int = 32
    """Rows decoded at once: bounds the memory of the cache and changes no text."""

    def __post_init__(self) -> None:
        """Refuse values out of range with a `UserError` that lists all of them."""
        wanted = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "0 (greedy) or above"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0 (1 leaves the logits alone)"),
            "num_samples": (self.num_samples >= 1, "at least 1"),
            "batch_rows": (self.batch_rows >= 1, "at least 1"),
        }
        faults = [f"{name} must be {text}, got {getattr(self, name)}" for name, (ok, text) in wanted.items() if not ok]
        if faults:
            raise UserError("; ".join(faults))


@dataclass(frozen=True)
class Arguments:
    """Continue prompts with a trained model."""

    source: tyro.conf.Positional[str]
    """Run folder (its newest checkpoint), checkpoint (also an address: s3://...), or Hugging Face folder."""
    prompt: Texts = ()
    """Texts to continue; - is standard input. Without any: piped standard input, or the start of a new document."""
    prompt_file: Path | None = None
    """UTF-8 file with one more prompt. A last line break of a file or of standard input is not part of the prompt."""
    sampling: Annotated[Options, tyro.conf.OmitArgPrefixes] = field(default_factory=Options)
    stop: Texts = ()
    """Texts that end a sample; they are not printed."""
    ignore_eos: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on after the token that ends a document."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the model."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA when present."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object per sample and line: prompt, text, tokens, finish_reason, seed."""


def read_arguments(description: str | None) -> Arguments:
    """Read the command line; tyro prints what is wrong with it, or `--help`, and exits."""
    return tyro.cli(Arguments, prog="sample.py", description=description)


def answer_at_once(description: str | None) -> None:
    """Answer `--help` and exit; it does not wait for the imports of sampling."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        read_arguments(description)
