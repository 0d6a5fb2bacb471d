"""Signals that come while a program still imports its libraries, which takes a minute on some clusters.

In: SIGINT, SIGTERM, SIGUSR1. Out: the exit code of a run that was stopped, for nothing is lost yet, instead of Python's
own endings: a launcher that asks a starting job to stop shall put it back into the queue. Imports little itself.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType

from pipeline.train.processes.launched import Launch, read_launch

AGAIN = "run the same command again to go on"


def stop_while_importing() -> None:
    """Until others take over: a signal that asks to stop ends this process, as one that was stopped."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    launch = Launch()
    with suppress(ValueError):  # half a launch, which is told of when there is time
        launch = read_launch()
    if launch.local_rank == 0:
        text = f"stopped by {signal.Signals(number).name} while starting, so nothing was lost; {AGAIN}\n"
        with suppress(OSError):
            os.write(2, text.encode())
    # No word for launch.ranks: the signal may come of another rank's failure, and it knows whether it was asked itself.
    os._exit(launch.stopped_code)
