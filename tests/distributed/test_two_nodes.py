"""Two nodes that meet under torchrun's own agents, and lose one another."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import pretrain
from pipeline.train.step import Trainer
from tests.support import FORKS, _rank, end_tree, record, run_ranks, start_ranks, tiny_settings, write_config

STEPS = 24
SECONDS = 90.0  # to wait for anything, on a busy machine


def slowly() -> None:
    """Steps of a tenth of a second, so that there is time to kill something between two of them."""
    step = Trainer.step

    def slow(self: Trainer, *arguments: Any, **keywords: Any) -> Any:
        time.sleep(0.1)
        return step(self, *arguments, **keywords)

    Trainer.step = slow  # type: ignore[method-assign]  # only in the process of a rank


def node(port: int, arguments: list[str], max_restarts: int) -> None:
    """torchrun on one of two nodes, with one rank; heartbeats are quick, so that a dead node is missed soon."""
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # as launch/several_nodes.sh does, and says why
    config = LaunchConfig(
        min_nodes=2, max_nodes=2, nproc_per_node=1, rdzv_backend="c10d", rdzv_endpoint=f"localhost:{port}",
        rdzv_configs={"keep_alive_interval": 1, "keep_alive_max_attempt": 2, "join_timeout": int(SECONDS)},
        run_id="test", start_method="fork", max_restarts=max_restarts, monitor_interval=0.1, local_addr="localhost",
    )  # fmt: skip
    elastic_launch(config, _rank)(arguments, slowly, pretrain.main)


@pytest.fixture
def nodes() -> Iterator[list[Any]]:
    """Agents that must not outlive the test, nor their ranks."""
    started: list[Any] = []
    yield started
    for agent in started:
        end_tree(agent.pid)


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    code, printed = run_ranks(2, str(config_of(dataset, folder)), output=folder / "output")
    assert code == 0, printed
    return folder


def config_of(dataset: Path, folder: Path) -> Path:
    return write_config(folder / "run.yaml", tiny_settings(dataset, folder / "run", train={"steps": STEPS}))


def start_node(nodes: list[Any], port: int, config: Path, *, max_restarts: int) -> Any:
    agent = FORKS.Process(target=node, args=(port, [str(config)], max_restarts))
    agent.start()
    nodes.append(agent)
    return agent


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def await_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + SECONDS
    path = folder / "run" / "metrics.jsonl"
    while not path.exists() or not any(line["step"] >= step for line in record(folder / "run")):
        assert time.monotonic() < deadline, f"step {step} did not come"
        time.sleep(0.05)


def assert_the_same(folder: Path, undisturbed: Path) -> None:
    """Record and last checkpoint, bit by bit."""
    assert record(folder / "run") == record(undisturbed / "run")
    saved, expected = (tensors_of(one / "run" / "checkpoints" / f"step-{STEPS:08d}") for one in (folder, undisturbed))
    assert saved.keys() == expected.keys()
    assert len(expected) > 20, "weights and moments"
    for name in expected:
        assert torch.equal(saved[name], expected[name]), name


def tensors_of(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    files = sorted(checkpoint.rglob("*.safetensors"))
    return {
        (str(path.relative_to(checkpoint)), name): tensor for path in files for name, tensor in load_file(path).items()
    }


@pytest.mark.slow
def test_a_node_that_is_lost_comes_back_into_the_run(
    dataset: Path, tmp_path: Path, nodes: list[Any], undisturbed: Path
) -> None:
    """The other's torchrun waits at the meeting point and goes on with it, from the newest checkpoint."""
    config, port = config_of(dataset, tmp_path), free_port()
    host = start_node(nodes, port, config, max_restarts=2)
    wait_for_port(port)
    other = start_node(nodes, port, config, max_restarts=2)
    await_step(tmp_path, 6)
    end_tree(other.pid)
    again = start_node(nodes, port, config, max_restarts=2)
    for agent in (host, again):
        agent.join(SECONDS)
    assert host.exitcode == again.exitcode == 0
    assert_the_same(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_job_whose_meeting_point_is_lost_ends_and_can_be_started_again(
    dataset: Path, tmp_path: Path, nodes: list[Any], undisturbed: Path
) -> None:
    config, port = config_of(dataset, tmp_path), free_port()
    host = start_node(nodes, port, config, max_restarts=2)
    wait_for_port(port)
    other = start_node(nodes, port, config, max_restarts=2)
    await_step(tmp_path, 6)
    end_tree(host.pid)
    other.join(SECONDS)
    assert other.exitcode not in (None, 0), "it hangs, or calls that a success"
    port = free_port()
    both = [start_node(nodes, port, config, max_restarts=0) for _ in range(2)]
    for agent in both:
        agent.join(SECONDS)
    assert [agent.exitcode for agent in both] == [0, 0]
    assert_the_same(tmp_path, undisturbed)


def wait_for_port(port: int) -> None:
    """Until the first agent holds the store, so that the second does not."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("no agent listens")


@pytest.mark.slow
def test_a_rank_that_is_killed_is_started_again_and_the_run_goes_on(
    dataset: Path, tmp_path: Path, nodes: list[Any], undisturbed: Path
) -> None:
    output = tmp_path / "output"
    agent = start_ranks(2, str(config_of(dataset, tmp_path)), output=output, max_restarts=2, before=slowly)
    nodes.append(agent)
    await_step(tmp_path, 6)
    psutil.Process(agent.pid).children()[-1].kill()
    agent.join(SECONDS)
    assert agent.exitcode == 0, output.read_text()
    assert "resuming from" in output.read_text()
    assert_the_same(tmp_path, undisturbed)
