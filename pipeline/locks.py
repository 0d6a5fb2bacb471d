"""One writer per folder: a dataset being prepared, a run being trained.

In: a folder. Out: the right to write into it, until the block or the process ends, however that ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

LOCK_NAME = ".lock"
LOOK_AGAIN = 0.2  # seconds


@contextmanager
def locked(
    folder: Path,
    *,
    ask_of_other_hosts: bool,
    name: str = LOCK_NAME,
    patience: float = 0.0,
    say: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Hold the folder against a second process; a lock whose process died is simply taken.

    Processes that share a folder by agreement lock different names in it.

    Raises `UserError` naming the holder's pid, host and start. Some file systems do not carry locks between
    hosts: with `ask_of_other_hosts` a file left by another host is refused too until it is removed. Without, a job
    that was killed there and queued again here goes on by itself. patience: seconds to wait for another holder's end.
    """
    path = folder / name
    until = time.monotonic() + patience
    while True:
        try:
            descriptor = _acquire(path, ask_of_other_hosts=ask_of_other_hosts)
            break
        except UserError as error:
            if time.monotonic() >= until:
                raise
            if say is not None:
                say(f"waiting {patience:.0f} s: {error}")
                say = None
            time.sleep(LOOK_AGAIN)
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat("T", "seconds")}
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def refuse_held(folder: Path, *, name: str = LOCK_NAME) -> None:
    """Raise `UserError` when another process holds the folder under that name, without holding it ourselves."""
    path = folder / name
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        holder = _holder(descriptor)
        if holder.get("host", socket.gethostname()) != socket.gethostname():
            raise UserError(_busy(path, holder) + f"; if that process is gone, remove {path}")
    except OSError:
        raise UserError(_busy(path, _holder(descriptor))) from None
    finally:
        os.close(descriptor)


def _acquire(path: Path, *, ask_of_other_hosts: bool) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UserError(_busy(path, holder)) from None
        holder = _holder(descriptor)
        if ask_of_other_hosts and holder.get("host", socket.gethostname()) != socket.gethostname():
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
    return f"{path.parent} is being written by {who}; wait for it or choose another folder"
