"""Where a run happens: ranks, device, precision, trackers.

In: the configuration and what the launcher put into the environment (read here and nowhere else). Out: a
`Runtime` that the training step asks for sums over ranks, autocast and gradient synchronisation.
Accelerate starts the process group, picks the device, wraps for DDP and feeds trackers.
"""

from __future__ import annotations

import gc
import os
import platform
import socket
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, filter_trackers
from accelerate.utils import DistributedType, ProjectConfiguration
from rich.console import Console
from torch import Tensor

from pipeline.config import Config, TrainConfig
from pipeline.errors import UserError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Runtime:
    """One process among `world_size`; `precision` is the resolved dtype of matrix products."""

    accelerator: Accelerator
    device: torch.device
    rank: int
    world_size: int
    precision: torch.dtype
    console: Console

    @staticmethod
    def start(config: Config) -> Runtime:
        """Join the process group and settle device and precision. Errors: a device that is not there."""
        device_type = _device_type(config.train)
        if config.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        # Constructed with one accumulation step: accelerate would divide the loss, we normalise by targets.
        # On a CPU `cpu=True` matters: without it each rank of torchrun would believe to be alone.
        accelerator = Accelerator(
            cpu=device_type == "cpu",
            mixed_precision="no",  # autocast is ours; what `accelerate launch` exports must not add a second one
            gradient_accumulation_steps=1,
            project_config=ProjectConfiguration(project_dir=config.run_dir, logging_dir=config.run_dir),
        )
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != accelerator.num_processes:
            raise UserError(f"launched as one of {launched} ranks but joined a group of {accelerator.num_processes}")
        if accelerator.distributed_type not in (
            DistributedType.NO,
            DistributedType.MULTI_CPU,
            DistributedType.MULTI_GPU,
        ):
            kind = accelerator.distributed_type.value
            raise UserError(f"accelerate was told to use {kind}; launch without it, parallel.strategy decides here")
        return Runtime(
            accelerator=accelerator,
            device=accelerator.device,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            precision=_precision(config.train, device_type),
            console=SteadyConsole(highlight=False, soft_wrap=True),
        )

    @property
    def is_main(self) -> bool:
        """The rank that writes records and speaks."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """Matrix products in `precision`, reductions in float32; nothing to do in float32."""
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.precision)

    def without_sync(self, model: torch.nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Keep gradients local until the last micro-batch, so that ranks communicate once per step."""
        return nullcontext() if last else self.accelerator.no_sync(model)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, element by element; `values` itself when alone."""
        return values if self.world_size == 1 else self.accelerator.reduce(values, reduction="sum")

    def sum_of_counts(self, count: int) -> int:
        """Sum of whole numbers over ranks; alone it needs no device, and waits for none."""
        if self.world_size == 1:
            return count
        return int(self.sum(torch.tensor(count, dtype=torch.float64, device=self.device)).item())

    def any(self, flag: bool) -> bool:
        """True on every rank when it is on one."""
        return self.sum_of_counts(int(flag)) > 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.accelerator.wait_for_everyone()

    def stop(self) -> None:
        """Leave the process group; nothing may hold a wrapped model any more.

        DDP's reducer owns the group, too. Were it the last owner, the group would end while Python's lock is held
        and wait for its own thread, which may be waiting for that lock: seen with gloo, once in some hundred runs.
        """
        self.accelerator.free_memory()
        gc.collect()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def say(self, message: str) -> None:
        """One line on the console, from the main rank only."""
        if self.is_main:
            self.console.print(message, markup=False)

    def describe(self) -> str:
        """Device, ranks and precision in words."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _cpu_name()
        ranks = "1 process" if self.world_size == 1 else f"{self.world_size} ranks"
        return f"{ranks} on {name}, {str(self.precision).removeprefix('torch.')}"


class SteadyConsole(Console):
    """A console that goes quiet when nobody reads it any more (a dead `tee`, a lost terminal): training goes on."""

    def on_broken_pipe(self) -> None:
        """Where rich would end the program."""
        self.quiet = True
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())  # what other libraries print must not fail either


class Trackers:
    """wandb and TensorBoard, fed from the record. What goes wrong in one is said once; it is left out from then on."""

    def __init__(self, runtime: Runtime, config: Config, *, run_id: str, settings: dict[str, Any]) -> None:
        self.runtime = runtime
        self.active: list[GeneralTracker] = []
        flat = {
            f"{section}.{key}": str(value)
            for section, keys in settings.items()
            if isinstance(keys, dict)
            for key, value in keys.items()
        }
        # The same wandb run goes on after a resume: its id belongs to the run folder.
        wandb = {"id": run_id, "resume": "allow", "dir": config.run_dir, "name": Path(config.run_dir).name}
        accelerator = runtime.accelerator
        for name in config.log.trackers:
            try:
                accelerator.trackers = []
                accelerator.log_with = filter_trackers([name], accelerator.logging_dir)
                accelerator.init_trackers(config.log.project, config=flat, init_kwargs={"wandb": wandb})
            except Exception as error:  # any failure of a tracker, whatever its type, must not stop training
                self._warn(name, error)
                continue
            if not accelerator.trackers:  # accelerate passes over what is not installed
                self._warn(name, ModuleNotFoundError("it is not installed"))
            self.active += accelerator.trackers

    def log(self, values: dict[str, Any], *, step: int) -> None:
        """Send numbers of one step."""
        for tracker in list(self.active):
            try:
                tracker.log(values, step=step)
            except Exception as error:  # as above
                self.active.remove(tracker)
                self._warn(tracker.name, error)

    def finish(self) -> None:
        """Let them write out what they hold."""
        for tracker in self.active:
            try:
                tracker.finish()
            except Exception as error:  # as above
                self._warn(tracker.name, error)

    def _warn(self, name: str, error: Exception) -> None:
        self.runtime.say(f"warning: {name} is left out from here on, metrics.jsonl goes on: {error}")


def environment() -> dict[str, Any]:
    """What a start ran on: for the run folder's environment.json."""
    packages = ("torch", "accelerate", "numpy", "tokenizers", "datasets", "safetensors", "pydantic")
    return {
        "command": sys.argv,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "cpu": _cpu_name(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "git": _git_commit(),
    }


def _device_type(config: TrainConfig) -> str:
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise UserError("train.device is cuda, but PyTorch finds no CUDA device; use train.device auto or cpu")
    return "cuda" if available and config.device != "cpu" else "cpu"


def _precision(config: TrainConfig, device_type: str) -> torch.dtype:
    if config.precision == "auto":
        native = torch.cuda.is_bf16_supported() if device_type == "cuda" else _cpu_has_bf16()
        return torch.bfloat16 if native else torch.float32
    if config.precision == "fp16" and device_type == "cpu":
        raise UserError("train.precision fp16 needs CUDA; on a CPU use bf16 or fp32")
    return _DTYPES[config.precision]


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices natively (AVX-512 BF16 or AMX)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} cores)" if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
