"""How a process learns that it is one of many: from torchrun, from srun, or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.launcher.api import LaunchConfig

from pipeline.errors import UserError
from pipeline.train.processes.launched import (
    Launch,
    first_host,
    for_torchrun,
    launch_of,
    prepare_allocator,
    prepare_libraries,
    tasks_per_node,
)

ROOT = Path(__file__).parents[1]

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "a", "MASTER_PORT": "1234", "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip
# as srun(1) documents them, for `srun --nodes 3 --ntasks 5`
SRUN = {
    "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_NUM_NODES": "3", "SLURM_PROCID": "4", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_STEP_NODELIST": "gpu[007-008,12]",
    "SLURM_JOB_ID": "4020123",
}  # fmt: skip


def test_alone() -> None:
    launch = launch_of({}, host="h")
    assert not launch.grouped
    assert launch == Launch(host="h")
    assert (launch.world_size, launch.stopped_code, launch.who, launch.launcher) == (1, 75, "this process", "python")


def test_torchrun() -> None:
    launch = launch_of(TORCHRUN, host="h")
    assert launch == Launch(3, 4, 1, 2, "a", 1234, agent_store=True, elastic=True, grouped=True, host="h")
    assert (launch.stopped_code, launch.who, launch.launcher) == (0, "rank 3 on h", "torchrun ...")


def test_one_process_of_torchrun_stops_with_0_too() -> None:
    alone = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}
    launch = launch_of(alone, host="h")
    assert launch.stopped_code == 0
    assert launch.grouped, "accelerate starts a group if the run does not"


def test_srun_without_torchrun() -> None:
    launch = launch_of(SRUN, host="h")
    assert launch == Launch(4, 5, 0, 1, "gpu007", 20123, host="h")
    assert (launch.stopped_code, launch.launcher) == (75, "srun ... python")


def test_srun_yields_to_what_is_set() -> None:
    launch = launch_of({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5"}, host="h")
    assert (launch.address, launch.port) == ("10.0.0.1", 5)


def test_torchrun_under_srun_counts_torchruns_ranks() -> None:
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "1"}
    assert launch_of({**step, **TORCHRUN}, host="h").rank == 3


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_a_world_of_one_among_several_tasks_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"one of 4 tasks .{name}., but as a world of one"):
        launch_of({name: "4", "WORLD_SIZE": "1"}, host="h")


def test_worlds_per_node_are_refused() -> None:
    alone = {**TORCHRUN, "RANK": "1", "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}
    with pytest.raises(UserError, match="a world of its own with 2 ranks; give torchrun --nnodes 2"):
        launch_of({**alone, "SLURM_STEP_NUM_NODES": "2"}, host="h")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": ""}, "RANK must be a number, but it is ''"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK must be a number, but it is 'x'"),
        ({"RANK": "4"}, "rank 4 .local 1. does not lie in a world of 4 with 2"),
        ({"LOCAL_RANK": "2"}, "rank 3 .local 2. does not lie"),
    ],
)
def test_half_a_launch_is_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        launch_of({**TORCHRUN, **change}, host="h")


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("node7", "node7"), ("a,b", "a"), ("n[1-3]", "n1"), ("n[007,9]", "n007"), ("n[5],m[1-2]", "n5"),
        ("a,n[1-2]", "a"), ("r[1-2]-x,b", "r1-x"),
    ],
)  # fmt: skip
def test_first_host(text: str, first: str) -> None:
    assert first_host(text) == first


def test_tasks_per_node() -> None:
    assert tasks_per_node("8(x3),2,1(x2)") == [8, 8, 8, 2, 1, 1]


def test_what_launch_ranks_tells_torchrun_and_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    environment = for_torchrun(Path("/tmp/x"))  # noqa: S108 - nothing is written
    assert launch_of({**TORCHRUN, **environment}, host="h").endings == "/tmp/x/0"  # noqa: S108
    again = {**TORCHRUN, **environment, "TORCHELASTIC_RESTART_COUNT": "2"}
    assert launch_of(again, host="h").endings == "/tmp/x/2"  # noqa: S108
    assert launch_of({"TORCHELASTIC_RUN_ID": "x", **environment}, host="h").endings == "/tmp/x/0"  # noqa: S108
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "7")
    assert for_torchrun(Path())["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "7", "the user's own stays"


@pytest.mark.skipif(not hasattr(LaunchConfig, "shutdown_timeout"), reason="needs a torchrun with a time-out to set")
def test_torchrun_waits_as_long_as_ranks_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for the variable itself; one that does not (torch 2.11) sends SIGKILL after 30 s: docs/launch.md."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", for_torchrun(Path())["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1)
    assert config.shutdown_timeout is not None
    assert config.shutdown_timeout >= 3600


def prepared(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What libraries find in an environment that this process was started with."""
    found = dict(environment)
    monkeypatch.setattr("pipeline.train.processes.launched.os.environ", found)
    prepare_allocator()
    prepare_libraries(device="cuda:0", deterministic=True)
    monkeypatch.undo()
    return found


def test_libraries_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepared({}, monkeypatch) == {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True", "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "ACCELERATE_TORCH_DEVICE": "cuda:0",
    }  # fmt: skip


def test_the_users_settings_of_libraries_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {
        "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64", "CUBLAS_WORKSPACE_CONFIG": ":16:8",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    }  # fmt: skip
    assert prepared(own, monkeypatch) == {**own, "ACCELERATE_TORCH_DEVICE": "cuda:0"}
    assert prepared({**own, **TORCHRUN}, monkeypatch)["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"


def test_what_torchrun_sets_by_itself_is_no_users_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun sets 1 in its ranks; launch.ranks sets 0 for torchrun, unless the user has set something."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    monkeypatch.delenv(name, raising=False)
    assert prepared({**TORCHRUN, name: "1"}, monkeypatch)[name] == "0"
    assert for_torchrun(Path())[name] == "0"
    monkeypatch.setenv(name, "1")
    assert prepared({**TORCHRUN, **for_torchrun(Path("x"))}, monkeypatch)[name] == "1"


# Stands for PyTorch: says what a script has set before it is imported.
TORCH = 'import os, sys; print(os.environ.get("PYTORCH_ALLOC_CONF")); sys.stdout.flush(); os._exit(0)'


@pytest.mark.parametrize("script", ["pretrain.py", "sample.py"])
def test_the_allocator_is_set_before_torch_is_imported(script: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(TORCH)
    for own, expected in ({}, "expandable_segments:True"), ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"):
        clean = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
        environment = {**clean, "PYTHONPATH": str(tmp_path), **own}
        command = [sys.executable, script, str(tmp_path / "none.yaml")]
        found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert found.stdout == f"{expected}\n"
