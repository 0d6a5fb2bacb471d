"""Work on one shard after the other, here or in other processes, and how far it is.

In: tasks with the bytes of text that each is about. Out: results in order; on a terminal a bar, else a line a minute.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future
from time import monotonic
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn, TransferSpeedColumn

from pipeline.errors import UserError

LINE_SECONDS = 60.0
Task = TypeVar("Task")
Result = TypeVar("Result")


def run_each(
    executor: Executor | None,
    work: Callable[[Task], Result],
    tasks: Iterable[tuple[int, Task]],
    *,
    what: str,
    total: int,
    console: Console,
) -> Iterator[Result]:
    """Results in the order of the tasks, each given with its size in bytes; without an executor they are done here.

    `what` names the work and `total` is the size of all of it, for the progress shown. Raises `UserError` when a worker
    dies.
    """
    began = shown = monotonic()
    done = 0
    bar = _bar(what, console)
    place = bar.add_task("", total=total)
    try:
        with bar:
            for size, result in _results(executor, work, tasks):
                done += size
                bar.advance(place, size)
                if not console.is_terminal and monotonic() - shown >= LINE_SECONDS:
                    shown = monotonic()
                    rate = done / 1e6 / max(shown - began, 1e-9)
                    line = f"{what}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB of text, {rate:,.1f} MB/s"
                    console.print(line, markup=False)
                yield result
    except Exception as error:
        if not isinstance(error, BrokenExecutor) and type(error).__name__ != "KilledWorker":  # Dask's
            raise
        raise UserError(
            "a worker process was killed, perhaps for lack of memory; the dataset is as it was before: "
            "run the same command again with fewer --workers"
        ) from None


def _results(
    executor: Executor | None, work: Callable[[Task], Result], tasks: Iterable[tuple[int, Task]]
) -> Iterator[tuple[int, Result]]:
    """(size, result) of each task. Of an executor that is done when it is asked, too, each as soon as it is there."""
    waiting: deque[tuple[int, Future[Result]]] = deque()
    try:
        for size, task in tasks:
            if executor is None:
                yield size, work(task)
                continue
            waiting.append((size, executor.submit(work, task)))
            while waiting and waiting[0][1].done():
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def _bar(what: str, console: Console) -> Progress:
    return Progress(
        TextColumn(what),
        BarColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
