"""A job whose every port is attacked, before all ranks have come and while it trains: it goes on as if alone."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.train.step import Trainer
from tests.strangers import attacks, close, slow_writers, wait_until
from tests.support import end_tree, record, run_ranks, start_ranks, tiny_settings, write_config

pytestmark = pytest.mark.slow

SECONDS = 60.0  # to wait for anything, on a busy machine
STEPS = 300


def waiting(folder: Path) -> None:
    """In each rank: rank 1 comes when the file `come` is there, and steps take their time until `left` is.

    A system that lets a process open 1,024 files unless it asks for more is not unusual.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    while os.environ["RANK"] == "1" and not (folder / "come").exists():
        time.sleep(0.05)
    step = Trainer.step

    def slow(self: Trainer, *arguments: Any, **named: Any) -> Any:
        time.sleep(0.0 if (folder / "left").exists() else 0.2)
        return step(self, *arguments, **named)

    Trainer.step = slow  # type: ignore[method-assign]  # only in the process of a rank


@pytest.fixture
def agents() -> Iterator[list[Any]]:
    started: list[Any] = []
    yield started
    for agent in started:
        end_tree(agent.pid)


def ports(agent: Any) -> dict[int, str]:
    """Every port that the job listens on, and who does; forked ranks share those of their agent."""
    root = psutil.Process(agent.pid)
    family = [("agent", root), *((f"rank {number}", one) for number, one in enumerate(root.children()))]
    return {
        connection.laddr.port: name
        for name, process in reversed(family)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def attack(agent: Any, port: int, *, many: int = 1000) -> None:
    for what, act in attacks(many=many).items():
        held = act(port)
        time.sleep(0.05)
        assert agent.is_alive(), f"the job did not survive {what}"
        close(held)
    with slow_writers(port):
        time.sleep(0.5)


def test_a_job_survives_strangers_on_every_port(dataset: Path, tmp_path: Path, agents: list[Any]) -> None:
    settings = {"train": {"steps": STEPS}, "checkpoint": {"every": 100}, "eval": {"every": 100}}
    alone = write_config(tmp_path / "alone.yaml", tiny_settings(dataset, tmp_path / "alone", **settings))
    code, printed = run_ranks(2, str(alone), output=tmp_path / "alone.txt")
    assert code == 0, printed

    config, output = (
        write_config(tmp_path / "a.yaml", tiny_settings(dataset, tmp_path / "run", **settings)),
        tmp_path / "o",
    )
    agent = start_ranks(2, str(config), output=output, before=partial(waiting, tmp_path))
    agents.append(agent)
    wait_until(lambda: "rank 0" in ports(agent).values(), seconds=SECONDS, what="rank 0 does not listen")
    early = ports(agent)
    for port, who in early.items():
        # torch's store takes some ten connections a second: 1,000 would hold up rank 1 for minutes.
        attack(agent, port, many=50 if who == "agent" else 1000)
    (tmp_path / "come").touch()
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and "\n" in metrics.read_text(), seconds=SECONDS, what=output.read_text())
    late = ports(agent)
    assert {who for port, who in early.items() if port in late} == {"agent"}, "rank 0 listens to all that come"
    assert set(late.values()) == {"agent", "rank 0", "rank 1"}, "the store, and gloo in each rank"
    for port in late:
        attack(agent, port, many=300 if late[port] == "agent" else 1000)
    assert len(metrics.read_text().splitlines()) < STEPS, "the attack came after the run"
    (tmp_path / "left").touch()
    agent.join(2 * SECONDS)
    assert agent.exitcode == 0, output.read_text()
    assert record(tmp_path / "run") == record(tmp_path / "alone")
