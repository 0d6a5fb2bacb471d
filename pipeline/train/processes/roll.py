"""How the ranks of a job find each other: rank 0 opens a session, the others answer it.

In: a store that may be older than this start of the ranks, for torchrun's agent keeps its own over restarts. Out: the
name of a session that no earlier start has written to, with a connection from each rank to rank 0. The connection comes
before the answer, so a rank that dies, fails or is stopped while others are still waited for is missed, and ends them.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import torch.distributed as dist

from pipeline.errors import UserError
from pipeline.train.processes.board import TICK
from pipeline.train.processes.ending import NOBODY, Ended, Ending, ending_of, tell
from pipeline.train.processes.launched import Launch
from pipeline.train.processes.lifeline import Lifelines
from pipeline.train.processes.pulse import GRACE, SHOWN

AGENT = 15.0  # seconds in which the store of torchrun's agent has to take a connection
NOTICE = 60.0  # seconds after which ranks that have not come are named
BETWEEN = 0.05  # seconds between looks for them


def find_each_other(store: dist.Store, launch: Launch, lifelines: Lifelines, *, limit: float) -> tuple[str, list[str]]:
    """The session, and the hosts by rank: of all in rank 0, else of rank 0 alone.

    Errors: some have not come within `limit` seconds; `Ended`, when one has ended meanwhile.
    """
    try:
        if launch.rank == 0:
            return _Roll(store, launch, lifelines).call(limit)
        return _answer(store, launch, lifelines, limit)
    except dist.DistError:
        raise Ended(_without_store(launch, lifelines)) from None


def wait_for_port(launch: Launch, *, limit: float) -> None:
    """Wait until rank 0 serves the store: it may still be starting. torchrun's own is there before its ranks are.

    Raises UserError if rank 0 does not come within `limit` seconds, `Ended` if torchrun's store is gone.
    """
    began, told = time.monotonic(), False
    limit = min(limit, AGENT) if launch.agent_store else limit
    while True:
        try:
            socket.create_connection((launch.address, launch.port), timeout=10).close()
        except OSError as error:
            waited = time.monotonic() - began
            if waited > limit and launch.agent_store:
                raise Ended(_without_agent(launch)) from None
            if waited > limit:
                raise UserError(
                    f"rank 0 was not found at {launch.address}:{launch.port} within {waited:.0f} s: {error}; look at "
                    "MASTER_ADDR and MASTER_PORT, and whether rank 0 has started"
                ) from None
            if waited > NOTICE and not told and launch.local_rank == 0:
                told = True
                tell(f"rank {launch.rank} waits for rank 0 at {launch.address}:{launch.port}: {error}")
            time.sleep(BETWEEN)
        else:
            return


class _Roll:
    """Rank 0's list: who has come, and whether one of them has ended since.

    A reply repeats a word that only this start of a rank knows, so that none takes one to an earlier start for its own.
    """

    def __init__(self, store: dist.Store, launch: Launch, lifelines: Lifelines) -> None:
        self._store, self._launch, self._lifelines = store, launch, lifelines
        self._session = uuid4().hex
        self._waited_for = list(range(1, launch.world_size))
        self._answers: dict[int, dict[str, Any]] = {}
        self._replied: set[int] = set()
        self._ended: Ending | None = None
        self._ended_at = 0.0

    def call(self, limit: float) -> tuple[str, list[str]]:
        """Name the session, wait for all, then reply to each. One that comes after the end is told so, for a while."""
        launch, began, told, refused = self._launch, time.monotonic(), False, ""
        endpoint = self._lifelines.serve(launch)
        self._store.set("session", json.dumps({"session": self._session, "host": launch.host, **endpoint}))
        while self._waited_for and not refused:
            self._look()
            waited = time.monotonic() - began
            text = _missing(launch, self._waited_for, waited)
            if waited > NOTICE and not told and text:
                told = True
                tell(text)
            if self._ended is not None:
                limit = min(limit, self._ended_at - began + NOTICE)
                self._reply()
            refused = text if waited > limit else ""
        self._reply(refused=refused)
        if refused or self._ended:
            time.sleep(GRACE)  # a store in this process serves the reply
        if self._ended is not None:
            raise Ended(self._ended)
        if refused:
            raise UserError(refused)
        self._lifelines.all_have_come()
        return self._session, [launch.host, *(self._answers[rank]["host"] for rank in range(1, launch.world_size))]

    def _look(self) -> None:
        """Who has come, and who is gone again."""
        for rank in self._lifelines.lost(BETWEEN):
            words, host = self._lifelines.words.get(rank, b""), self._answers.get(rank, {}).get("host", "its host")
            if self._ended is None:
                self._ended, self._ended_at = ending_of(rank, host, words=words, by=0), time.monotonic()
            self._waited_for = [other for other in self._waited_for if other != rank]
        for rank in list(self._waited_for):
            if rank not in self._answers and self._store.check([f"{self._session}/here/{rank}"]):
                self._answers[rank] = json.loads(self._store.get(f"{self._session}/here/{rank}"))
            answer = self._answers.get(rank)
            if answer is not None and (self._lifelines.has(rank) or not answer["connected"]):
                self._waited_for.remove(rank)

    def _reply(self, *, refused: str = "") -> None:
        ended = "" if self._ended is None else self._ended.written()
        for rank in self._answers.keys() - self._replied:
            reply = {"word": self._answers[rank]["word"], "refused": refused, "ended": ended}
            self._store.set(f"{self._session}/reply/{rank}", json.dumps(reply))
            self._replied.add(rank)


def _answer(store: dist.Store, launch: Launch, lifelines: Lifelines, limit: float) -> tuple[str, list[str]]:
    """Every other rank: answer each session that there is, until the rank 0 of one has replied to this start."""
    word, until, session, warning = uuid4().hex, time.monotonic() + limit + 2 * GRACE, "", ""
    while time.monotonic() < until:
        if lifelines.lost(BETWEEN) and lifelines.words.get(0):
            raise Ended(ending_of(0, "its host", words=lifelines.words[0], by=launch.rank))
        found: dict[str, Any] = json.loads(store.get("session")) if store.check(["session"]) else {"session": ""}
        if found["session"] != session:
            session = found["session"]
            warning = _connect(lifelines, launch, found)
            answer = {"word": word, "host": launch.host, "connected": not warning}
            store.set(f"{session}/here/{launch.rank}", json.dumps(answer))
        if not session or not store.check([f"{session}/reply/{launch.rank}"]):
            continue
        reply = json.loads(store.get(f"{session}/reply/{launch.rank}"))
        if reply["word"] != word:
            continue  # to an earlier start of this rank
        if reply["ended"]:
            raise Ended(Ending.read(reply["ended"]))
        if reply["refused"]:
            raise UserError(reply["refused"])
        if warning:
            tell(warning)
        return session, [found["host"]]
    raise UserError(_missing(launch, [0], limit))


def _connect(lifelines: Lifelines, launch: Launch, found: dict[str, Any]) -> str:
    """Connect to rank 0; or why not: a firewall, or the session is an earlier start's and another one follows."""
    try:
        lifelines.connect(found["address"], found["port"], rank=launch.rank, secret=found["secret"])
    except OSError as error:
        return f"warning: {launch.who} has no connection to rank 0, so that a kill may be noticed late: {error}"
    return ""


def _missing(launch: Launch, ranks: Sequence[int], waited: float) -> str:
    if not ranks:
        return ""
    names = ", ".join(str(rank) for rank in ranks[:SHOWN])
    more = ", ..." if len(ranks) > SHOWN else ""
    return (
        f"{len(ranks)} of {launch.world_size} ranks have not come within {waited:.0f} s: {names}{more}; look at what "
        "the launcher says of them"
    )


def _without_store(launch: Launch, lifelines: Lifelines) -> Ending:
    """Why what serves the store is gone: rank 0 with its last words, if it had any, or torchrun's agent."""
    if launch.agent_store or launch.rank == 0:
        return _without_agent(launch)
    lifelines.lost(TICK)
    return ending_of(0, launch.address, words=lifelines.words.get(0, b""), by=launch.rank)


def _without_agent(launch: Launch) -> Ending:
    text = f"what served the store of the job at {launch.address}:{launch.port} is gone"
    return Ending(NOBODY, "", text, launch.rank)
