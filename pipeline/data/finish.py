"""The end of a preparation: judge what the units reported, write the quarantine, compose the manifest.

In: one report per unit, in order. Out: a `Manifest`, or a `UserError` when the result is not worth having.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from pipeline.data.corpus import Corpus
from pipeline.data.formats import Rejected
from pipeline.data.ledger import LEDGER_NAME
from pipeline.data.manifest import FORMAT_VERSION, SPLITS, TOKENIZER_NAME, Manifest, ShardInfo, SplitName, data_digest
from pipeline.data.request import input_infos
from pipeline.data.shards import token_dtype
from pipeline.data.unit import UnitReport, UnitSettings
from pipeline.errors import UserError
from pipeline.files import write_durably

QUARANTINE_NAME = "quarantine.jsonl"


def refuse_bad(reports: Sequence[UnitReport], corpus: Corpus, *, max_bad: float) -> None:
    """Raise `UserError` with three examples when more than `max_bad` of all records were rejected."""
    rejected = [record for report in reports for record in report.rejected]
    records = len(rejected) + sum(report.documents for report in reports)
    if len(rejected) > max_bad * records:
        share = f"{len(rejected) / records:.2%}"
        raise UserError(
            f"{len(rejected)} of {records} records are bad ({share}), --max-bad allows {max_bad:.2%}"
            f"{_examples(rejected, corpus)}\n"
            "  mend the input, or allow more with --max-bad F; finished units are kept"
        )


def no_documents(rejected: Sequence[Rejected], corpus: Corpus) -> UserError:
    """The error for inputs without a single document."""
    found = f"all {len(rejected)} records are bad{_examples(rejected, corpus)}" if rejected else "all of them are empty"
    return UserError(f"no document in {len(corpus.sources)} inputs: {found}")


def _examples(rejected: Sequence[Rejected], corpus: Corpus) -> str:
    counts = Counter(record.reason for record in rejected)
    table = "".join(f"\n  {count} x {reason}" for reason, count in sorted(counts.items()))
    return table + "".join(
        f"\n  {corpus.sources[record.source].name}, row {record.row}: {record.reason}: {record.excerpt[:80]}"
        for record in rejected[:3]
    )


def refuse_empty_split(reports: Sequence[UnitReport], settings: UnitSettings) -> None:
    """Raise `UserError` when a split that was asked for got nothing; the units, of no use to anyone, are removed."""
    documents = sum(report.documents for report in reports)
    rule = settings.split
    wanted = SPLITS if rule.mode != "none" else SPLITS[:1]
    empty = [split for split in wanted if not any(split in report.shards for report in reports)]
    if not empty:
        return
    for name in [name for report in reports for name in report.files()] + [TOKENIZER_NAME, LEDGER_NAME]:
        (settings.output / name).unlink(missing_ok=True)
    if empty == ["val"] and rule.mode == "hash":
        lowest = min(report.lowest_draw for report in reports)
        scale = 10.0 ** (2 - math.floor(math.log10((lowest + 1) / 2**64)))
        remedy = f"--val-fraction {math.ceil(lowest / 2**64 * scale + 1) / scale:g} would hold out at least one"
    else:
        remedy = "choose another --val-fraction (0 for no validation split), or give more text"
    raise UserError(f"--val-fraction {rule.fraction:g} leaves {empty[0]} empty with {documents} documents; {remedy}")


def write_quarantine(output: Path, reports: Sequence[UnitReport], corpus: Corpus) -> None:
    """Write every rejected record as a line of `quarantine.jsonl`: source, row, reason, excerpt."""
    lines = [
        orjson.dumps(
            {
                "source": corpus.sources[record.source].name,
                "row": record.row,
                "reason": record.reason,
                "excerpt": record.excerpt,
            }
        )
        for report in reports
        for record in report.rejected
    ]
    write_durably(output / QUARANTINE_NAME, b"".join(line + b"\n" for line in lines))


def manifest_of(
    reports: Sequence[UnitReport], settings: UnitSettings, corpus: Corpus, *, identity: dict[str, Any]
) -> Manifest:
    """Compose the manifest of a finished dataset."""
    splits: dict[SplitName, tuple[ShardInfo, ...]] = {
        split: tuple(report.shards[split] for report in reports if split in report.shards) for split in SPLITS
    }
    dtype = token_dtype(settings.vocab_size).name
    drops = sum((report.drops() for report in reports), Counter[str]())
    return Manifest.model_validate(
        {
            "format_version": FORMAT_VERSION,
            "dtype": dtype,
            "vocab_size": settings.vocab_size,
            "eos_id": settings.eos_id,
            "tokenizer_fingerprint": settings.tokenizer_fingerprint,
            "data_digest": data_digest(splits, tokenizer_fingerprint=settings.tokenizer_fingerprint, dtype=dtype),
            "split_rule": settings.split.describe(),
            "splits": splits,
            "records": sum(report.documents + len(report.rejected) for report in reports),
            "drops": dict(sorted(drops.items())),
            "noticed": {},
            "settings": identity,
            "inputs": input_infos(corpus),
        }
    )
