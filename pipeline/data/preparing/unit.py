"""One unit of work: read, validate, split, encode, write. Run by one process or by many.

In: a `Unit` of the plan and what applies to all units. Out: the shards `train-NNNNN` and `val-NNNNN`, the rejected
records, and a `UnitReport`. What is written depends on nothing else: not on other units, the order of work or the
process.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from secrets import token_hex
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, model_validator

from pipeline.data.manifest import SPLITS, TOKENIZER_NAME, ShardInfo, SplitName, digest_of
from pipeline.data.preparing.encoder import Backend, Encoder, EncoderMismatch
from pipeline.data.preparing.parts import PartReader
from pipeline.data.preparing.split import SplitRule
from pipeline.data.reading.formats import EMPTY, Document, Rejected, TextRules, with_remedy
from pipeline.data.reading.plan import Begun, Unit
from pipeline.data.shards import DOCUMENT_DTYPE, ShardWriter
from pipeline.data.tokenizer import TextTokenizer
from pipeline.errors import UserError
from pipeline.files import write_durably
from pipeline.untrusted import FileName

BATCH_BYTES = 2**19
"""Text encoded at once: its ids stay in a processor's cache while they are checked, converted and written."""
EXAMPLES = 3
UNKNOWN_TOKENS = "unknown tokens"


@dataclass(frozen=True)
class UnitSettings:
    """What applies to every unit. The tokenizer is `tokenizer.json` in `output`."""

    output: Path
    rules: TextRules
    split: SplitRule
    tokenizer_fingerprint: str
    vocab_size: int
    eos_id: int
    backend: Backend
    strict: bool
    allow_failed: bool
    workers: int

    def key(self, unit: Unit) -> str:
        """Digest of everything the unit's shards depend on; equal keys mean equal shards, part by part."""
        values = asdict(self)
        for how in ("output", "backend", "strict", "allow_failed", "workers"):
            del values[how]
        pieces = [
            [source.name, source.kind, source.fingerprint, source.held_out, piece.index, piece.start, piece.stop]
            for piece in unit.pieces
            for source in [piece.source]
        ]
        return digest_of({"settings": values, "pieces": pieces})


class UnitReport(BaseModel):
    """What became of a unit, or of a part of one: a line of the ledger. `last`: no part follows.

    `rows` counts the records of each source, blank lines included; `drops` the rejected ones by reason, of which
    `examples` shows the first; `lowest_draw` is the smallest hash among its documents; `first_sources` are those of
    the first document of each shard; `failed` tells what of its input was done without, `mismatch` why it was
    encoded by `tokenizers` after all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: int
    part: int
    last: bool
    key: str
    shards: dict[SplitName, ShardInfo]
    first_sources: dict[SplitName, int]
    documents: int
    text_bytes: int
    rows: dict[int, int]
    drops: dict[str, int]
    examples: tuple[Rejected, ...]
    noticed: dict[str, int]
    quarantine: FileName | None
    lowest_draw: int
    failed: tuple[str, ...] = ()
    mismatch: str | None = None

    @model_validator(mode="after")
    def _sources_have_rows(self) -> Self:
        """A damaged report is none: its unit is made again."""
        named = {*self.first_sources.values(), *(record.source for record in self.examples)}
        if not named <= self.rows.keys() or self.first_sources.keys() != self.shards.keys():
            raise ValueError("a report names the sources whose rows it counts, and the first one of each shard")
        return self

    @property
    def name(self) -> str:
        """As that of the unit, `00012`; part 3 of it is `00012-0003`."""
        return part_name(self.unit, self.part)

    @property
    def place(self) -> tuple[int, int]:
        """Sorts reports in the order of the corpus."""
        return (self.unit, self.part)

    @property
    def tokens(self) -> int:
        """Tokens of all splits."""
        return sum(shard.tokens for shard in self.shards.values())

    @property
    def dropped(self) -> int:
        """Records that gave no document."""
        return sum(self.drops.values())

    @property
    def bad(self) -> int:
        """Records that are at fault: all that were dropped but the empty ones."""
        return self.dropped - self.drops.get(EMPTY, 0)

    def files(self) -> list[str]:
        """Names of the files the unit wrote."""
        shards = [name for shard in self.shards.values() for name in shard.files]
        return shards + ([self.quarantine] if self.quarantine else [])

    def save(self, folder: Path) -> None:
        """Leave the report in `folder` until it is in a ledger: from here on the unit is done, whoever dies."""
        write_durably(report_path(folder, self.name), self.model_dump_json().encode())


def part_name(unit: int, part: int) -> str:
    """What the files of a part are called by. Most units have but one, which is called as the unit is."""
    return f"{unit:05d}" + (f"-{part:04d}" if part else "")


def begun_by(reports: Sequence[UnitReport], before: Begun = Begun()) -> Begun:  # noqa: B008 - it is frozen
    """What the first parts of a unit hold: those that were done before, and those of which these are the reports."""
    rows = sum((Counter(report.rows) for report in reports), Counter(dict(before.rows)))
    records = before.records + sum(report.documents + report.dropped for report in reports)
    return Begun(before.parts + len(reports), records, tuple(sorted(rows.items())))


def report_path(folder: Path, name: str) -> Path:
    """Where the report of a unit lies until it is in a ledger."""
    return folder / f"report-{name}.json"


OnBatch = Callable[[int, int], None]


def prepare_unit(unit: Unit, settings: UnitSettings, *, on_batch: OnBatch | None = None) -> tuple[UnitReport, ...]:
    """Write the shards of what is to be done of a unit, part by part, and report each as soon as it is done.

    A part has about `unit_bytes` of text, and most units are one part. `on_batch` is told text bytes and tokens as they
    are written. Raises `DamagedInputError` for input that cannot be read, `UserError` for what concerns all units,
    `OSError` when the disk is full; then nothing remains of the part that was begun, and the parts before it stay.
    """
    encoder, mismatch = _encoder(settings), ""
    made: list[UnitReport] = []
    reading = PartReader(unit, settings.rules, allow_failed=settings.allow_failed)
    while not (made and made[-1].last):
        number = unit.begun.parts + len(made)
        try:
            report = _write(number, reading, settings, encoder, on_batch)
        except EncoderMismatch as error:
            encoder, mismatch = Encoder(encoder.tokenizer, backend="tokenizers"), str(error)
            left = replace(unit, begun=begun_by(made, unit.begun))
            reading = PartReader(left, settings.rules, allow_failed=settings.allow_failed)
            continue
        if mismatch:
            report, mismatch = report.model_copy(update={"mismatch": mismatch}), ""
        report.save(settings.output)
        made.append(report)
    return tuple(made)


def _write(
    number: int, reading: PartReader, settings: UnitSettings, encoder: Encoder, on_batch: OnBatch | None
) -> UnitReport:
    """The next part of a unit."""
    unit = reading.unit
    held_out = {piece.index: piece.source.held_out for piece in unit.pieces}
    documents, text_bytes, lowest_draw = 0, 0, 2**64 - 1
    split, part = settings.split, part_name(unit.number, number)
    with ExitStack() as stack:
        sinks: dict[SplitName, _Sink] = {}
        for name in SPLITS:
            writer = ShardWriter(settings.output, f"{name}-{part}", vocab_size=settings.vocab_size)
            where = reading.where
            sinks[name] = _Sink(stack.enter_context(writer), encoder, settings.eos_id, on_batch=on_batch, where=where)
        quarantine = stack.enter_context(_Quarantine(settings.output, part))
        for record in reading.part():
            if isinstance(record, Rejected):
                quarantine.add(_refused(record, reading, strict=settings.strict))
                continue
            content = record.content
            draw = split.draw(content)
            documents += 1
            text_bytes += len(content)
            lowest_draw = min(lowest_draw, draw)
            if split.mode == "tail":
                for side, text in split.parts(content).items():
                    sinks[side].add(text, record)
            else:
                sinks[split.side(draw, held_out=held_out[record.source])].add(content, record)
        set_aside = quarantine.commit()
        written = {name: sink.finish() for name, sink in sinks.items()}
    counted = reading.end_part()
    noticed = sum((sink.noticed for sink in sinks.values()), Counter({"invalid bytes replaced": counted.replaced}))
    return UnitReport(
        unit=unit.number,
        part=number,
        last=reading.ended,
        key=settings.key(unit),
        shards={name: shard for name, shard in written.items() if shard},
        first_sources={name: sink.first_source for name, sink in sinks.items() if written[name]},
        documents=documents,
        text_bytes=text_bytes,
        rows=counted.rows,
        drops=quarantine.drops,
        examples=tuple(quarantine.examples),
        noticed={what: count for what, count in noticed.items() if count},
        quarantine=set_aside,
        lowest_draw=lowest_draw,
        failed=counted.failed,
    )


def _refused(record: Rejected, reading: PartReader, *, strict: bool) -> Rejected:
    if strict and record.reason != EMPTY:
        where = reading.where(record.source, record.row)
        raise UserError(f"--strict: {where}: {with_remedy(record.reason)}: {record.excerpt[:80]}")
    return record


class _Quarantine:
    """Writes the rejected records of a part, one JSON object a line, as they come: there may be very many."""

    def __init__(self, output: Path, part: str) -> None:
        self.drops: Counter[str] = Counter()
        self.examples: list[Rejected] = []
        self._path = output / f"quarantine-{part}.jsonl"
        self._temporary = self._path.with_name(f"{self._path.name}.{token_hex(4)}.tmp")
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Drop what was not committed."""
        try:
            if self._file:
                self._file.close()
        finally:
            self._temporary.unlink(missing_ok=True)  # gone already when committed

    def add(self, record: Rejected) -> None:
        self.drops[record.reason] += 1
        if record.reason == EMPTY:  # no fault, and nothing to look at
            return
        if len(self.examples) < EXAMPLES:
            self.examples.append(record)
        if self._file is None:
            self._file = self._temporary.open("wb")
        self._file.write(orjson.dumps(record._asdict()) + b"\n")

    def commit(self) -> str | None:
        """Make the records durable; the name of their file, or None without any."""
        if self._file is None:
            return None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._path)
        return self._path.name


class _Sink:
    """Gathers texts, encodes them by the batch, ends each with EOS and hands them to a shard."""

    def __init__(
        self,
        writer: ShardWriter,
        encoder: Encoder,
        eos_id: int,
        *,
        on_batch: OnBatch | None,
        where: Callable[[int, int], str],
    ) -> None:
        """`where` puts a source and a row in words."""
        self._writer, self._encoder, self._on_batch, self._where = writer, encoder, on_batch, where
        self._eos_id = eos_id
        self._contents: list[bytes] = []
        self._sources: list[int] = []
        self._rows: list[int] = []
        self._bytes = 0
        self.first_source = 0
        self.noticed: Counter[str] = Counter()

    def add(self, content: bytes, document: Document) -> None:
        if not content:
            return
        self._contents.append(content)
        self._sources.append(document.source)
        self._rows.append(document.row)
        self._bytes += len(content)
        if self._bytes >= BATCH_BYTES:
            self._flush()

    def finish(self) -> ShardInfo | None:
        self._flush()
        return self._writer.commit()

    def _flush(self) -> None:
        contents = self._contents
        if not contents:
            return
        if not self._writer.n_tokens:
            self.first_source = self._sources[0]
        ids, lengths = self._encoder.encode(contents, end=self._eos_id)
        if np.count_nonzero(ids == self._eos_id) != len(contents):
            self._refuse_end_inside(ids, lengths)
        documents = np.zeros(len(contents), DOCUMENT_DTYPE)
        documents["text_bytes"] = np.fromiter(map(len, contents), np.int64, count=len(contents))
        documents["source"], documents["row"] = self._sources, self._rows
        digests = b"".join(map(xxhash.xxh3_128_digest, contents))  # big-endian: high half first
        documents["hash"] = np.frombuffer(digests, ">u8").reshape(-1, 2)[:, ::-1]
        self._notice(contents, ids)
        self._writer.append(ids, lengths=lengths, documents=documents)
        if self._on_batch:
            self._on_batch(self._bytes, len(ids))
        self._contents, self._sources, self._rows, self._bytes = [], [], [], 0

    def _refuse_end_inside(self, ids: NDArray[Any], lengths: NDArray[np.int64]) -> None:
        """A document that ends within would be two to training, and damage to `--verify`."""
        ends = np.bincount(np.searchsorted(np.cumsum(lengths), np.flatnonzero(ids == self._eos_id), side="right"))
        number = int(np.argmax(ends > 1))
        where, token = self._where(self._sources[number], self._rows[number]), self._encoder.tokenizer.eos_token
        fault = f"{where}: text in it is encoded with {token!r} (id {self._eos_id}), the token that ends documents"
        if self._encoder.backend != "tokenizers":  # which knows how to go round it
            raise EncoderMismatch(fault)
        raise UserError(f"{fault}; choose another with --eos TOKEN, or leave this text out")

    def _notice(self, contents: list[bytes], ids: NDArray[Any]) -> None:
        """Count what is kept as it stands but worth knowing."""
        self.noticed["documents with NUL"] += sum(b"\0" in content for content in contents)
        self.noticed["documents with the text of a special token"] += self._encoder.special_text(contents)
        if self._encoder.unknown_id is not None:
            ends = len(contents) if self._encoder.unknown_id == self._eos_id else 0
            self.noticed[UNKNOWN_TOKENS] += int(np.count_nonzero(ids == self._encoder.unknown_id)) - ends


_ENCODERS: dict[tuple[str, Backend], Encoder] = {}
"""The encoder of this process, by fingerprint and backend: one a process, not one a unit. To load it takes a second."""


def keep_encoder(encoder: Encoder, fingerprint: str) -> None:
    """Let units of this process use an encoder that is loaded already. `fingerprint`: of its tokenizer."""
    _ENCODERS.clear()  # they are large
    _ENCODERS[fingerprint, encoder.backend] = encoder


def begin_worker() -> None:
    """What a new process can do ahead of its first unit: by being found, this was imported."""


def load_encoder(definition_json: bytes, eos_id: int, fingerprint: str, workers: int) -> None:
    """What it can do once the tokenizer is known: load the backend that most often is chosen."""
    definition = orjson.loads(definition_json)
    tokenizer = TextTokenizer.from_definition(definition, origin=TOKENIZER_NAME, eos=eos_id)
    encoder = Encoder(tokenizer, backend="gigatoken", workers=workers)
    encoder.encode([b"a"])
    keep_encoder(encoder, fingerprint)


def _encoder(settings: UnitSettings) -> Encoder:
    key = (settings.tokenizer_fingerprint, settings.backend)
    if key not in _ENCODERS:
        path = settings.output / TOKENIZER_NAME
        tokenizer = TextTokenizer.from_file(path, eos=settings.eos_id)
        assert tokenizer.fingerprint == settings.tokenizer_fingerprint, f"{path} changed while the data was prepared"
        encoder = Encoder(tokenizer, backend=settings.backend, workers=settings.workers)
        keep_encoder(encoder, tokenizer.fingerprint)
    return _ENCODERS[key]
