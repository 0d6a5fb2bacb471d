"""One writer per folder: a dataset being prepared, a run being trained.

In: a folder. Out: the right to write into it until the block or the process ends, however that ends. filelock takes an
flock on a file in the folder, which the kernel drops with the process; this module names the holder.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from pipeline.errors import UserError
from pipeline.files import naming
from pipeline.untrusted import read_regular

LOCK_NAME = ".lock"
GRACE = 0.2  # seconds: a process that only looks at a lock lets go of it within that


def to_stderr(message: str) -> None:
    """Print one line for people."""
    print(message, file=sys.stderr)


@contextmanager
def locked(
    folder: Path,
    *,
    ask_of_other_hosts: bool,
    name: str = LOCK_NAME,
    patience: float = 0.0,
    say: Callable[[str], None] = to_stderr,
) -> Iterator[None]:
    """Hold the folder against a second process; a lock whose process died is simply taken.

    Processes that share a folder by agreement lock different names in it. patience: seconds to wait for a holder to
    end. On a file system without locks the folder is used all the same, and `say` warns.

    Raises `UserError` naming the holder's pid, host and start. Some file systems do not carry locks between hosts:
    with `ask_of_other_hosts` a lock file that another host left is refused, too, until it is removed. Without, a job
    that was killed there and queued again here goes on by itself.
    """
    path = folder / name
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    _acquire(lock, path, patience=patience, say=say)
    try:
        if ask_of_other_hosts:
            _refuse_other_hosts(path)
        own = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat("T", "seconds")}
        with naming(path):
            path.write_text(json.dumps(own), encoding="utf-8")
        try:
            yield
        finally:
            if holder(path) == own:  # not that of a folder which has taken the place of this one
                path.unlink(missing_ok=True)
    finally:
        lock.release()


def refuse_held(folder: Path, *, name: str = LOCK_NAME) -> None:
    """Raise `UserError` when another process holds the folder under that name, without holding it ourselves."""
    path = folder / name
    if look(path) == "held":
        raise UserError(_busy(path))
    _refuse_other_hosts(path)


def look(path: Path) -> Literal["free", "held", "no locks"]:
    """Whether a process holds the lock file, or the file system has no locks. Raises `OSError` if it is unreadable."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its other end
    except FileNotFoundError:
        return "free"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return "held" if error.errno == errno.EWOULDBLOCK else "no locks"
    finally:
        os.close(descriptor)
    return "free"


def holder(path: Path) -> dict[str, Any]:
    """What the process that locked the file wrote into it: pid, host, since; empty when there is nothing to read."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(read_regular(path, limit=4096))
        if isinstance(found, dict):
            return found
    return {}


def _acquire(lock: FileLock, path: Path, *, patience: float, say: Callable[[str], None]) -> None:
    try:
        with naming(path):
            lock.acquire(timeout=GRACE)
    except OSError as error:  # Timeout is one
        found = look(path)
        if found == "no locks":
            say(
                f"warning: the file system of {path.parent} has no locks ({error.strerror or error}): nothing keeps a "
                "second process from writing there; start only one"
            )
            return
        if not isinstance(error, Timeout):
            raise
        if found == "held" and patience:
            say(f"waiting {patience:.0f} s: {_busy(path)}")
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            raise UserError(_busy(path)) from None


def _refuse_other_hosts(path: Path) -> None:
    """Raise `UserError` when a process of another host wrote the lock file and has not removed it."""
    found = holder(path)
    if found.get("host", socket.gethostname()) != socket.gethostname():
        raise UserError(_busy(path) + f"; if that process is gone, remove {path}")


def _busy(path: Path) -> str:
    found = holder(path)
    who = f"process {found.get('pid', '?')} on {found.get('host', '?')} since {found.get('since', '?')}"
    return f"{path.parent} is being written by {who}; wait for it or choose another folder"
