"""The progress bar of a preparation, shown on a terminal only.

In: batches and units as they are finished. Out: text bytes a second, tokens a second, time left, drops.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn, TransferSpeedColumn

from pipeline.data.preparing.unit import UnitReport


class UnitProgress:
    """Counts expected bytes of text, of which `total` are to do, and corrects itself at the end of each unit."""

    def __init__(self, console: Console, *, total: int) -> None:
        self._finished = 0
        self._progress = Progress(
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
        self._task = self._progress.add_task("", total=total, rate="-", drops=0)
        self._tokens = self._counted = self._drops = 0

    def __enter__(self) -> Self:
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Remove the bar."""
        self._progress.stop()

    def on_batch(self, text_bytes: int, tokens: int) -> None:
        """Part of a unit was written."""
        if self._progress.disable:  # not free, and asked for many times a second
            return
        self._counted += tokens
        self._progress.advance(self._task, text_bytes)
        self._show(self._tokens + self._counted)

    def on_unit(self, report: UnitReport, *, size: int) -> None:
        """A unit of an expected `size` was committed."""
        self._finished += size
        self._tokens, self._counted = self._tokens + report.tokens, 0
        self._drops += report.dropped
        self._progress.update(self._task, completed=self._finished)
        self._show(self._tokens)

    def _show(self, tokens: int) -> None:
        seconds = self._progress.tasks[0].elapsed or 0.0
        rate = f"{tokens / seconds:,.0f}" if seconds > 0 else "-"
        self._progress.update(self._task, rate=rate, drops=self._drops)
