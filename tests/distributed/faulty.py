"""pretrain.py with a fault in one of its ranks, put in from outside.

    torchrun ... -m tests.distributed.faulty PLACE WHAT RANK WHEN [configs/NAME.yaml] [--section.key VALUE ...]

Once that rank has come to the place it does what is asked, and writes the time (of the monotonic clock) to the file
WHEN. A place is `start`, `data`, `compile`, `flush`, or the beginning of what the main thread says that it does.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pipeline.train.processes.pulse as pulse_module
import pretrain
from pipeline.data.loading.loader import Loader
from pipeline.train.processes.job import run_job
from pipeline.train.processes.pulse import Pulse
from pipeline.train.running.run import Run
from pipeline.train.saving.flush import Flush

Act = Callable[[], None]


def injected() -> None:
    raise ValueError("injected")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def asleep() -> None:
    pulse_module.PATIENCE = 1.0  # nobody wants to wait six times as long for a save
    time.sleep(100)


def signalled(number: int, whom: str) -> None:
    os.kill(os.getpid() if whom == "rank" else os.getppid(), number)
    time.sleep(0.5)  # torchrun hands it on


def act_of(what: str) -> Act:
    """`raises`, `is killed`, `sleeps`, or `SIGTERM agent`: the signal's name and who gets it, agent or rank."""
    acts = {"raises": injected, "is killed": killed, "sleeps": asleep}
    if what in acts:
        return acts[what]
    name, whom = what.split()
    return partial(signalled, signal.Signals[name], whom)


def at(place: str, act: Act, *, rank: int, when: Path) -> None:
    """In a rank, before anything else: `act` once it has come to `place`, and write down the time."""
    if int(os.environ["RANK"]) != rank:
        return

    def happen() -> None:
        if not when.exists():
            when.write_text(str(time.monotonic()))
            act()

    if place == "start":
        _before(Run, "resume", happen)
    elif place == "data":
        calls = itertools.count()
        _before(Loader, "batch", lambda: happen() if next(calls) == 3 else None)
    elif place == "compile":
        import torch._inductor.compile_fx  # takes a second, which the other places need not wait for

        _before(torch._inductor.compile_fx, "compile_fx", happen)
    elif place == "flush":
        _before(Flush, "run", happen)
    else:
        _hook_beats(place, happen)


def _before(owner: type | ModuleType, name: str, happen: Act) -> None:
    method = getattr(owner, name)

    def changed(*arguments: Any, **named: Any) -> Any:
        happen()
        return method(*arguments, **named)

    setattr(owner, name, changed)


def _hook_beats(place: str, happen: Act) -> None:
    """The main thread says where it is: "step 3, micro-batch", "evaluation on", "saving step 4"."""
    beat, unhurried = Pulse.beat, Pulse.unhurried

    def beats(self: Pulse, what: str) -> None:
        beat(self, what)
        if what.startswith(place):
            happen()

    @contextmanager
    def takes_its_time(self: Pulse, what: str) -> Iterator[None]:
        with unhurried(self, what):
            if what.startswith(place):
                happen()
            yield

    Pulse.beat = beats  # type: ignore[method-assign]  # a fault is put in from outside
    Pulse.unhurried = takes_its_time  # type: ignore[method-assign]


if __name__ == "__main__":
    place, what, rank, when = sys.argv[1:5]
    sys.argv = ["pretrain.py", *sys.argv[5:]]
    at(place, act_of(what), rank=int(rank), when=Path(when))
    run_job(pretrain.main)
