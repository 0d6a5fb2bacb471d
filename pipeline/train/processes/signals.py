"""Signals that ask a run to stop, and its time limit.

In: SIGINT, SIGTERM, SIGUSR1, a number of minutes. Out: a flag that the ranks agree on in each step, so that a stopped
run has saved its last finished step.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

ECHO = 1.0  # seconds in which a signal repeats the one before: a launcher and a terminal may both send it

# SIGUSR1 is how clusters ask early: it is followed by SIGTERM when time is up, which then is no second one.
_POLITE = getattr(signal, "SIGUSR1", None)  # Windows has none
_STOPS = tuple(number for number in (signal.SIGINT, signal.SIGTERM, _POLITE) if number is not None)


class StopSignal:
    """Remembers that the run shall stop, until the loop looks: a signal came, or its time is up.

    Before `arm` there is nothing to save: a signal calls `at_once`. Afterwards the first is remembered and gets an
    `answer`, and a second SIGINT or SIGTERM ends the process at once: `end` gets its exit code and why. A thread hears
    of signals through a socket that C writes to, so that it also learns of those that come while the main thread is in
    C: compiling, or waiting for another rank. It waits for nothing else: an echo that it heard late would be a second.
    """

    def __init__(
        self, *, at_once: Callable[[str], None], answer: Callable[[str], None], end: Callable[[int, str], None]
    ) -> None:
        self.reason = ""
        self.deadline = math.inf
        self._at_once = at_once
        self._answer = answer
        self._end = end
        self._armed = False
        self._began = self._warned_at = time.monotonic()
        self._first = math.inf  # when the first signal came that a second one may follow
        self._ear, mouth = socket.socketpair()
        mouth.setblocking(False)
        self._mouth = mouth  # kept open
        for number in _STOPS:
            signal.signal(number, self._remember)
        signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_forget)  # a forked child must not stop its parent
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def __call__(self) -> bool:
        """Whether the run shall stop."""
        if not self.reason and time.monotonic() > self.deadline:
            self.reason = "train.max_minutes"
        return bool(self.reason)

    def arm(self) -> None:
        """A step is done: from here on a signal means to save first."""
        self._armed = True

    def within(self, minutes: float) -> None:
        """Stop when the process is so old."""
        self.deadline = self._began + 60 * minutes

    def _listen(self) -> None:
        while numbers := self._ear.recv(64):
            for number in numbers:
                if number in _STOPS:
                    self._hear(number)

    def _hear(self, number: int) -> None:
        name = signal.Signals(number).name
        if not self._armed:
            self._at_once(name)
            return
        now = time.monotonic()
        if now - self._first > ECHO and number != _POLITE:
            text = f"{name} for the second time: ending at once"
            with suppress(OSError):
                os.write(2, f"{text}\n".encode())
            self._end(128 + number, text)
        first, self.reason = not self.reason, self.reason or name
        if number != _POLITE:
            self._first = min(self._first, now)
        if first:
            text = f"{name}: stopping after this step; a second signal ends the process at once"
            threading.Thread(target=self._answer, args=(text,), name="answer", daemon=True).start()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        """Python's own handler; without one the socket would hear nothing."""


def _forget() -> None:
    """In a forked child: signals do what they do to any process."""
    if threading.current_thread() is not threading.main_thread():
        return
    signal.set_wakeup_fd(-1)
    for number in _STOPS:
        signal.signal(number, signal.SIG_DFL)
