"""What is already done, and who is doing it: the ledger and the lock of an output folder.

In: reports of committed units. Out: after any interruption, those that still hold. `ledger.jsonl` is a header
(what the units were made for) and one line per unit, each written after its shards are durable.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.data.manifest import write_durably
from pipeline.data.unit import UnitReport
from pipeline.errors import UserError

LEDGER_NAME = "ledger.jsonl"
LOCK_NAME = ".lock"


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


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder against a second process; a lock whose process died on this host is simply taken.

    Raises `UserError` naming the holder's pid, host and start. Where the file system does not carry locks
    between hosts, the holder's host name in the file decides.
    """
    path = folder / LOCK_NAME
    descriptor = _acquire(path)
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat("T", "seconds")}
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UserError(_busy(path, holder)) from None
        holder = _holder(descriptor)
        if holder.get("host", socket.gethostname()) != socket.gethostname():
            os.close(descriptor)
            raise UserError(_busy(path, holder) + f"; if that process is gone, remove {path}")
        if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
            return descriptor
        os.close(descriptor)  # its holder finished and removed it between our open and our lock


def _holder(descriptor: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _busy(path: Path, holder: dict[str, Any]) -> str:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')} since {holder.get('since', '?')}"
    return f"{path.parent} is being written by {who}; wait for it or choose another --output"
