"""One unit of work: read, validate, split, encode, write. Run by one process or by many.

In: a `Unit` of the plan and what applies to all units. Out: the shards `train-NNNNN` and `val-NNNNN`, and a
`UnitReport`. What is written depends on nothing else: not on other units, the order of work or the process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict

from pipeline.data.corpus import read_unit
from pipeline.data.formats import Document, Rejected, TextRules
from pipeline.data.manifest import SPLITS, TOKENIZER_NAME, ShardInfo, SplitName, digest_of
from pipeline.data.plan import Unit
from pipeline.data.shards import DOCUMENT_DTYPE, ShardWriter
from pipeline.data.tokenizer import TextTokenizer
from pipeline.seeds import named_seed

BATCH_BYTES = 2 * 2**20
"""Text encoded at once: bounds memory, since `tokenizers` keeps about 500 bytes a token until it is done."""


@dataclass(frozen=True)
class SplitRule:
    """Which part of which document is held out.

    `hash`: a document whole, if its hash falls below `fraction`; equal texts land on one side, whatever
    surrounds them. `tail`: the last `fraction` of the characters of every document. `none`: nothing.
    """

    mode: Literal["hash", "tail", "none"]
    fraction: float
    seed: int

    def describe(self) -> str:
        """The rule in words."""
        if self.mode == "none":
            return "no validation split"
        if self.mode == "tail":
            return f"the last {self.fraction:g} of the characters of each document is val, the rest train"
        return f"a document is val if xxh3_64(text, seed {self._hash_seed}) < {self.fraction:g} * 2^64, else train"

    def draw(self, content: bytes) -> int:
        """The hash that decides on a document, uniform in [0, 2^64)."""
        return xxhash.xxh3_64_intdigest(content, seed=self._hash_seed)

    def parts(self, text: str, draw: int) -> dict[SplitName, str]:
        """What of a document goes where; parts may be empty."""
        if self.mode == "tail":
            cut = int(len(text) * (1 - self.fraction))
            return {"train": text[:cut], "val": text[cut:]}
        held_out = self.mode == "hash" and draw < int(self.fraction * 2**64)
        return {"val" if held_out else "train": text}

    @property
    def _hash_seed(self) -> int:
        return named_seed(self.seed, "data", "split")


@dataclass(frozen=True)
class UnitSettings:
    """What applies to every unit. The tokenizer is `tokenizer.json` in `output`."""

    output: Path
    rules: TextRules
    split: SplitRule
    tokenizer_fingerprint: str
    vocab_size: int
    eos_id: int

    def key(self, unit: Unit) -> str:
        """Digest of everything the unit's shards depend on; equal keys mean equal shards."""
        values = asdict(self)
        del values["output"]
        return digest_of({"settings": values, "pieces": [asdict(piece) for piece in unit.pieces]})


class UnitReport(BaseModel):
    """What became of a unit: a line of the ledger. `lowest_draw` is the smallest hash among its documents."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: int
    key: str
    shards: dict[SplitName, ShardInfo]
    documents: int
    text_bytes: int
    rejected: tuple[Rejected, ...]
    lowest_draw: int

    @property
    def tokens(self) -> int:
        """Tokens of all splits."""
        return sum(shard.tokens for shard in self.shards.values())

    def drops(self) -> Counter[str]:
        """Rejected records by reason."""
        return Counter(record.reason for record in self.rejected)

    def files(self) -> list[str]:
        """Names of the files the unit wrote."""
        return [name for shard in self.shards.values() for name in shard.files]


def prepare_unit(
    unit: Unit, settings: UnitSettings, *, on_batch: Callable[[int, int], None] | None = None
) -> UnitReport:
    """Write the shards of a unit and report. `on_batch` is told text bytes and tokens as they are written.

    Raises `UserError` for damaged input and `OSError` when the disk is full; then nothing of the unit remains.
    """
    tokenizer = _load(settings.output / TOKENIZER_NAME, settings.tokenizer_fingerprint, settings.eos_id)
    rejected: list[Rejected] = []
    documents, text_bytes, lowest_draw = 0, 0, 2**64 - 1
    with ExitStack() as stack:
        sinks: dict[SplitName, _Sink] = {}
        for split in SPLITS:
            name = f"{split}-{unit.number:05d}"
            writer = stack.enter_context(ShardWriter(settings.output, name, vocab_size=settings.vocab_size))
            sinks[split] = _Sink(writer, tokenizer, on_batch)
        for record in read_unit(unit, settings.rules):
            if isinstance(record, Rejected):
                rejected.append(record)
                continue
            content = record.text.encode()
            draw = settings.split.draw(content)
            documents, text_bytes, lowest_draw = documents + 1, text_bytes + len(content), min(lowest_draw, draw)
            for split, text in settings.split.parts(record.text, draw).items():
                sinks[split].add(text, record)
        written = {split: sink.finish() for split, sink in sinks.items()}
    return UnitReport(
        unit=unit.number,
        key=settings.key(unit),
        shards={split: shard for split, shard in written.items() if shard},
        documents=documents,
        text_bytes=text_bytes,
        rejected=tuple(rejected),
        lowest_draw=lowest_draw,
    )


class _Sink:
    """Gathers texts, encodes them by the batch, ends each with EOS and hands them to a shard."""

    def __init__(
        self, writer: ShardWriter, tokenizer: TextTokenizer, on_batch: Callable[[int, int], None] | None
    ) -> None:
        self._writer, self._tokenizer, self._on_batch = writer, tokenizer, on_batch
        self._texts: list[str] = []
        self._records: list[tuple[Any, ...]] = []
        self._bytes = 0

    def add(self, text: str, document: Document) -> None:
        if not text:
            return
        content = text.encode()
        digest = xxhash.xxh3_128_intdigest(content)
        self._texts.append(text)
        self._records.append((len(content), document.source, document.row, (digest & (2**64 - 1), digest >> 64)))
        self._bytes += len(content)
        if self._bytes >= BATCH_BYTES:
            self._flush()

    def finish(self) -> ShardInfo | None:
        self._flush()
        return self._writer.commit()

    def _flush(self) -> None:
        if not self._texts:
            return
        ids, lengths = self._tokenizer.encode_batch(self._texts)
        ended = np.insert(ids, np.cumsum(lengths), self._tokenizer.eos_id)
        self._writer.append(ended, lengths=lengths + 1, documents=np.array(self._records, DOCUMENT_DTYPE))
        if self._on_batch:
            self._on_batch(self._bytes, len(ended))
        self._texts, self._records, self._bytes = [], [], 0


@lru_cache(maxsize=1)
def _load(path: Path, fingerprint: str, eos_id: int) -> TextTokenizer:
    """One tokenizer a process, not one a unit."""
    tokenizer = TextTokenizer.from_file(path, eos=eos_id)
    assert tokenizer.fingerprint == fingerprint, f"{path} changed while the data was prepared"
    return tokenizer
