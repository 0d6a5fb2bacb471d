"""What is already done: the ledger of an output folder.

In: reports of committed units. Out: after any interruption, those that still hold. `ledger.jsonl` is a header
(what the units were made for) and one line per unit, each written after its shards are durable.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.data.unit import UnitReport
from pipeline.files import write_durably

LEDGER_NAME = "ledger.jsonl"


class LedgerHeader(BaseModel):
    """What the units of a ledger were made for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: dict[str, Any]
    inputs_digest: str
    tokenizer_fingerprint: str


class Ledger:
    """The ledger of one output folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER_NAME

    def read(self) -> tuple[LedgerHeader | None, list[UnitReport]]:
        """Header and reports; a torn last line, the mark of a kill, is no report."""
        if not self.path.exists():
            return None, []
        lines = self.path.read_bytes().splitlines()
        try:
            header = LedgerHeader.model_validate_json(lines[0])
        except (IndexError, ValidationError):
            return None, []
        reports = []
        for line in lines[1:]:
            try:
                reports.append(UnitReport.model_validate_json(line))
            except ValidationError:
                continue
        return header, reports

    def write(self, header: LedgerHeader, reports: Iterable[UnitReport]) -> None:
        """Replace the ledger."""
        lines = [header.model_dump_json(), *(report.model_dump_json() for report in reports)]
        write_durably(self.path, "".join(line + "\n" for line in lines).encode())

    def append(self, report: UnitReport) -> None:
        """Record a committed unit, durably."""
        with self.path.open("ab") as file:
            file.write(report.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
