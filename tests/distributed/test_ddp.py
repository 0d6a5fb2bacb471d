"""Several gloo ranks under torchrun compute what one process computes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.train.saving.checkpoint import list_checkpoints, load_model
from tests.support import record, run_pretrain, tiny_settings, write_config

ROOT = Path(__file__).parent.parent.parent


def torchrun(ranks: int, config: Path, *flags: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    launched = subprocess.Popen(
        [*command, "pretrain.py", str(config), *flags],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        printed, _ = launched.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(launched.pid, signal.SIGKILL)  # the ranks, too
        raise
    return launched.returncode, printed


def compare(lines: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    assert len(lines) == len(reference) > 0
    for found, expected in zip(lines, reference, strict=True):
        assert found.keys() == expected.keys()
        for key in expected:
            assert found[key] == pytest.approx(expected[key], rel=1e-6), (expected["step"], key)


@pytest.mark.slow
def test_ranks_compute_the_same_run_and_resume_each_other(dataset: Path, tmp_path: Path) -> None:
    """1 process, 2 ranks, 3 ranks with uneven shares; then 1 goes on where 2 stopped and the other way round."""
    horizon = {"optim": {"horizon_steps": 12}}
    configs = {
        ranks: write_config(
            tmp_path / f"{ranks}.yaml",
            tiny_settings(dataset, tmp_path / str(ranks), train={"micro_batch": 2}, **horizon),
        )
        for ranks in (1, 2, 3)
    }
    code, printed = run_pretrain(configs[1], "--train.steps", "6")
    assert code == 0, printed
    for ranks in (2, 3):
        code, printed = torchrun(ranks, configs[ranks], "--train.steps", "6")
        assert code == 0, printed
        assert printed.count("parameters;") == 1, "only the main rank speaks"
        assert f"{ranks} ranks" in printed
        compare(record(tmp_path / str(ranks)), record(tmp_path / "1"))
    code, printed = torchrun(2, configs[1])
    assert code == 0, printed
    assert "resuming from" in printed
    code, printed = run_pretrain(configs[2])
    assert code == 0, printed
    compare(record(tmp_path / "2"), record(tmp_path / "1"))
    weights = [
        load_model(list_checkpoints(tmp_path / run / "checkpoints")[-1], device=torch.device("cpu"))[0].state_dict()
        for run in ("1", "2")
    ]
    for name, expected in weights[0].items():
        # The gradient of a key bias is 0 but for rounding (softmax does not see it), which AdamW makes steps of.
        torch.testing.assert_close(weights[1][name], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_users_mistake_under_torchrun_is_told_once_per_rank_without_hanging(dataset: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "a.yaml", tiny_settings(dataset, tmp_path / "run"))
    code, printed = torchrun(2, config, "--parallel.strategy", "single")
    assert code != 0
    assert "parallel.strategy single was launched with 2 ranks" in printed
