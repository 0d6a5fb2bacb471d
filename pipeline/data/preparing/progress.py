"""How far a preparation is: a bar on a terminal, a line every half minute elsewhere (a log, a pipe, a batch job).

In: batches and units as they are finished. Out: share done, text bytes and tokens a second, time left, drops.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn, TransferSpeedColumn

from pipeline.data.preparing.unit import UnitReport
from pipeline.errors import duration, sized

INTERVAL = 30.0
"""Seconds between lines where there is no terminal."""


class UnitProgress:
    """Counts expected bytes of text, of which `total` are to do, and corrects itself at the end of each unit."""

    def __init__(self, console: Console, *, total: int) -> None:
        self._console, self._total = console, total
        self._began = time.monotonic()
        self._committed = self._bytes = 0  # of text: in committed units; with the batches of the one at work
        self._committed_tokens = self._tokens = self._drops = 0
        self._bar = Progress(
            TextColumn("preparing"),
            BarColumn(),
            TransferSpeedColumn(),
            TextColumn("{task.fields[rate]} tokens/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[drops]} dropped"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=total, rate="-", drops=0)
        self._ended = threading.Event()
        self._lines = threading.Thread(target=self._print_lines, daemon=True)

    def __enter__(self) -> Self:
        """Begin to show it."""
        self._bar.start()
        if self._bar.disable:
            self._lines.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Remove the bar, or end the lines."""
        self._ended.set()
        if self._lines.is_alive():
            self._lines.join()
        self._bar.stop()

    def on_batch(self, text_bytes: int, tokens: int) -> None:
        """Part of a unit was written."""
        self._bytes += text_bytes
        self._tokens += tokens
        self._show()

    def on_unit(self, report: UnitReport, *, size: int) -> None:
        """A unit of an expected `size` was committed."""
        self._committed += size
        self._committed_tokens += report.tokens
        self._bytes, self._tokens = self._committed, self._committed_tokens
        self._drops += report.dropped
        self._show()

    def line(self) -> str:
        """What there is to say now, in words."""
        seconds = time.monotonic() - self._began
        done = min(self._bytes / self._total, 1.0) if self._total else 0.0
        left = f", {duration(seconds * (1 - done) / done)} left" if done else ""
        return (
            f"preparing: {done:.0%}, {sized(self._bytes)} of {sized(self._total)} of text, {self._rate(seconds)} "
            f"tokens/s, {duration(seconds)} so far{left}, {self._drops:,} dropped"
        )

    def _rate(self, seconds: float) -> str:
        return f"{self._tokens / seconds:,.0f}" if seconds > 0 else "-"

    def _show(self) -> None:
        if not self._bar.disable:  # not free, and asked for many times a second
            rate = self._rate(time.monotonic() - self._began)
            self._bar.update(self._task, completed=self._bytes, rate=rate, drops=self._drops)

    def _print_lines(self) -> None:
        while not self._ended.wait(INTERVAL):
            self._console.print(self.line(), markup=False)
