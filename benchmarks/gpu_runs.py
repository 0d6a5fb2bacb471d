"""Runs of `pretrain.py` as a user starts them, watched from outside.

In: a config and flags. Out: the exit code, the record, the wall-clock time at which each step's line was printed and
the peak of the memory in use on the device.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
_STEP = re.compile(r"^step +(\d+)/")

TINY = [
    "--model.n_layers", "2", "--model.n_heads", "2", "--model.d_model", "64", "--model.d_ff", "256",
    "--model.context_length", "64", "--train.batch_tokens", "2048", "--train.micro_batch", "8",
    "--train.precision", "fp32", "--train.compile", "false",
]  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where stages run: a prepared dataset, a folder for runs, tiny shapes on a CPU (`smoke`) or the real ones."""

    data: Path
    work: Path
    smoke: bool

    @property
    def device(self) -> torch.device:
        """The device under test."""
        return torch.device("cpu" if self.smoke else "cuda")


@dataclass(frozen=True)
class Training:
    """A run of pretrain.py. stamps: seconds from its start to the line of each step."""

    folder: Path
    code: int
    seconds: float
    stamps: dict[int, float]
    peak_bytes: int

    @property
    def record(self) -> list[dict[str, Any]]:
        """The lines of training steps."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if "loss" in line]

    @property
    def losses(self) -> list[float]:
        """The loss of each logged step."""
        return [line["loss"] for line in self.record]

    def step_seconds(self) -> dict[int, float]:
        """Wall-clock seconds from each step's line to the next one's."""
        steps = sorted(self.stamps)
        return {step: self.stamps[step] - self.stamps[step - 1] for step in steps if step - 1 in self.stamps}


def pretrain(
    place: Place, name: str, config: str, *flags: str, kill_after: int | None = None, torchrun: bool = False
) -> Training:
    """Run pretrain.py with `config` in the run folder `name`; its output is passed on.

    kill_after: SIGKILL it once the line of this step was printed. torchrun: start it by torchrun as one rank.
    """
    folder = place.work / name
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"] if torchrun else []
    command = [
        sys.executable, *launcher, "pretrain.py", f"configs/{config}.yaml",
        "--data.path", str(place.data), "--log.trackers", "--run_dir", str(folder), "--log.every", "1",
        *(TINY if place.smoke else []), *flags,
    ]  # fmt: skip
    began, stamps = perf_counter(), dict[int, float]()
    memory = _MemoryWatch(place.device)
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"},
    )  # fmt: skip
    assert process.stdout is not None, "its output is a pipe"
    for line in process.stdout:
        print(f"[{name}] {line}", end="", flush=True)
        if found := _STEP.match(line):
            step = int(found[1])
            stamps.setdefault(step, perf_counter() - began)
            if step == kill_after:
                process.kill()
    code = process.wait()
    return Training(folder, code, perf_counter() - began, stamps, memory.stop())


def short(steps: int, *, save: int | None = None) -> list[str]:
    """Flags of a run of `steps` steps that saves every `save` steps (default: at the end) and evaluates once."""
    every = str(save or steps)
    return [
        "--train.steps", str(steps), "--optim.horizon_steps", str(steps), "--optim.warmup_steps", "2",
        "--checkpoint.every", every, "--checkpoint.keep_every", every,
        "--eval.every", str(steps), "--eval.tokens", "40960",
    ]  # fmt: skip


def succeed(run: Training) -> Training:
    """The run, if it ended well. Errors: RuntimeError with its exit code."""
    if run.code:
        raise RuntimeError(f"pretrain.py ended with exit code {run.code} in {run.folder}; its output is above")
    return run


def middle(seconds: Sequence[float]) -> float:
    """The median of the steps that come after compiling and warming up: all but the first two."""
    return median(seconds[2:])


class _MemoryWatch:
    """The most memory in use on the device, by all processes, above what was in use when the watch began."""

    def __init__(self, device: torch.device) -> None:
        self._done = threading.Event()
        self._device = device
        self._peak = 0
        self._before = self._used()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _used(self) -> int:
        if self._device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info()
        return total - free

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            self._peak = max(self._peak, self._used() - self._before)

    def stop(self) -> int:
        """End the watch; the peak in bytes."""
        self._done.set()
        self._thread.join()
        return self._peak
