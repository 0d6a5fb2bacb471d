"""How a preparation ends before its end, in words: stopped by the user, or by the file system.

In: what was raised. Out: one message with the command that goes on. What is done is kept in any case.
"""

from __future__ import annotations

import errno
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.data.preparing.decide import free_bytes
from pipeline.errors import StoppedEarly, UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says when a disk, or one's share of it, is full."""


def stopped(state: str) -> StoppedEarly:
    """What Ctrl-C leaves, and the command that goes on from there."""
    return StoppedEarly(f"stopped: {state}; go on with: {_same_command()}")


def _same_command() -> str:
    return shlex.join(["python", *sys.argv])


def disk_full(output: Path, *, needed: int | None = None) -> UserError:
    """The error for a full disk; `needed` are the bytes that are missing, where that is known."""
    more = "" if needed is None else f", about {needed:,} more are needed"
    return UserError(
        f"the disk of {output} is full ({free_bytes(output):,} bytes free{more}); finished units are kept: "
        f"make room and go on with: {_same_command()}"
    )


@contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """Turn what the file system refuses into a message; temporaries are gone by then, committed units stay."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise disk_full(output) from None
        if error.errno == errno.EFBIG:
            raise UserError(
                f"a file in {output} would be larger than is allowed here (see ulimit -f); finished units are kept: "
                f"raise the limit and go on with: {_same_command()}"
            ) from None
        if isinstance(error, PermissionError | FileExistsError | NotADirectoryError) or error.errno == errno.EROFS:
            raise UserError(f"cannot write to {output}: {error}; choose another --output") from None
        raise
