"""The same run is the same run: after kills, with other intervals, split another way."""

from __future__ import annotations

import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pipeline.train.saving.checkpoint import list_checkpoints, verify
from tests.support import make_dataset, record, run_pretrain, start_pretrain, tiny_settings, write_config


def finish(path: Path, dataset: Path, name: str, **sections: dict[str, Any]) -> Path:
    """Run to the end; the run folder."""
    run_dir = path / name
    config = write_config(path / f"{name}.yaml", tiny_settings(dataset, run_dir, **sections))
    code, printed = run_pretrain(config)
    assert code == 0, printed
    return run_dir


def final_tensors(run_dir: Path) -> dict[str, bytes]:
    checkpoint = list_checkpoints(run_dir / "checkpoints")[-1]
    tensors = {}
    for part in ("model", "optimizer"):
        for file in sorted((checkpoint / part).glob("*.safetensors")):
            tensors.update({f"{part}/{name}": value.numpy().tobytes() for name, value in load_file(file).items()})
    assert tensors
    return tensors


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(dataset: Path, tmp_path: Path) -> None:
    intervals: dict[str, dict[str, Any]] = {
        "model": {"dropout": 0.1},  # its draws must come again, too
        "train": {"steps": 60},
        "checkpoint": {"every": 3, "keep": 2},
        "eval": {"every": 4},
    }
    undisturbed = finish(tmp_path, dataset, "undisturbed", **intervals)
    chance = random.Random(20)
    kills = runs = 0
    while kills < 20:
        runs += 1
        run_dir = tmp_path / f"killed-{runs}"
        config = write_config(tmp_path / f"killed-{runs}.yaml", tiny_settings(dataset, run_dir, **intervals))
        output = tmp_path / f"killed-{runs}.txt"
        while True:
            process = start_pretrain(config, output)
            process.join(chance.uniform(0.1, 1.2))
            if process.is_alive():
                process.kill()
                process.join()
                kills += 1
            for checkpoint in list_checkpoints(run_dir / "checkpoints"):
                assert verify(checkpoint) == []
            if process.exitcode != -signal.SIGKILL:
                break
        assert process.exitcode == 0, output.read_text()
        assert record(run_dir) == record(undisturbed)
        assert final_tensors(run_dir) == final_tensors(undisturbed)
        assert list((run_dir / "checkpoints").glob(".*")) == []
    assert "resuming from" in output.read_text()


def test_a_packed_blend_with_a_ramp_is_the_same_after_a_kill(dataset: Path, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "other", documents=50, seed=9)
    sources = [{"path": str(dataset), "weight": 0.7}, {"path": str(other), "weight": 0.3}]
    ramp = [{"steps": 4, "batch_tokens": 64}, {"steps": 9, "batch_tokens": 128}]
    sections: dict[str, dict[str, Any]] = {
        "data": {"path": None, "sources": sources, "plan": "pack", "document_mask": True, "max_epochs": 0.5},
        "model": {"dropout": 0.1},
        "train": {"steps": 250, "batch_ramp": ramp},
        "checkpoint": {"every": 10},
        "eval": {"every": 100},
    }
    undisturbed = finish(tmp_path, dataset, "undisturbed", **sections)
    config = write_config(tmp_path / "killed.yaml", tiny_settings(dataset, tmp_path / "killed", **sections))
    for kill_after in ("step   8/250", "step  27/250"):  # before the first checkpoint, after the ramp
        output = tmp_path / f"{kill_after[5:8].strip()}.txt"
        process = start_pretrain(config, output)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and kill_after not in (output.read_text() if output.exists() else ""):
            time.sleep(0.01)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, output.read_text()
    code, printed = run_pretrain(config)
    assert code == 0, printed
    assert "resuming from" in printed
    assert record(tmp_path / "killed") == record(undisturbed)
    assert final_tensors(tmp_path / "killed") == final_tensors(undisturbed)
    lines = [line for line in record(undisturbed) if "val_loss" in line]
    assert {f"val_loss/{dataset.name}", "val_loss/other", "val_bits_per_byte"} <= lines[-1].keys()
    assert lines[-1]["val_loss"] < lines[0]["val_loss"]
    assert "data: 30.00% other, " in printed
    assert re.search(r"warning: other will be read \d+\.\d times, more than data.max_epochs \(0.5\)", printed)


def test_a_signal_saves_the_last_finished_step(dataset: Path, tmp_path: Path) -> None:
    sections = {"train": {"steps": 400}, "checkpoint": {"every": 1000}, "eval": {"every": 1000}}
    undisturbed = finish(tmp_path, dataset, "undisturbed", **sections)
    run_dir = tmp_path / "stopped"
    config = write_config(tmp_path / "stopped.yaml", tiny_settings(dataset, run_dir, **sections))
    output = tmp_path / "stopped.txt"
    process = start_pretrain(config, output)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and "step  10/" not in (output.read_text() if output.exists() else ""):
        time.sleep(0.01)
    process.terminate()
    process.join(60)
    assert process.exitcode == 75, output.read_text()
    assert "go on with the same command: python pretrain.py" in output.read_text()
    saved = list_checkpoints(run_dir / "checkpoints")
    assert [int(saved[-1].name.removeprefix("step-"))] == [record(run_dir)[-1]["step"]]
    code, printed = run_pretrain(config)
    assert code == 0, printed
    assert record(run_dir) == record(undisturbed)
    assert final_tensors(run_dir) == final_tensors(undisturbed)


def test_intervals_leave_training_alone(dataset: Path, tmp_path: Path) -> None:
    often = finish(tmp_path, dataset, "often", model={"dropout": 0.1}, eval={"every": 1}, checkpoint={"every": 1})
    rarely = finish(
        tmp_path,
        dataset,
        "rarely",
        model={"dropout": 0.1},
        eval={"every": 7},
        checkpoint={"every": 5},
        log={"every": 3},
    )
    every = {line["step"]: line for line in record(often) if "loss" in line}
    some = {line["step"]: line for line in record(rarely) if "loss" in line}
    assert sorted(every) == list(range(1, 13))
    assert sorted(some) == [3, 6, 9, 12]
    assert {step: every[step] for step in some} == some
    assert final_tensors(often) == final_tensors(rarely)


def test_accumulation_changes_rounding_only(dataset: Path, tmp_path: Path) -> None:
    runs = {
        micro: record(finish(tmp_path, dataset, f"micro-{micro}", train={"micro_batch": micro}))
        for micro in (8, 4, 1, 3)  # 3 does not divide the 8 rows
    }
    for micro, lines in runs.items():
        for ours, reference in zip(lines, runs[8], strict=True):
            for key in {"loss", "grad_norm", "val_loss"} & set(reference):
                assert ours[key] == pytest.approx(reference[key], rel=1e-6), (micro, reference["step"], key)


def test_a_finished_run_is_left_alone_and_can_be_extended(dataset: Path, tmp_path: Path) -> None:
    horizon = {"optim": {"horizon_steps": 20}}
    run_dir = finish(tmp_path, dataset, "short", **horizon)
    before = (run_dir / "metrics.jsonl").read_bytes()
    code, printed = run_pretrain(tmp_path / "short.yaml")
    assert (code, (run_dir / "metrics.jsonl").read_bytes()) == (0, before)
    assert "already at step 12 of 12" in printed
    assert "learning rate" not in printed  # nothing is announced that will not be
    code, printed = run_pretrain(tmp_path / "short.yaml", "--train.steps", "20")
    assert code == 0, printed
    long = finish(tmp_path, dataset, "long", train={"steps": 20}, **horizon)
    losses = [(line["step"], line["loss"]) for line in record(run_dir) if "loss" in line]
    assert losses == [(line["step"], line["loss"]) for line in record(long) if "loss" in line]
    assert final_tensors(run_dir) == final_tensors(long)


@pytest.mark.slow
def test_compiled_run_saves_plain_names_and_resumes_uncompiled(dataset: Path, tmp_path: Path) -> None:
    small = {"model": {"n_layers": 1}, "optim": {"horizon_steps": 12}}
    plain = finish(tmp_path, dataset, "plain", **small)
    compiled = finish(tmp_path, dataset, "compiled", train={"compile": True, "steps": 6}, **small)
    code, printed = run_pretrain(tmp_path / "compiled.yaml", "--train.steps", "12", "--train.compile", "false")
    assert code == 0, printed
    assert set(final_tensors(compiled)) == set(final_tensors(plain))
    losses = [[line["loss"] for line in record(run) if "loss" in line] for run in (compiled, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
