"""One job of one or many processes: found together, ended together, its failure told once.

In: a script's `main`. Out: its exit code (see `errors.py`). Each process makes a `Job` first of all, so that signals
are heard and a fault in start-up ends the others, too.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from pipeline.errors import EXIT_UNFINISHED, StoppedEarly, UserError, print_all_characters, tell, verdict
from pipeline.train.processes import pulse as pulse_of_job
from pipeline.train.processes.early import AGAIN
from pipeline.train.processes.ending import Ended, within
from pipeline.train.processes.ending import tell as tell_text
from pipeline.train.processes.launched import Launch, read_launch
from pipeline.train.processes.lifeline import Lifelines
from pipeline.train.processes.pulse import STDERR, Pulse, is_consequence
from pipeline.train.processes.roll import find_each_other, wait_for_port
from pipeline.train.processes.signals import StopSignal

ARRIVAL = 600.0  # seconds in which all ranks have to come; some may wait long for their libraries
RECORDING = 1.0  # seconds that a second signal leaves for the record of the end


class Job:
    """A process and the others: how it was launched, its pulse, and whether it shall stop."""

    def __init__(self, launch: Launch, *, watched: bool) -> None:
        self.launch = launch
        self.pulse = Pulse(launch)
        self.stop: Callable[[], bool] = _never
        self.signal: StopSignal | None = None
        self.store: dist.Store = dist.HashStore()  # that ranks share, after `assemble`
        self._said: frozenset[str] = frozenset()
        if watched:
            faulthandler.enable(file=STDERR)  # a crash in C tells where
            _allow_many_files()
            self.signal = StopSignal(at_once=self._stop_at_once, answer=self._answer, end=self._end)
            self.stop = self.signal
            self.pulse.start()

    @staticmethod
    def alone() -> Job:
        """For use as a library: one process without a watch and without handlers of signals."""
        return Job(Launch(host=socket.gethostname()), watched=False)

    def _stop_at_once(self, name: str) -> None:
        self.pulse.stop_at_once(f"stopped by {name} before the first step was done, so nothing was lost; {AGAIN}")

    def _answer(self, text: str) -> None:
        """Tell the user, unless the signal is only the launcher's way to end the other ranks of a job that failed."""
        if self.launch.local_rank == 0 and not self.pulse.ends(wait=pulse_of_job.GRACE):
            tell_text(text)

    def _end(self, code: int, text: str) -> NoReturn:
        """End at a second signal, and record it if that takes no time."""
        within(RECORDING, lambda: self.pulse.notify(code, text))
        os._exit(code)

    def steady(self) -> None:
        """The first step is done: from now on there is something to save, and steps take their usual time."""
        self.pulse.steady()
        if self.signal is not None:
            self.signal.arm()

    def once(self, what: str) -> bool:
        """True the first time that this is asked of `what`."""
        said, self._said = what in self._said, self._said | {what}
        return not said

    def assemble(self, *, limit: float = ARRIVAL) -> None:
        """Find the other ranks, once: from now on `store` is one that they share. Alone there is nobody to find.

        limit: seconds to wait for them; those missing are named earlier, once. Errors: they have not come by then;
        `Ended`, when one of them has ended meanwhile.
        """
        launch = self.launch
        if launch.world_size == 1 or self.pulse.joined:
            return
        address, port = launch.address, launch.port
        if not launch.serves:
            wait_for_port(launch, limit=limit)
        patience = timedelta(seconds=limit)
        stores = [
            dist.TCPStore(
                address, port, is_master=launch.serves, timeout=patience, wait_for_workers=False, multi_tenant=True
            )
            for _ in range(2)
        ]
        lifelines = Lifelines()
        self.pulse.meet(lifelines)
        session, hosts = find_each_other(stores[0], launch, lifelines, limit=limit)
        self.pulse.join(dist.PrefixStore(session, stores[1]), lifelines, hosts)
        self.store = dist.PrefixStore(session, stores[0])


def run_job(main: Callable[[Job], None]) -> None:
    """Run a script's `main` as one process of a job; of several processes one tells what ended it."""
    print_all_characters()
    try:
        launch = read_launch()
    except UserError as error:
        raise SystemExit(tell(error)) from None
    job = Job(launch, watched=True)
    try:
        main(job)
    except BaseException as error:
        if launch.world_size > 1:
            _end_together(job, error)
        code, message = verdict(error)
        job.pulse.notify(EXIT_UNFINISHED if code is None else code, message or _first_line(error))
        job.pulse.close()
        if _told(error) is None:
            raise
        raise SystemExit(launch.stopped_code if isinstance(error, StoppedEarly) else code) from None
    job.pulse.close()


def _end_together(job: Job, error: BaseException) -> NoReturn:
    """End this process and with it the job. Only the rank whose error came first tells of it."""
    launch, pulse = job.launch, job.pulse
    if isinstance(error, Ended):
        pulse.give_way(error.cause)
    code, message = verdict(error)
    if isinstance(error, (StoppedEarly, SystemExit)):  # all ranks alike
        if launch.rank == 0:
            _told(error)
        pulse.close()
        own = error.code if isinstance(error, SystemExit) else launch.stopped_code
        pulse.leave(own if isinstance(own, int) else 0, message)
    if not pulse.joined and launch.local_rank != 0:
        # Most likely the first rank of this host has made the same mistake, and the launcher now ends this one.
        time.sleep(pulse_of_job.CONSEQUENCE)
    text = message.removeprefix("error: ") or _first_line(error)
    code = EXIT_UNFINISHED if code is None else code
    ends_already = pulse.ends(wait=0.0)  # perhaps by a hang that this rank's watch found: then this error came of that
    cause = pulse.fail(text, code, consequence=is_consequence(error))
    if cause.rank != launch.rank or (ends_already and cause.late):
        if cause.text == text:  # a mistake that every rank has found
            pulse.leave(code, text)
        pulse.follow(cause)
    trace = "".join(traceback.format_exception(error)) if message == "" else ""
    tell_text(f"{launch.who} failed:\n{trace}" if trace else message)
    pulse.leave(code, text)


def _allow_many_files() -> None:
    """Raise the limit of open files as far as the system lets this process.

    Rank 0 holds a connection to every rank, and gloo aborts its process when it cannot accept one, be it a stranger's.
    """
    if sys.platform != "win32":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(OSError, ValueError):  # macOS calls a limit infinite that the kernel does not accept
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _told(error: BaseException) -> int | None:
    """As `errors.tell`; a stderr that nobody reads any more changes no exit code."""
    with suppress(OSError, ValueError):
        return tell(error)
    return verdict(error)[0]


def _first_line(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip().splitlines()[0]


def _never() -> bool:
    return False
