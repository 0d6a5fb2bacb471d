"""The ranks of a job are compared with rank 0, and a job that does not fit together is refused by all of them."""

from __future__ import annotations

import io
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from rich.console import Console

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.train.meeting import _flat, _numbers, confer, table
from pipeline.train.processes.launched import Launch

FACTS = {"torch": "2.13", "code": "abc", "data": "d1", "train.steps": "12"}


def confer_of(
    facts: list[dict[str, str] | None],
    *,
    uuids: list[str] | None = None,
    hosts: list[str] | None = None,
    limit: float = 10,
) -> list[Any]:
    """What each rank got: who is present, or the error. None instead of facts: a rank that says nothing."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))
    world = len(facts)
    got: list[Any] = [None] * world

    def speak(rank: int, own: dict[str, str]) -> None:
        launch = Launch(rank=rank, world_size=world, host=hosts[rank] if hosts else f"host{rank // 2}")
        device = {"device": "cpu", "uuid": uuids[rank] if uuids else ""}
        try:
            got[rank] = confer(store, launch, facts=own, device=device, limit=limit)
        except UserError as error:
            got[rank] = str(error)

    threads = [threading.Thread(target=speak, args=(rank, own)) for rank, own in enumerate(facts) if own is not None]
    for thread in reversed(threads):  # rank 0 is the last to come
        thread.start()
    for thread in threads:
        thread.join(30)
    return got


def test_ranks_that_fit_together_pass() -> None:
    present, *others = confer_of([FACTS] * 4)
    assert [one["host"] for one in present] == ["host0", "host0", "host1", "host1"]
    assert others == [[], [], []]


def test_who_differs_in_what_is_told_to_all() -> None:
    odd = {**FACTS, "data": "d2", "train.steps": "13"}
    got = confer_of([FACTS, odd, odd, FACTS, {**FACTS, "code": "abd"}])
    assert len(set(got)) == 1
    assert got[0].splitlines() == [
        "the ranks of this job do not fit together:",
        "  data: ranks 1-2 on host0, host1: d2; rank 0 on host0: d1",
        "  train.steps: ranks 1-2 on host0, host1: 13; rank 0 on host0: 12",
        "  code: rank 4 on host2: abd; rank 0 on host0: abc",
    ]


def test_a_fact_that_a_rank_lacks_is_a_difference() -> None:
    older = {key: value for key, value in FACTS.items() if key != "train.steps"}
    assert "train.steps: rank 1 on host0: None; rank 0 on host0: 12" in confer_of([FACTS, older])[0]


def test_two_ranks_on_one_gpu_are_refused() -> None:
    got = confer_of([FACTS] * 4, uuids=["a", "b", "a", "a"], hosts=["x", "x", "x", "y"])
    assert len(set(got)) == 1
    assert got[0].splitlines()[1:] == ["  ranks 0, 2 share one GPU of x (a); start one process per GPU"]


def test_processes_without_gpus_share_their_host() -> None:
    assert confer_of([FACTS] * 2, uuids=["", ""])[1] == []


def test_a_rank_that_says_nothing_is_named_to_all() -> None:
    began = time.monotonic()
    got = confer_of([FACTS, FACTS, None, FACTS], limit=0.5)
    assert time.monotonic() - began < 10
    for rank in (0, 1, 3):
        assert "rank 2 did not speak" in got[rank]


def test_rank_0_that_says_nothing_is_named() -> None:
    assert "rank 0 did not speak" in confer_of([None, FACTS], limit=0.5)[1]


def test_every_setting_is_compared() -> None:
    flat = _flat(Config())
    assert flat["seed"] == "1337"
    assert flat["train.batch_tokens"] == "491520"
    assert flat["optim.betas"] == "[0.9, 0.95]"
    changed = _flat(Config.model_validate({"optim": {"lr": 1.0}}))
    assert {key for key in flat if flat[key] != changed[key]} == {"optim.lr"}


def test_the_table_has_a_line_per_host() -> None:
    present: list[dict[str, Any]] = [{"host": f"node{rank // 8}", "device": "NVIDIA H100"} for rank in range(24)]
    present[9] = {"host": "node1", "device": "NVIDIA H200"}
    text = io.StringIO()
    Console(file=text, width=120).print(table(present, FACTS))
    lines = text.getvalue().splitlines()
    title = " ".join(" ".join(lines[:2]).split())
    assert title == "24 ranks, alike in settings; torch 2.13, code abc, data d1"
    assert [line for line in lines if "node1" in line] == ["│ node1 │ 8-15  │ 7 x NVIDIA H100, 1 x NVIDIA H200 │"]
    assert len([line for line in lines if "node" in line]) == 3


@pytest.mark.parametrize(("ranks", "text"), [([0], "0"), ([0, 1, 2, 5], "0-2, 5"), ([1, 3, 4], "1, 3-4")])
def test_numbers(ranks: list[int], text: str) -> None:
    assert _numbers(ranks) == text
