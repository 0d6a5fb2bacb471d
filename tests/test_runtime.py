"""What a process does between steps, and how it joins a group."""

from __future__ import annotations

import gc
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
from pipeline.train.runtime import GARBAGE_STEPS, LONG_STEP, Runtime
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
