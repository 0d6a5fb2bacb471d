"""Whether the job lives: how far each process has come, and why all of them end when one does.

In: beats of the main thread. Out: nothing, until a rank fails, dies or makes no progress: then every process ends
within seconds, and the cause is told once, by the rank that it happened to. A thread does the watching, so it goes on
while the main thread is held up in a collective operation for a rank that will not come. It never asks the store of the
job itself, which may not answer: that is what the `Board` is for.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from pipeline.errors import EXIT_HUNG, EXIT_STOPPED, UserError
from pipeline.train.processes.board import TICK, Board
from pipeline.train.processes.ending import (
    GONE,
    NOBODY,
    WRITING,
    Ending,
    ending_of,
    flush_streams,
    hand_over,
    orphaned,
    tell,
    within,
)
from pipeline.train.processes.launched import Launch
from pipeline.train.processes.lifeline import Lifelines

GRACE = 1.5  # the rank that failed ends first: torchrun reports the first. More than a tick: by then all have seen why
CONSEQUENCE = 3.0  # so long an error that comes of another rank's end waits for that rank's own account
SILENCE = 25.0  # so long the store may not answer. More than a lifeline takes to find that a machine has vanished
AT_LAST = 60.0  # more than a main thread takes that is ending this process by itself
PATIENCE = 6.0  # start-up, compiling and saving may take so many times the limit of a step
STDERR = 2  # the descriptor: C writes to it, whatever sys.stderr is
SHOWN = 8  # ranks named in a message

# What the libraries say in this rank when the fault lies in another one.
_MARKS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "connection refused", "broken pipe")


class Elsewhere(UserError):  # noqa: N818 - a pointer to an error
    """The cause lies in another rank, which tells more than this one can."""


class Pulse:
    """Beats of this process and, after `join`, of its job.

    limit: seconds without a beat before the job is taken to hang. stacks: folder for what each rank was doing then.
    on_end: called in rank 0 with the exit code of what failed and the cause, before it ends without success.
    """

    def __init__(self, launch: Launch, *, limit: float = 600.0) -> None:
        self.launch = launch
        self.limit = limit
        self.stacks: Path | None = None
        self.on_end: Callable[[int, str], None] | None = None
        self._count, self._what = 0, "start-up"  # beats that every rank makes alike
        self._signs, self._seen, self._idle = 0, 0, 0.0  # any sign of life, those seen, seconds since then
        self._starting, self._unhurried = True, 0
        self._told = False
        self._main = threading.main_thread().ident
        self._leaving = threading.Lock()  # never let go: one thread alone ends this process
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._board: Board | None = None
        self._heard, self._silent = 0, 0.0  # answers of the store, seconds since the last
        self._found: Ending | None = None  # why the job ends, as this rank alone knows
        self._lifelines: Lifelines | None = None
        self._hosts: list[str] = [launch.host]

    # What the main thread says

    def beat(self, what: str) -> None:
        """So far has the main thread come: every rank says the same number of times, so that the late one is known."""
        self._what = what
        self._count += 1
        self._signs += 1

    @contextmanager
    def unhurried(self, what: str) -> Iterator[None]:
        """A phase that may take `PATIENCE` times as long as a step: compiling, saving. Of no rank or of any."""
        self._unhurried += 1
        before, self._what = self._what, what
        self._signs += 1
        try:
            yield
        finally:
            self._unhurried -= 1
            self._what = before
            self._signs += 1

    def steady(self) -> None:
        """The first step is done: from now on the limit of a step holds."""
        self._starting = False

    def start(self) -> None:
        """Watch from a thread of its own."""
        self._thread = threading.Thread(target=self._watch, name="pulse", daemon=True)
        self._thread.start()

    def meet(self, lifelines: Lifelines) -> None:
        """The ranks are about to find each other: whoever is connected hears why this one ends, if it does."""
        self._lifelines = lifelines

    def join(self, store: dist.Store, lifelines: Lifelines, hosts: list[str]) -> None:
        """Watch the other ranks, too. `store`: a client of its own, for a waiting one would hold up the board."""
        self._hosts = hosts
        self._lifelines = lifelines
        self._board = Board(store, self.launch, beat=self._beat)
        if self._thread is not None:
            self._board.start()

    @property
    def joined(self) -> bool:
        """Whether the other ranks are watched, and can be told."""
        return self._board is not None

    def close(self) -> None:
        """The job is done: watch no more, and part from the other ranks."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(5 * TICK)
        if self._board is not None:
            self._board.close()
        if self._lifelines is not None:
            self._lifelines.part(wait=10.0 if self.launch.serves else 0.0)
            self._lifelines = None

    def fail(self, text: str, code: int, *, consequence: bool) -> Ending:
        """This rank's main thread has failed: the cause of the job's end, which is another one when `rank` differs.

        Does not return when this process is ending already.
        """
        self._leaving.acquire()
        own = Ending(self.launch.rank, self.launch.host, text, self.launch.rank, code)
        if consequence:
            self.ends(wait=CONSEQUENCE)
        return self._known or self._claim(own)

    def ends(self, *, wait: float) -> bool:
        """Whether a cause for the end of the job comes to be known within so many seconds; alone none does."""
        deadline = time.monotonic() + wait
        while self.joined and self._known is None and time.monotonic() < deadline:  # the thread asks
            time.sleep(TICK / 10)
        return self._known is not None

    def stop_at_once(self, text: str) -> None:
        """End the job because it was asked to before there was anything to lose; unless it ends already."""
        code = self.launch.stopped_code
        own = Ending(self.launch.rank, self.launch.host, text, self.launch.rank, code)
        cause = self._claim(own)
        if not cause.asked_for or not self._leaving.acquire(blocking=False):
            return  # the signal came because a rank has failed, and the watch ends this one
        if cause == own and (self.joined or self.launch.local_rank == 0):
            tell(text)
        self.leave(code, text)

    def give_way(self, cause: Ending) -> NoReturn:
        """End this process from its main thread because of another one."""
        self._leaving.acquire()
        self.follow(cause)

    def follow(self, cause: Ending) -> NoReturn:
        """End this process because of another one."""
        if not cause.asked_for and not self._told:
            who = f"{self.launch.who} ends because "
            alone = cause.late or cause.rank == NOBODY
            tell(
                who
                + (cause.text if alone else f"rank {cause.rank} on {cause.host} failed: {cause.text.splitlines()[0]}")
            )
        self.leave(cause.code if cause.asked_for else EXIT_HUNG, cause.text, cause=cause.code)

    def leave(self, code: int, text: str, *, cause: int | None = None) -> NoReturn:
        """End this process now, whatever its threads wait for: the process group must not be torn down in a fault.

        cause: the code of the rank that failed, where it is another one.
        """
        within(WRITING, lambda: self.notify(code if cause is None else cause, text))
        if self.launch.serves and self.joined and not self._closed.is_set():
            time.sleep(GRACE)  # until the others have heard why
        flush_streams()
        os._exit(code)

    def notify(self, code: int, text: str) -> None:
        """Have the end recorded; a stop has the same code under every launcher."""
        hand_over(self.launch.endings, EXIT_STOPPED if code == 0 else code)
        if self.on_end is not None and self.launch.rank == 0:
            try:
                self.on_end(EXIT_STOPPED if code == 0 else code, text)
            except Exception as error:  # whatever it is: this process must end, and with its own code
                tell(f"warning: how the run ended was not recorded: {error!r}")

    # What the thread does

    def _watch(self) -> None:
        try:
            self._keep_watch()
        except BaseException:  # whatever it is: without a watch this process might wait for ever
            tell(f"{self.launch.who} ends because its watch failed:\n{traceback.format_exc()}")
            os._exit(EXIT_HUNG)
        faulthandler.cancel_dump_traceback_later()

    def _keep_watch(self) -> None:
        last = time.monotonic()
        while not self._closed.is_set():
            self._rearm()
            lost = self._wait()
            now = time.monotonic()
            if self._closed.is_set():
                break
            self._watch_launcher()
            elapsed = min(now - last, 2 * TICK)  # a process that was halted has not been hanging
            self._watch_self(elapsed)
            if self._board is not None:
                self._watch_others(self._board, lost, elapsed)
            last = now

    def _rearm(self) -> None:
        """As long as this thread runs, it watches. When it cannot, the interpreter's lock is held, and C ends it."""
        faulthandler.dump_traceback_later(2 * PATIENCE * self.limit, exit=True, file=STDERR)

    def _wait(self) -> list[int]:
        if self._lifelines is not None and self.joined:  # before, the main thread looks at them
            return self._lifelines.lost(TICK)
        self._closed.wait(TICK)
        return []

    def _watch_launcher(self) -> None:
        """Without its torchrun this process would go on as an orphan that nobody knows of."""
        if self.launch.orphaned:
            self._found = self._known or self._claim(orphaned(self.launch))
            self._end(self._found)

    def _watch_self(self, elapsed: float) -> None:
        signs = self._signs
        self._idle = self._idle + elapsed if signs == self._seen else 0.0
        self._seen = signs
        patience = PATIENCE if self._starting or self._unhurried else 1.0
        if self._idle > self.limit * patience:
            self._hang()

    def _watch_others(self, board: Board, lost: list[int], elapsed: float) -> None:
        answers = board.answers
        self._silent = self._silent + elapsed if answers == self._heard else 0.0
        self._heard = answers
        if board.lost or (0 in lost and not self.launch.agent_store):
            self._end(self._without_store(lost))
        if self._known is None and lost:
            self._gone(lost[0])
        if self._known is None and self._silent > SILENCE:
            self._found = self._without_answers()
        if self._known is not None and (self._known.late or self._known.rank != self.launch.rank):
            self._end(self._known)

    @property
    def _known(self) -> Ending | None:
        """Why the job ends, as far as is known here."""
        return self._found or (None if self._board is None else self._board.ending)

    def _beat(self) -> dict[str, Any]:
        """What the others are to know of this rank."""
        where = _innermost(self._main) if self._idle > self.limit / 2 else ""
        return {"host": self.launch.host, "count": self._count, "what": self._what, "where": where}

    def _claim(self, own: Ending) -> Ending:
        """Make `own` the cause that every rank is told, unless there is one already; the cause."""
        if self._board is not None:
            return self._board.claim(own, wait=0.0 if self._board.lost else SILENCE - self._silent)
        if self._lifelines is not None:
            self._lifelines.say(own.written())
        return own

    def _gone(self, rank: int) -> None:
        own = self._lost(rank)
        self._found = self._claim(own)
        if self._found == own and own.text == GONE:
            self._told = True
            tell(f"error: rank {rank} on {own.host}: {GONE}")

    def _lost(self, rank: int) -> Ending:
        """Why a rank is gone whose connection has ended."""
        words = b"" if self._lifelines is None else self._lifelines.words.get(rank, b"")
        return ending_of(rank, self._host(rank), words=words, by=self.launch.rank)

    def _without_store(self, lost: list[int]) -> Ending:
        """Why the job ends when what serves its store is gone: rank 0, or torchrun's agent."""
        if self.launch.agent_store:
            lost = []  # whoever has ended since, ended for this
        elif not lost and self._lifelines is not None:
            lost = self._lifelines.lost(TICK)  # the end of rank 0 may be heard of a little later
        if self._known is None:
            where = f"{self.launch.address}:{self.launch.port}"
            nobody = Ending(NOBODY, "", f"what served the store of the job at {where} is gone", self.launch.rank)
            self._found = self._lost(lost[0]) if lost else nobody
        assert self._known is not None, "just found"
        return self._known

    def _without_answers(self) -> Ending:
        launch = self.launch
        server = "torchrun's agent" if launch.agent_store else "rank 0"
        return Ending(
            NOBODY, "", f"the store of the job at {launch.address}:{launch.port} has not answered for "
            f"{self._silent:.0f} s: {server} there is halted, its machine is down, or the network between", launch.rank,
        )  # fmt: skip

    def _hang(self) -> None:
        own = self._hanging()
        cause = self._claim(own)
        if cause == own:
            self._told = True
            tell(f"error: {own.text}")
        self._end(cause)

    def _hanging(self) -> Ending:
        """Name the ranks that have come least far."""
        waited = f"no progress for {self._idle:.0f} s (train.hang_minutes is {self.limit / 60:g})"
        beats = {} if self._board is None else self._board.beats(wait=SILENCE - self._silent)
        if not beats:  # alone, or none can be asked for
            launch, since = self.launch, f"{waited} since: {self._what}, {_innermost(self._main)}"
            return Ending(launch.rank, launch.host, since, launch.rank, late=(launch.rank,))
        world = range(self.launch.world_size)
        beats |= {rank: {"host": "its host", "count": -1} for rank in world if rank not in beats}
        least = min(beat["count"] for beat in beats.values())
        late = tuple(rank for rank in world if beats[rank]["count"] == least)
        lines = [f"    rank {rank} on {beats[rank]['host']}: {_described(beats[rank])}" for rank in late[:SHOWN]]
        others = [f"    rank {rank}: {_described(beats[rank])}" for rank in world if rank not in late][:SHOWN]
        what = "all ranks have come equally far" if not others else f"late: {', '.join(map(str, late[:SHOWN]))}"
        text = "\n".join([f"{waited}; {what}", *lines, *(["  the others:", *others] if others else [])])
        return Ending(late[0], beats[late[0]]["host"], text, self.launch.rank, late=late)

    def _host(self, rank: int) -> str:
        return self._hosts[rank] if rank < len(self._hosts) else "its host"

    def _end(self, cause: Ending) -> NoReturn:
        """End this process for `cause`, unless its main thread does so within the grace."""
        if cause.late:
            self._show_stacks(cause)
            cause = replace(cause, text=cause.text.splitlines()[0])
        time.sleep(GRACE)
        if not self._leaving.acquire(timeout=AT_LAST):
            os._exit(EXIT_HUNG)  # the main thread is ending this process, and is held up in it
        self.follow(cause)

    def _show_stacks(self, cause: Ending) -> None:
        """First to those who look on; the folder may lie on the file system that everything waits for."""
        rank = self.launch.rank
        if rank in cause.late[:SHOWN]:
            frame = sys._current_frames().get(self._main or 0)
            tell(f"{self.launch.who} is in:\n{''.join(traceback.format_stack(frame))}")
        if self.stacks is not None:
            file = self.stacks / f"rank-{rank}.txt"
            within(WRITING, lambda: _write_stacks(file))


def _write_stacks(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
    except OSError as error:
        tell(f"warning: {path} was not written: {error}")


def is_consequence(error: BaseException) -> bool:
    """Whether an error, or the one that it was raised from, may only say that another rank is gone.

    A user's mistake is its own account, whatever it was raised from.
    """
    if isinstance(error, (dist.DistError, Elsewhere)):
        return True
    if not isinstance(error, (RuntimeError, OSError)):
        return False
    cause = error.__cause__
    return any(mark in str(error).lower() for mark in _MARKS) or (cause is not None and is_consequence(cause))


def _innermost(thread: int | None) -> str:
    """The function that a thread is in."""
    frame = sys._current_frames().get(thread or 0)
    if frame is None:
        return ""
    return f"in {frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


def _described(beat: dict[str, Any]) -> str:
    return ", ".join(part for part in (beat.get("what", "not begun"), beat.get("where", "")) if part)
