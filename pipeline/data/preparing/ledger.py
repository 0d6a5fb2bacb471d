"""What is already done: the ledgers of an output folder.

In: reports of committed units. Out: after any interruption, those that still hold. A ledger is a header (what
the units were made for) and one line per unit, each written after its shards are durable. `ledger.jsonl` is that of
a whole preparation; processes that take a share each have one of their own. Between the end of a unit, in whichever
process, and its line in the ledger, `report-NAME.json` stands for it: no finished unit is done again after a kill.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.data.manifest import InputInfo
from pipeline.data.preparing.unit import UnitReport
from pipeline.files import write_durably
from pipeline.untrusted import LARGEST_JSON, read_regular

LEDGER_NAME = "ledger.jsonl"


class LedgerHeader(BaseModel):
    """What the units of a ledger were made for, and of which inputs (older ledgers do not name them)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: dict[str, Any]
    inputs_digest: str
    tokenizer_fingerprint: str
    inputs: tuple[InputInfo, ...] = ()
    eos_id: int | None = None


class Ledger:
    """One ledger of an output folder."""

    def __init__(self, folder: Path, *, share: tuple[int, int] | None = None) -> None:
        self.path = folder / (f"ledger.{share[0]}-of-{share[1]}.jsonl" if share else LEDGER_NAME)

    def read(self) -> tuple[LedgerHeader | None, list[UnitReport]]:
        """Header and entries; a torn last line, the mark of a kill, is no entry."""
        if not self.path.exists():
            return None, []
        lines = read_regular(self.path, limit=LARGEST_JSON).splitlines()
        try:
            header = LedgerHeader.model_validate_json(lines[0])
        except (IndexError, ValidationError):
            return None, []
        return header, [entry for line in lines[1:] if (entry := _entry(line))]

    def write(self, header: LedgerHeader, entries: Iterable[UnitReport]) -> None:
        """Replace the ledger."""
        lines = [header.model_dump_json(), *(entry.model_dump_json() for entry in entries)]
        write_durably(self.path, "".join(line + "\n" for line in lines).encode())

    def append(self, entry: UnitReport) -> None:
        """Record a committed unit, or part of one, durably."""
        with self.path.open("ab") as file:
            file.write(entry.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def ledgers(folder: Path) -> list[Ledger]:
    """All ledgers in a folder, that of the whole preparation and those of shares."""
    found = []
    for path in sorted(folder.glob("ledger*.jsonl")):
        ledger = Ledger(folder)
        ledger.path = path
        found.append(ledger)
    return found


def unrecorded(folder: Path) -> list[UnitReport]:
    """Reports of finished units that did not get into a ledger any more."""
    return [report for path in sorted(folder.glob("report-*.json")) if (report := _report(path))]


def _report(path: Path) -> UnitReport | None:
    try:
        return UnitReport.model_validate_json(read_regular(path, limit=LARGEST_JSON))
    except (FileNotFoundError, ValidationError):
        return None


def headers(folder: Path) -> Iterator[LedgerHeader]:
    """The headers of all ledgers that have one."""
    for ledger in ledgers(folder):
        header, _ = ledger.read()
        if header:
            yield header


def _entry(line: bytes) -> UnitReport | None:
    try:
        return UnitReport.model_validate_json(line)
    except ValidationError:
        return None
