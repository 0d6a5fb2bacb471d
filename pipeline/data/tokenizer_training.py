"""Tokenizers made here: bytes, characters of the corpus, a BPE trained on a sample of it.

In: texts. Out: the content of a `tokenizer.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from time import monotonic
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.data.tokenizer_files import byte_symbols, waiting

EOS = "<|endoftext|>"
WORD_BYTES = 512
"""Longer words of the sample are cut for training, whose time grows with the square of their length. A word is a run of
letters, digits, punctuation or blanks, so only blank pages, dumps and rulers are that long."""
REPORT_SECONDS = 30.0

Report = Callable[[str], None]


def byte_definition() -> dict[str, Any]:
    """Id = byte value, EOS = 256. A BPE without merges over the printable stand-ins of GPT-2 for bytes."""
    vocabulary = {symbol: value for value, symbol in enumerate(byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, EOS: 256}, merges=[]))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([_lines(), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return _with_eos(tokenizer)


def character_definition(texts: Iterable[str], *, report: Report | None = None) -> dict[str, Any]:
    """One id per character of the corpus in order of code points, EOS last. A BPE without merges."""
    characters: set[str] = set()
    for text in _reported(texts, "reading the characters of the corpus", report):
        characters.update(text)
    vocabulary = {character: number for number, character in enumerate(sorted(characters))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, EOS: len(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = _lines()
    tokenizer.decoder = decoders.Fuse()
    return _with_eos(tokenizer)


def trained_definition(size: int, texts: Iterable[str], *, report: Report | None = None) -> dict[str, Any]:
    """Byte-level BPE with GPT-2's word pattern: every byte is in its alphabet, so no text is unknown.

    Words of over `WORD_BYTES` bytes are cut. Shows the bars of `tokenizers` on a terminal, else calls `report` every
    `REPORT_SECONDS`. Can be interrupted at any moment.
    """
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    short = pre_tokenizers.Split(Regex(f".{{{WORD_BYTES}}}"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, short])
    tokenizer.decoder = decoders.ByteLevel()
    terminal = sys.stderr is not None and sys.stderr.isatty()  # where the library shows its bars
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=terminal,
    )
    sample = list(_reported(texts, "reading the sample for the tokenizer", report))
    about = f"training a tokenizer of {size:,} tokens on {sum(map(len, sample)) / 1e6:,.1f} million characters"
    began = monotonic()
    # in a thread, for the library's own loop lets no signal through
    for _ in waiting(lambda: tokenizer.train_from_iterator(sample, trainer, len(sample)), every=REPORT_SECONDS):
        if report is not None and not terminal:
            report(f"{about}: {monotonic() - began:,.0f} s")
    tokenizer.pre_tokenizer = words
    definition: dict[str, Any] = json.loads(tokenizer.to_str())
    return definition


def _reported(texts: Iterable[str], about: str, report: Report | None) -> Iterator[str]:
    """The same texts; says every `REPORT_SECONDS` how much was read."""
    began = said = monotonic()
    characters = 0
    for text in texts:
        yield text
        characters += len(text)
        if report is not None and monotonic() - said >= REPORT_SECONDS:
            said = monotonic()
            report(f"{about}: {characters / 1e6:,.1f} million characters, {said - began:,.0f} s")


def _with_eos(tokenizer: Tokenizer) -> dict[str, Any]:
    tokenizer.add_special_tokens([EOS])
    definition: dict[str, Any] = json.loads(tokenizer.to_str())
    return definition


def _lines() -> Any:
    """Cut before and after each newline: words stay short, so that no book becomes one word of a million symbols."""
    return pre_tokenizers.Split("\n", behavior="isolated")
