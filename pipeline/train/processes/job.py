"""One job of one or many processes: found together, ended together, its failure told once.

In: a script's `main`. Out: its exit code (see `errors.py`). Each process makes a `Job` first of all, so that signals
are heard and a fault in start-up ends the others, too.
"""

from __future__ import annotations

import faulthandler
import json
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn
from uuid import uuid4

import torch.distributed as dist

from pipeline.errors import EXIT_UNFINISHED, StoppedEarly, UserError, tell, verdict
from pipeline.train.processes import pulse as pulse_of_job
from pipeline.train.processes.launched import Launch, read_launch
from pipeline.train.processes.lifeline import Lifelines
from pipeline.train.processes.pulse import STDERR, Pulse, is_consequence
from pipeline.train.processes.signals import StopSignal

NOTICE = 60.0  # seconds after which ranks that have not come are named
AGAIN = "run the same command again to go on"
BETWEEN = 0.05  # seconds between looks for them


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
            self.signal = StopSignal(at_once=self._stop_at_once, answer=self._answer)
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
        if self.launch.local_rank == 0 and not self.pulse.ends(within=pulse_of_job.GRACE):
            pulse_of_job.tell(text)

    def steady(self) -> None:
        """The first step is done: from now on there is something to save, and steps take their usual time."""
        self.pulse.steady()
        if self.signal is not None:
            self.signal.arm()

    def once(self, what: str) -> bool:
        """True the first time that this is asked of `what`."""
        said, self._said = what in self._said, self._said | {what}
        return not said

    def assemble(self, *, limit: float) -> None:
        """Find the other ranks: from now on `store` is one that they share.

        limit: seconds to wait for them; those missing are named earlier, once. Errors: they have not come by then.
        """
        launch = self.launch
        address, port = launch.address, launch.port
        if not launch.serves:
            _wait_for_port(launch, limit=limit)
        patience = timedelta(seconds=limit)
        stores = [
            dist.TCPStore(
                address, port, is_master=launch.serves, timeout=patience, wait_for_workers=False, multi_tenant=True
            )
            for _ in range(2)
        ]
        lifelines = Lifelines()
        roll = _call_roll if launch.rank == 0 else _answer_roll
        session, hosts = roll(stores[0], launch, lifelines, limit)
        self.pulse.join(dist.PrefixStore(session, stores[1]), lifelines, hosts)
        self.store = dist.PrefixStore(session, stores[0])


def run_job(main: Callable[[Job], None]) -> None:
    """Run a script's `main` as one process of a job; of several processes one tells what ended it."""
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
        if tell(error) is None:
            raise
        raise SystemExit(launch.stopped_code if isinstance(error, StoppedEarly) else code) from None
    job.pulse.close()


def _end_together(job: Job, error: BaseException) -> NoReturn:
    """End this process and with it the job. Only the rank whose error came first tells of it."""
    launch, pulse = job.launch, job.pulse
    code, message = verdict(error)
    if isinstance(error, (StoppedEarly, SystemExit)):  # all ranks alike
        if launch.rank == 0:
            tell(error)
        pulse.close()
        own = error.code if isinstance(error, SystemExit) else launch.stopped_code
        pulse.leave(own if isinstance(own, int) else 0, message)
    if not pulse.joined and launch.local_rank != 0:
        # Most likely the first rank of this host has made the same mistake, and the launcher now ends this one.
        time.sleep(pulse_of_job.CONSEQUENCE)
    text = message.removeprefix("error: ") or _first_line(error)
    code = EXIT_UNFINISHED if code is None else code
    cause = pulse.fail(text, code, consequence=is_consequence(error))
    if cause.rank != launch.rank:
        if cause.text == text:  # a mistake that every rank has found
            pulse.leave(code, text)
        pulse.follow(cause)
    trace = "".join(traceback.format_exception(error)) if message == "" else ""
    pulse_of_job.tell(f"{launch.who} failed:\n{trace}" if trace else message)
    pulse.leave(code, text)


def _first_line(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip().splitlines()[0]


def _never() -> bool:
    return False


def _wait_for_port(launch: Launch, *, limit: float) -> None:
    """Wait until rank 0 serves the store: it may still be starting."""
    began, told = time.monotonic(), False
    while True:
        try:
            socket.create_connection((launch.address, launch.port), timeout=10).close()
        except OSError as error:
            waited = time.monotonic() - began
            if waited > limit:
                raise UserError(
                    f"rank 0 was not found at {launch.address}:{launch.port} within {waited:.0f} s: {error}; look at "
                    "MASTER_ADDR and MASTER_PORT, and whether rank 0 has started"
                ) from None
            if waited > NOTICE and not told and launch.local_rank == 0:
                told = True
                pulse_of_job.tell(f"rank {launch.rank} waits for rank 0 at {launch.address}:{launch.port}: {error}")
            time.sleep(BETWEEN)
        else:
            return


def _call_roll(store: dist.Store, launch: Launch, lifelines: Lifelines, limit: float) -> tuple[str, list[str]]:
    """Rank 0: name the session, wait for all to answer, then reply to each; (session, hosts by rank).

    The store of torchrun's agent outlives the processes that it starts again. So a session has a name of its own, and
    a reply repeats a word that only this start of a rank knows.
    """
    session = uuid4().hex
    store.set(
        "session", json.dumps({"session": session, "port": lifelines.serve(launch.world_size), "host": launch.host})
    )
    answers: dict[int, Any] = {}
    began, told, refused = time.monotonic(), False, ""
    while not refused and (missing := [rank for rank in range(1, launch.world_size) if rank not in answers]):
        time.sleep(BETWEEN)
        for rank in missing:
            if store.check([f"{session}/here/{rank}"]):
                answers[rank] = json.loads(store.get(f"{session}/here/{rank}"))
        waited = time.monotonic() - began
        text = _missing(launch, [rank for rank in missing if rank not in answers], waited)
        if waited > NOTICE and not told and text:
            told = True
            pulse_of_job.tell(text)
        refused = text if waited > limit else ""
    for rank, answer in answers.items():
        store.set(f"{session}/reply/{rank}", json.dumps({"word": answer["word"], "refused": refused}))
    if refused:
        time.sleep(pulse_of_job.GRACE)  # a store in this process serves the reply
        raise UserError(refused)
    return session, [launch.host, *(answers[rank]["host"] for rank in range(1, launch.world_size))]


def _missing(launch: Launch, ranks: Sequence[int], waited: float) -> str:
    if not ranks:
        return ""
    names = ", ".join(str(rank) for rank in ranks[: pulse_of_job.SHOWN])
    more = ", ..." if len(ranks) > pulse_of_job.SHOWN else ""
    return (
        f"{len(ranks)} of {launch.world_size} ranks have not come within {waited:.0f} s: {names}{more}; look at what "
        "the launcher says of them"
    )


def _answer_roll(store: dist.Store, launch: Launch, lifelines: Lifelines, limit: float) -> tuple[str, list[str]]:
    """Every other rank: answer until rank 0 has replied to this start of it; (session, [host of rank 0])."""
    word, began, answered = uuid4().hex, time.monotonic(), ""
    while time.monotonic() - began < limit + 2 * pulse_of_job.GRACE:
        time.sleep(BETWEEN)
        found: dict[str, Any] = json.loads(store.get("session")) if store.check(["session"]) else {"session": ""}
        session = found["session"]
        if session != answered:
            store.set(f"{session}/here/{launch.rank}", json.dumps({"word": word, "host": launch.host}))
            answered = session
        if not session or not store.check([f"{session}/reply/{launch.rank}"]):
            continue
        reply = json.loads(store.get(f"{session}/reply/{launch.rank}"))
        if reply["word"] != word:
            continue  # to an earlier start of this rank
        if reply["refused"]:
            raise UserError(reply["refused"])
        try:
            lifelines.connect(launch.address, found["port"], rank=launch.rank)
        except OSError as error:
            pulse_of_job.tell(f"warning: no connection to rank 0, so that a kill may be noticed late: {error}")
        return session, [found["host"]]
    raise UserError(_missing(launch, [0], limit))
