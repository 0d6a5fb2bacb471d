"""`torchrun pretrain.py` as a user types it: every rank starts its own Python. Other tests fork ranks, for speed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.slow
def test_three_ranks_begin_a_run_that_one_process_ends(dataset: Path, tmp_path: Path) -> None:
    """The shares of 3 ranks are uneven; the whole is the run of one process."""
    configs = {
        name: write_config(
            tmp_path / f"{name}.yaml",
            tiny_settings(dataset, tmp_path / name, train={"micro_batch": 2}, optim={"horizon_steps": 12}),
        )
        for name in ("ranks", "alone")
    }
    code, printed = torchrun(3, configs["ranks"], "--train.steps", "6")
    assert code == 0, printed
    assert printed.count("parameters;") == 1, "only the main rank speaks"
    assert "3 ranks" in printed
    code, printed = run_pretrain(configs["ranks"])
    assert code == 0, printed
    assert "resuming from" in printed
    for steps in ("6", "12"):  # as the other run did, which evaluated at its end
        code, printed = run_pretrain(configs["alone"], "--train.steps", steps)
        assert code == 0, printed
    found, reference = record(tmp_path / "ranks"), record(tmp_path / "alone")
    assert len(found) == len(reference) > 12
    for line, expected in zip(found, reference, strict=True):
        assert line.keys() == expected.keys()
        for key in expected:
            assert line[key] == pytest.approx(expected[key], rel=1e-6), (expected["step"], key)
    weights = [
        load_model(list_checkpoints(tmp_path / run / "checkpoints")[-1], device=torch.device("cpu"))[0].state_dict()
        for run in ("ranks", "alone")
    ]
    for name, expected in weights[0].items():
        # The gradient of a key bias is 0 but for rounding (softmax does not see it), which AdamW makes steps of.
        torch.testing.assert_close(weights[1][name], expected, atol=1e-5, rtol=1e-4)
