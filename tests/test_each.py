"""Shard after shard: results in order, each as soon as it is there, and how far it is is told."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import pytest
from rich.console import Console

from pipeline.data.deleting import each
from pipeline.data.deleting.each import run_each
from pipeline.data.preparing.executors import InThisProcess

PLACES = {"here": None, "at once": InThisProcess(), "threads": ThreadPoolExecutor(2)}


@pytest.mark.parametrize("place", PLACES)
def test_results_come_in_order_and_lines_say_how_far_it_is(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr(each, "LINE_SECONDS", 0)
    stream = io.StringIO()
    tasks = ((10**6 * number, number) for number in range(1, 5))
    found = run_each(PLACES[place], lambda n: n * n, tasks, what="squares", total=10 * 10**6,
                     console=Console(file=stream, soft_wrap=True))  # fmt: skip
    assert list(found) == [1, 4, 9, 16]
    lines = stream.getvalue().splitlines()
    done = [f"squares: {number} of 10 MB of text" for number in (1, 3, 6, 10)]
    assert [line.split(",")[0] for line in lines] == done
    assert all(line.endswith(" MB/s") for line in lines)


def test_lines_are_rare_and_a_terminal_has_none() -> None:
    for terminal in (False, True):
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=terminal, soft_wrap=True)
        assert list(run_each(None, str, [(1, 2)], what="work", total=1, console=console)) == ["2"]
        assert "of text" not in stream.getvalue()
        assert ("work" in stream.getvalue()) == terminal, "the bar"


@pytest.mark.parametrize("executor", [None, InThisProcess()])
def test_a_result_is_there_before_the_next_task_is_begun(executor: Executor | None) -> None:
    """Else nothing would be told before the end."""
    begun: list[int] = []

    def tasks() -> Iterator[tuple[int, int]]:
        for number in range(3):
            begun.append(number)
            yield 1, number

    results = run_each(executor, abs, tasks(), what="", total=3, console=Console(quiet=True))
    assert next(results) == 0
    assert begun == [0]
    assert list(results) == [1, 2]
