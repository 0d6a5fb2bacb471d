"""What a process does between steps, and how it joins a group."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._inductor import config as inductor

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.train.processes.job import Job
from pipeline.train.processes.launched import Launch
from pipeline.train.runtime import GARBAGE_STEPS, LONG_STEP, Runtime, device_of
from tests.support import tiny_settings


@pytest.fixture
def config(dataset: Path, tmp_path: Path) -> Config:
    return Config.model_validate(tiny_settings(dataset, tmp_path / "run"))


@pytest.fixture
def runtime(config: Config) -> Iterator[Runtime]:
    runtime = Runtime.start(config)
    yield runtime
    runtime.stop()


class Knot:
    """Garbage that only the collector finds."""

    alive = 0

    def __init__(self) -> None:
        self.myself = self
        Knot.alive += 1

    def __del__(self) -> None:
        Knot.alive -= 1


def test_garbage_is_collected_at_the_same_steps_everywhere_and_at_no_other_time(runtime: Runtime) -> None:
    gc.collect()
    frozen = gc.get_freeze_count()  # from Python 3.12 on what is immortal counts
    runtime.collect_garbage(17)  # whichever step a run goes on from
    assert not gc.isenabled()
    assert gc.get_freeze_count() > frozen
    collected = []
    for step in range(18, 18 + 2 * GARBAGE_STEPS):
        Knot()
        before = Knot.alive
        runtime.collect_garbage(step)
        if Knot.alive < before:
            collected.append(step)
    assert collected == [GARBAGE_STEPS, 2 * GARBAGE_STEPS]
    runtime.stop()
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


def test_a_step_too_long_for_torchruns_patience_is_told_once(
    runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime.after_step(1, seconds=LONG_STEP + 1)
    assert capsys.readouterr().out == "", "nobody ends this process 30 s after a signal"
    job = Job(Launch(elastic=True), watched=False)
    launched = replace(runtime, job=job)
    for step in (2, 3):
        launched.after_step(step, seconds=LONG_STEP + 1)
    assert capsys.readouterr().out.count("warning: a step takes 21 s") == 1


def test_one_process_has_a_group_only_where_sharding_wants_one(config: Config) -> None:
    runtime = Runtime.start(config)
    assert not dist.is_initialized()
    runtime.stop()
    sharded = Config.model_validate({**config.model_dump(), "parallel": {"strategy": "fsdp"}})
    runtime = Runtime.start(sharded)
    assert dist.get_world_size() == 1
    assert runtime.world_size == 1
    runtime.stop()
    assert not dist.is_initialized()


def test_one_process_of_torchrun_has_a_group_of_its_own(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """With LOCAL_RANK set, accelerate starts one from MASTER_ADDR, with torch's own time-out, unless there is one."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    runtime = Runtime.start(config, Job(Launch(elastic=True, grouped=True), watched=False))
    assert dist.get_world_size() == 1
    assert runtime.world_size == 1
    runtime.stop()
    assert not dist.is_initialized()


@pytest.mark.parametrize(("local_rank", "gpus", "number"), [(0, 1, 0), (3, 1, 0), (3, 8, 3)])
def test_the_one_gpu_that_a_task_sees_is_its_own(
    local_rank: int, gpus: int, number: int, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`srun --gpus-per-task=1` numbers the tasks of a node from 0 to 7, and shows each one GPU as number 0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:7")
    launch = Launch(rank=local_rank, world_size=8, local_rank=local_rank, local_world_size=8)
    train = config.train.model_copy(update={"device": "cuda"})
    assert device_of(train, launch) == torch.device("cuda", number)
    assert os.environ["ACCELERATE_TORCH_DEVICE"] == f"cuda:{number}", "accelerate takes the same one"


def test_more_ranks_than_gpus_are_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    launch = Launch(rank=4, world_size=8, local_rank=4, local_world_size=8, host="h")
    with pytest.raises(UserError, match="rank 4 on h is number 4 on its host, but may use 4 GPUs"):
        device_of(config.train.model_copy(update={"device": "cuda"}), launch)


def test_a_device_that_is_not_there_is_refused(config: Config) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    wanting = Config.model_validate({**config.model_dump(), "train": {**config.train.model_dump(), "device": "cuda"}})
    with pytest.raises(UserError, match="finds no CUDA device"):
        Runtime.start(wanting)


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_arithmetic_that_a_cpu_lacks_is_refused(config: Config, precision: str) -> None:
    train = config.train.model_copy(update={"precision": precision})
    with pytest.raises(UserError, match=f"train.precision {precision} needs CUDA"):
        Runtime.start(config.model_copy(update={"train": train}))


def test_rounded_float32_goes_by_another_name_than_exact_one(runtime: Runtime) -> None:
    """A run that goes on with the other one is asked whether it may."""
    on_cuda = replace(runtime, device=torch.device("cuda"))
    names = []
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            names += [runtime.arithmetic, on_cuda.arithmetic, replace(on_cuda, precision=torch.bfloat16).arithmetic]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert names == ["torch.float32"] * 2 + ["torch.bfloat16"] + ["torch.float32", "tf32", "torch.bfloat16"]


def test_deterministic_settings_reach_the_compiler(config: Config) -> None:
    train = config.train.model_copy(update={"deterministic": True})
    try:
        Runtime.start(config.model_copy(update={"train": train})).stop()
        assert torch.are_deterministic_algorithms_enabled()
        assert inductor.deterministic
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
        inductor.deterministic = False
        torch.utils.deterministic.fill_uninitialized_memory = True
