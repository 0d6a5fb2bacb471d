"""Signals that come while a program still imports its libraries, which takes a minute on some clusters.

In: SIGINT, SIGTERM, SIGUSR1, the death of torchrun. Out: the exit code of a run that was stopped, for nothing is lost
yet, instead of Python's own endings: a launcher that asks a starting job to stop shall put it back into the queue.
Imports little itself.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType

from pipeline.errors import EXIT_HUNG
from pipeline.train.processes.ending import orphaned
from pipeline.train.processes.launched import Launch, read_launch

AGAIN = "run the same command again to go on"
TICK = 1.0  # seconds between looks for torchrun


def stop_while_importing() -> None:
    """Until others take over: a signal that asks to stop ends this process, as one that was stopped."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), _stop)
    launch = _launch()
    if launch.parent:
        threading.Thread(target=_end_with_torchrun, args=(launch,), name="early", daemon=True).start()


def _launch() -> Launch:
    with suppress(ValueError):  # half a launch, which is told of when there is time
        return read_launch()
    return Launch()


def _end_with_torchrun(launch: Launch) -> None:
    """End this process if its torchrun dies. A job, once it hears signals, has a watch of its own, which records it."""
    while signal.getsignal(signal.SIGTERM) is _stop:
        if launch.orphaned:
            _say(f"{launch.who} ends because {orphaned(launch).text}")
            os._exit(EXIT_HUNG)
        time.sleep(TICK)


def _stop(number: int, frame: FrameType | None) -> None:
    launch = _launch()
    if launch.local_rank == 0:
        _say(f"stopped by {signal.Signals(number).name} while starting, so nothing was lost; {AGAIN}")
    # No word for launch.ranks: the signal may come of another rank's failure, and it knows whether it was asked itself.
    os._exit(launch.stopped_code)


def _say(text: str) -> None:
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())
