"""What the ranks of a job tell one another: how far each has come, and why the job ends.

In: a client of the store that they share. Out: the ending that a rank has told, and the beats of all. A thread of its
own asks the store: one whose host has stopped without closing its connections (halted, or without power) answers
nothing for ever, and must hold up nobody but this thread.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

import torch.distributed as dist

from pipeline.train.processes.ending import Ending
from pipeline.train.processes.launched import Launch

TICK = 1.0  # seconds between looks at the other ranks

_Request = tuple[Callable[[], Any], "SimpleQueue[Any]"]


class Board:
    """The store, read once per tick. `store`: a client that nobody else uses. beat: what this rank says of itself."""

    def __init__(self, store: dist.Store, launch: Launch, *, beat: Callable[[], dict[str, Any]]) -> None:
        self.ending: Ending | None = None  # that some rank has told
        self.lost = False  # what serves the store is gone
        self.answers = 0  # the store's, as long as it has any
        self._store, self._launch, self._beat = store, launch, beat
        self._published = ""
        self._requests: SimpleQueue[_Request | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._ask_on, name="board", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def claim(self, own: Ending, *, wait: float) -> Ending:
        """Make `own` the cause that every rank is told, unless there is one already; the cause.

        wait: seconds for the store to answer; it is `own` if it does not.
        """
        return self._ask(lambda: self._claim(own), wait) or self.ending or own

    def beats(self, *, wait: float) -> dict[int, dict[str, Any]]:
        """What each rank has said of itself; nothing when the store does not answer in time."""
        found: dict[int, dict[str, Any]] | None = self._ask(self._beats, wait)
        return found or {}

    def close(self) -> None:
        """Ask no more: the store is about to go."""
        if self._thread.is_alive():
            self._requests.put(None)
            self._thread.join(5 * TICK)

    def _ask(self, act: Callable[[], Any], wait: float) -> Any:
        answer: SimpleQueue[Any] = SimpleQueue()
        self._requests.put((act, answer))
        try:
            return answer.get(timeout=max(wait, 0.0))
        except Empty:
            return None

    # What the thread does

    def _ask_on(self) -> None:
        while (request := self._next()) is not None:
            act, answer = request
            try:
                found = act()
            except dist.DistError:
                found, self.lost = None, True
            else:
                self.answers += 1
            answer.put(found)

    def _next(self) -> _Request | None:
        try:
            return self._requests.get(timeout=TICK)
        except Empty:
            return self._look, SimpleQueue()

    def _look(self) -> None:
        self._publish()
        if self.ending is None and self._store.check(["ending"]):
            self.ending = Ending.read(self._store.get("ending"))

    def _publish(self) -> None:
        beat = json.dumps(self._beat())
        if beat != self._published:
            self._store.set(f"beat/{self._launch.rank}", beat)
            self._published = beat

    def _claim(self, own: Ending) -> Ending:
        self.ending = Ending.read(self._store.compare_set("ending", "", own.written()))
        return self.ending

    def _beats(self) -> dict[int, dict[str, Any]]:
        self._publish()
        world = range(self._launch.world_size)
        told = {rank: self._store.get(f"beat/{rank}") for rank in world if self._store.check([f"beat/{rank}"])}
        return {rank: json.loads(text) for rank, text in told.items()}
