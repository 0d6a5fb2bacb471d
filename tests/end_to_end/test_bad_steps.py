"""Steps that go wrong: skipped or gone back from when asked to, by all ranks alike, and the same after a kill."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.train.saving.checkpoint import list_checkpoints, read_state
from pipeline.train.state import Rollback
from pipeline.train.step import Trainer
from tests.support import record, run_pretrain, run_ranks, tiny_settings, write_config

SHARED: dict[str, dict[str, Any]] = {"checkpoint": {"every": 10}, "eval": {"every": 100}}


def spoil(rows: set[int], factor: float) -> None:
    """In each rank: the losses of micro-batches that hold one of these rows come out `factor` times as large."""
    backward = Trainer._backward

    def spoilt(self: Trainer, batch: Any, *, step: int, targets: int) -> torch.Tensor:
        bad = torch.tensor([bool(rows & set(part.tolist())) for part in batch.rows])
        losses = backward(self, batch, step=step, targets=targets)
        return torch.where(bad, losses * factor, losses)

    Trainer._backward = spoilt  # type: ignore[method-assign] # a fault put in place


def run(
    folder: Path, dataset: Path, name: str, *, rows: set[int], factor: float, ranks: int = 2, **sections: Any
) -> str:
    config = write_config(folder / f"{name}.yaml", tiny_settings(dataset, folder / name, **SHARED, **sections))
    fault = partial(spoil, rows, factor)
    code, printed = run_ranks(2, str(config), output=folder / f"{name}.txt", before=fault)
    return printed if code == 0 else f"FAILED\n{printed}"


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped_by_all_ranks_and_remembered(dataset: Path, tmp_path: Path) -> None:
    skip = {"train": {"steps": 20, "on_nonfinite": "skip"}}
    printed = run(tmp_path, dataset, "skipped", rows={6 * 8 + 1}, factor=float("nan"), **skip)
    assert "step  7/20  skipped: loss or gradient norm was not finite" in printed
    lines = {line["step"]: line for line in record(tmp_path / "skipped") if "val_loss" not in line}
    assert sorted(lines) == list(range(1, 21))
    assert lines[7]["skipped"] is True
    assert "loss" not in lines[7]
    assert lines[7]["tokens"] == lines[6]["tokens"] == 6 * 256
    assert lines[20]["tokens"] == 19 * 256
    state = read_state(list_checkpoints(tmp_path / "skipped" / "checkpoints")[-1])
    assert (state.skipped, state.updates, state.step) == ((7,), 19, 20)
    for line in (tmp_path / "skipped" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))

    # cut in two between the skip and the end: the optimizer's count of updates goes on, too
    halves = {"optim": {"horizon_steps": 20}, "train": {"steps": 10, "on_nonfinite": "skip"}}
    run(tmp_path, dataset, "halves", rows={6 * 8 + 1}, factor=float("nan"), **halves)
    halves["train"]["steps"] = 20
    run(tmp_path, dataset, "halves", rows={6 * 8 + 1}, factor=float("nan"), **halves)
    again = [line for line in record(tmp_path / "halves") if not ("val_loss" in line and line["step"] == 10)]
    assert again == record(tmp_path / "skipped")


@pytest.mark.slow
def test_too_many_skips_stop_the_run(dataset: Path, tmp_path: Path) -> None:
    skip = {"train": {"steps": 20, "on_nonfinite": "skip", "max_skips": 2}}
    printed = run(tmp_path, dataset, "often", rows={8, 16, 24}, factor=float("inf"), **skip)
    assert printed.startswith("FAILED")
    assert "step 4: loss inf" in printed
    assert printed.count("To go on: look at these documents") == 1, "by one rank"


@pytest.mark.slow
def test_a_spike_sends_the_run_back_and_leaves_its_rows_out(dataset: Path, tmp_path: Path) -> None:
    """The jump comes at step 27, after the checkpoint of step 20: rows 160 to 215 are left out."""
    back = {"train": {"steps": 40, "on_spike": "rollback", "spike_deviations": 20}}
    printed = run(tmp_path, dataset, "spiked", rows={26 * 8 + 3}, factor=40.0, **back)
    assert "step 27: the loss jumped to " in printed
    assert "step-00000020, leaving out the 56 rows from row 160 on" in printed
    lines = [line for line in record(tmp_path / "spiked") if "val_loss" not in line]
    assert [line["step"] for line in lines] == list(range(1, 41))
    state = read_state(list_checkpoints(tmp_path / "spiked" / "checkpoints")[-1])
    assert state.rollbacks == (Rollback(spike=27, to=20),)
    assert state.rows_of(20) == (152, 8)
    assert state.rows_of(21) == (216, 8)
    assert state.rows == 216 + 20 * 8

    # the same once more, killed by nobody, and cut in two after the jump
    halves = {**back, "optim": {"horizon_steps": 40}, "train": {**back["train"], "steps": 30}}
    run(tmp_path, dataset, "halves", rows={26 * 8 + 3}, factor=40.0, **halves)
    halves["train"]["steps"] = 40
    assert (
        "jumped" not in run(tmp_path, dataset, "halves", rows={26 * 8 + 3}, factor=40.0, **halves).split("resuming")[1]
    )
    again = [line for line in record(tmp_path / "halves") if not ("val_loss" in line and line["step"] == 30)]
    assert again == record(tmp_path / "spiked")


@pytest.mark.slow
def test_a_spike_without_a_checkpoint_or_one_too_many_stops_the_run(dataset: Path, tmp_path: Path) -> None:
    back = {"train": {"steps": 60, "on_spike": "rollback", "spike_deviations": 20, "max_rollbacks": 1}}
    early = {**back, "checkpoint": {"every": 50}}
    config = write_config(tmp_path / "early.yaml", tiny_settings(dataset, tmp_path / "early", **{**SHARED, **early}))
    fault = partial(spoil, {18 * 8}, 40.0)
    code, printed = run_ranks(2, str(config), output=tmp_path / "early.txt", before=fault)
    assert code != 0
    assert "there is no checkpoint to go back to" in printed
    printed = run(tmp_path, dataset, "twice", rows={26 * 8, 48 * 8}, factor=40.0, **back)
    assert "after 1 rollback, and train.max_rollbacks allows no more" in printed
    assert printed.count("leaving out the") == 1


def test_a_rehearsal_says_all_and_writes_nothing(dataset: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "a.yaml", tiny_settings(dataset, tmp_path / "run"))
    code, printed = run_pretrain(config, "--dry-run")
    assert code == 0, printed
    for expected in (
        "parameters; 1 process", "strategy: single", "12 steps = 3,072 tokens", "checkpoints: ", "memory: about ",
        "time: a micro-batch takes ", "the 12 steps ", "nothing was written",
    ):  # fmt: skip
        assert expected in printed, printed
    assert not (tmp_path / "run").exists()
    code, printed = run_pretrain(config, "--train.steps", "6")
    assert code == 0, printed
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, printed = run_pretrain(config, "--dry-run")
    assert "the 6 steps " in printed, "what is left, from the newest checkpoint on"
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_again_on_any_ranks(dataset: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "a.yaml", tiny_settings(dataset, tmp_path / "run"))
    code, printed = run_pretrain(config)
    assert code == 0, printed
    recorded = next(line for line in record(tmp_path / "run") if "val_loss" in line and line["step"] == 12)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    outputs = [run_pretrain(config, "--eval-only")]
    outputs.append(run_ranks(3, str(config), "--eval-only", output=tmp_path / "three.txt"))
    fsdp = ["--parallel.strategy", "fsdp", "--train.micro-batch", "3"]
    outputs.append(run_ranks(2, str(config), "--eval-only", *fsdp, output=tmp_path / "two.txt"))
    for code, printed in outputs:
        assert code == 0, printed
        found = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
        assert found.pop("checkpoint").endswith("step-00000012")
        assert found == pytest.approx(recorded, rel=1e-6)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
