from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.ramp import Ramp
from pipeline.train.reporting.curves import draw_curves, smoothed
from pipeline.train.reporting.metrics import PEAK_TFLOPS, ConsoleLine, Meter, Record, device_peak_flops, read_record
from pipeline.train.reporting.trackers import Trackers
from pipeline.train.runtime import Runtime, SteadyConsole
from tests.support import run_pretrain, tiny_settings, write_config


def test_record_is_cut_back_to_the_resumed_step(tmp_path: Path) -> None:
    record = Record(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        record.write({"step": step, "loss": 1 / 3})
    with record.path.open("a") as file:
        file.write('{"step": 4, "lo')  # torn by a kill
    record.cut_after(2)
    record.write({"step": 3, "loss": 0.5})
    assert read_record(record.path) == [
        {"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 1 / 3}, {"step": 3, "loss": 0.5},
    ]  # fmt: skip


def test_an_evaluation_that_is_made_again_is_recorded_once(tmp_path: Path) -> None:
    """A start may be stopped again after it has made up for an evaluation and before its first checkpoint."""
    record = Record(tmp_path / "metrics.jsonl")
    lines = [{"step": 3, "val_loss": 3.0}, {"step": 6, "loss": 2.5}, {"step": 6, "val_loss": 2.0}]
    for line in lines:
        record.write(line)
    record.cut_after(6)
    assert read_record(record.path) == lines
    record.cut_after(6, evaluated=False)
    assert read_record(record.path) == lines[:2]


def test_a_torn_line_elsewhere_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 1 is not JSON"):
        read_record(path)


def test_meter_counts_all_but_the_first_step() -> None:
    meter = Meter(flops_per_token=10, peak_flops=1000.0)
    meter.count(tokens=100, seconds=50.0, waited=1.0)  # compiles
    assert meter.take() == {}
    meter.count(tokens=100, seconds=1.5, waited=0.5)
    meter.count(tokens=100, seconds=2.0, waited=0.0)
    assert meter.take() == {"tokens_per_second": 50.0, "step_seconds": 2.0, "data_wait_seconds": 0.25, "mfu": 0.5}
    meter.count(tokens=10, seconds=1.0, waited=0.0)
    assert meter.take()["tokens_per_second"] == 10.0


def test_peak_is_known_or_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert device_peak_flops(cpu, torch.bfloat16, override_tflops=None) is None
    assert device_peak_flops(cpu, torch.bfloat16, override_tflops=0.35) == 0.35e12
    expected = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-40GB": 312e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA L40": 181e12,
        "NVIDIA L4": 121e12,
        "NVIDIA H200": 989e12,
        "NVIDIA GH200 480GB": 989e12,
        "NVIDIA H20": 148e12,
        "NVIDIA GeForce RTX 5090": 209.5e12,
        # names that only resemble those of the table
        "NVIDIA A10G": None,
        "NVIDIA L400": None,
        "NVIDIA RTX A1000": None,
        "NVIDIA RTX A4000": None,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None,
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
    }
    found = {}
    for name in expected:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        found[name] = device_peak_flops(cuda, torch.bfloat16, override_tflops=None)
        assert device_peak_flops(cuda, torch.float32, override_tflops=None) is None
    assert found == expected


def test_no_entry_of_the_peak_table_hides_a_later_one() -> None:
    names = [name for name, _ in PEAK_TFLOPS]
    for place, name in enumerate(names):
        assert not any(earlier in name for earlier in names[:place]), name


def test_console_line_shows_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    line: dict[str, Any] = {"step": 20, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.5}
    # an hour is left: 40 steps of a smaller batch, then 60 of the full one
    ramp = Ramp(stages=((60, 100_000),), full=674_069)
    console = ConsoleLine(SteadyConsole(highlight=False, soft_wrap=True), total_steps=120, ramp=ramp)
    console.show({**line, "tokens_per_second": 12345.6, "step_seconds": 36.0, "data_wait_seconds": 3.6, "mfu": 0.434})
    console.show({"step": 20, "val_loss": 2.25, "val_bits_per_byte": 1.125})
    console.show({**line, "tokens_per_second": 12345.6, "step_seconds": 36.0, "data_wait_seconds": 3.6})
    console.show({"step": 20, "val_loss": 2.25, "val_loss/a/web": 2.5, "val_loss/[b]": 2.0, "val_bits_per_byte": 1.125})
    first, warning, second, *later = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning: 10% of the time was spent waiting for data (said once; ")
    assert first == ("step  20/120 loss 2.5000 lr 1.0e-3 norm 0.50 12.3k tok/s MFU 43% ETA 1h00m wait 10%")
    assert second == "step  20/120  validation loss 2.2500  1.1250 bits per byte"
    assert later == [
        "step  20/120 loss 2.5000 lr 1.0e-3 norm 0.50 12.3k tok/s ETA 1h00m wait 10%",
        "step  20/120 validation loss 2.2500 1.1250 bits per byte a/web 2.5000 [b] 2.0000",
    ]


def test_a_line_of_a_large_run_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """80 columns, in which nothing wraps, up to hundreds of thousands of steps and billions of tokens a second."""
    console = ConsoleLine(SteadyConsole(highlight=False, soft_wrap=True), total_steps=600_000, ramp=Ramp((), 491_520))
    for rate in (9_874.4, 52_149.0, 999_600.0, 12_345_678.0):
        for norm in (0.00312, 0.5123, 3.14159, 123.4):
            line = {"step": 123_456, "loss": 3.12345, "lr": 6e-4, "grad_norm": norm, "tokens_per_second": rate}
            console.show({**line, "mfu": 0.451, "step_seconds": 1.0, "data_wait_seconds": 0.0})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 16
    assert [line for line in printed if len(line) > 80] == []
    assert printed[4] == "step 123456/600000 loss 3.1235 lr 6.0e-4 norm 3e-3 52.1k tok/s MFU 45% ETA 51d"
    assert "1.00M tok/s" in printed[8]


def test_curves_are_drawn_and_need_at_least_one_line(tmp_path: Path) -> None:
    draw_curves([], tmp_path / "none.png", title="none")
    assert not (tmp_path / "none.png").exists()
    lines = [{"step": s, "loss": 3.0 / s, "lr": 0.1, "grad_norm": 1.0} for s in (1, 2, 3)]
    evaluations = [{"step": 2, "val_loss": 1.5}, {"step": 3, "val_loss": 1.4, "val_loss/web": 1.3}]  # a blend since 3
    draw_curves([*lines, *evaluations], tmp_path / "curves.png", title="run")
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_curves_are_smoothed_without_a_lag() -> None:
    values = [5.0 + (-1) ** step for step in range(200)] + [1.0 + (-1) ** step for step in range(200)]
    smooth = smoothed(values)
    assert len(smooth) == len(values)
    assert smooth[60:190] == pytest.approx([5.0] * 130, abs=0.2)
    assert smooth[199] == pytest.approx(3.0, abs=0.3), "the middle of a fall is where it was"
    assert smooth[220:] == pytest.approx([1.0] * 180, abs=0.2)
    assert smoothed([*values[:50], math.nan, *values[50:100]])[50] == pytest.approx(5.0, abs=0.3)
    assert smoothed([3.0, 1.0]) == [3.0, 1.0], "too few to smooth"


def test_trackers_are_fed_and_the_wandb_run_goes_on(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb offline and TensorBoard, over a resume; read back with TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = tiny_settings(dataset, tmp_path / "run", log={"every": 2, "trackers": ["wandb", "tensorboard"]})
    config = write_config(tmp_path / "run.yaml", settings)
    flags = ("--optim.horizon-steps", "12")
    code, printed = run_pretrain(config, "--train.steps", "6", *flags)
    assert code == 0, printed
    code, printed = run_pretrain(config, *flags)
    assert code == 0, printed
    assert "is left out from here on" not in printed
    run_id = json.loads((tmp_path / "run" / "environment.json").read_text())["run_id"]
    offline = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(offline) == 2
    assert all(folder.name.endswith(run_id) for folder in offline)
    events = list((tmp_path / "run").rglob("events.out.tfevents.*"))
    steps: dict[int, float] = {}
    for folder in {path.parent for path in events}:
        reader = EventAccumulator(str(folder))
        reader.Reload()
        if "loss" in reader.Tags()["scalars"]:
            steps.update({event.step: event.value for event in reader.Scalars("loss")})
    recorded = {
        line["step"]: line["loss"] for line in read_record(tmp_path / "run" / "metrics.jsonl") if "loss" in line
    }
    assert set(steps) == set(recorded) == {2, 4, 6, 8, 10, 12}
    assert all(steps[step] == pytest.approx(recorded[step], rel=1e-6) for step in steps)


class BrokenTracker:
    """A tracker that fails where it is told to."""

    def __init__(self, name: str, *, failing: str) -> None:
        self.name = name
        self.failing = failing
        self.logged: list[int] = []

    def log(self, values: dict[str, float], step: int) -> None:
        self._maybe_fail("log")
        self.logged.append(step)

    def finish(self) -> None:
        self._maybe_fail("finish")

    def _maybe_fail(self, place: str) -> None:
        if self.failing == place:
            raise RuntimeError(f"{place} failed")


class FakeAccelerator:
    logging_dir = "."

    def __init__(self, **failing: str) -> None:
        self.failing = failing
        self.made: dict[str, BrokenTracker] = {}
        self.log_with: list[Any] = []
        self.trackers: list[BrokenTracker] = []

    def init_trackers(self, *args: object, **kwargs: object) -> None:
        for name in self.log_with:
            if self.failing[str(name)] == "init":
                raise RuntimeError("init failed")
            self.made[str(name)] = BrokenTracker(str(name), failing=self.failing[str(name)])
            self.trackers.append(self.made[str(name)])


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_failing_tracker_is_said_once_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], failing: str
) -> None:
    config = Config.model_validate({"run_dir": str(tmp_path), "log": {"trackers": ["wandb", "tensorboard"]}})
    accelerator: Any = FakeAccelerator(wandb=failing, tensorboard="never")
    console = SteadyConsole(highlight=False, soft_wrap=True)
    runtime = Runtime(accelerator, torch.device("cpu"), rank=0, world_size=1, precision=torch.float32, console=console)
    trackers = Trackers(runtime, config, run_id="x", settings={})
    trackers.log({"loss": 1.0}, step=1)
    trackers.log({"loss": 1.0}, step=2)
    trackers.finish()
    assert (
        capsys.readouterr().out.count(f"wandb is left out from here on, metrics.jsonl goes on: {failing} failed") == 1
    )
    assert accelerator.made["tensorboard"].logged == [1, 2]


def test_a_tracker_that_is_not_installed_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.train.reporting.trackers.filter_trackers", lambda names, folder: [])
    config = Config.model_validate({"run_dir": str(tmp_path), "log": {"trackers": ["tensorboard"]}})
    accelerator: Any = FakeAccelerator()
    console = SteadyConsole(highlight=False, soft_wrap=True)
    runtime = Runtime(accelerator, torch.device("cpu"), rank=0, world_size=1, precision=torch.float32, console=console)
    Trackers(runtime, config, run_id="x", settings={}).log({"loss": 1.0}, step=1)
    assert "tensorboard is left out from here on, metrics.jsonl goes on: it is not installed" in capsys.readouterr().out


def test_a_record_without_its_checkpoints_is_set_aside(tmp_path: Path) -> None:
    record = Record(tmp_path / "metrics.jsonl")
    for number in (1, 2):
        record.write({"step": number})
        assert record.set_aside().name == f"metrics.{number}.jsonl"
    assert not record.path.exists()


def test_training_outlives_the_reader_of_its_console(capfd: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", nobody)
        console = SteadyConsole(highlight=False, soft_wrap=True)
        for _ in range(3):
            console.print("a line that nobody reads")
        assert console.quiet
