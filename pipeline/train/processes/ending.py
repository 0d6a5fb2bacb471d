"""Why a job ends, and how a process says so when files and streams may no longer answer.

In: what happened to a rank. Out: an `Ending` that ranks hand on as JSON, its line on stderr, and its exit code for the
launcher. Nothing here can hold up the end of a process for longer than some seconds.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.credentials import mask
from pipeline.errors import EXIT_HUNG, EXIT_STOPPED
from pipeline.train.processes.launched import Launch

WRITING = 5.0  # seconds that a file or a stream has to take what is written to it, before the process ends without

NOBODY = -1  # the rank of an ending that is no rank's
GONE = "it is gone without a word: killed from outside (out of memory? the kernel's log tells), or crashed"


@dataclass(frozen=True)
class Ending:
    """Why the job ends: what happened to `rank`, and the code that it exits with.

    by: the rank that found out and tells. late: the ranks that made no progress, if that is why.
    """

    rank: int
    host: str
    text: str
    by: int
    code: int = EXIT_HUNG
    late: tuple[int, ...] = ()

    @property
    def asked_for(self) -> bool:
        """Whether it is a stop, and no failure."""
        return self.code in (0, EXIT_STOPPED)

    def written(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def read(text: bytes) -> Ending:
        """What `written` wrote."""
        found = json.loads(text)
        return Ending(**{**found, "late": tuple(found["late"])})


class Ended(Exception):  # noqa: N818 - what has happened to the job, and no error of this rank
    """The job has ended before its ranks had found each other."""

    def __init__(self, cause: Ending) -> None:
        super().__init__(cause.text)
        self.cause = cause


def ending_of(rank: int, host: str, *, words: bytes, by: int) -> Ending:
    """Why a rank whose connection has ended is gone: its last words, if it had any."""
    with suppress(ValueError, KeyError, TypeError):
        return Ending.read(words)
    return Ending(rank, host, GONE, by)


def orphaned(launch: Launch) -> Ending:
    """The end of a process whose torchrun has died."""
    return Ending(NOBODY, "", f"torchrun on {launch.host} is gone: killed from outside, or crashed", launch.rank)


def within(seconds: float, act: Callable[[], None]) -> None:
    """Do `act`, but wait for it no longer than so: what has stalled must not keep a process from ending."""
    thread = threading.Thread(target=act, name="within", daemon=True)
    with suppress(RuntimeError):  # no thread is left: end without
        thread.start()
        thread.join(seconds)


def tell(text: str) -> None:
    """Print to stderr at one go, so that the lines of several ranks do not mix. A reader that is gone is no fault."""
    within(WRITING, lambda: _write(text))


def _write(text: str) -> None:
    with suppress(OSError, ValueError):  # a pipe without a reader, a closed stream
        sys.stderr.write(f"{mask(text)}\n")
        sys.stderr.flush()


def flush_streams() -> None:
    """Send out what was printed, as far as somebody takes it."""
    within(WRITING, _flush)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()


def hand_over(file: str, code: int) -> None:
    """Leave an exit code for `launch.ranks` on this node. Of several ranks the first is heard: the one that failed."""
    if file:
        with suppress(OSError), Path(file).open("x", encoding="utf-8") as own:
            own.write(str(code))
