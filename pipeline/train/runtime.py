"""Where a run happens: ranks, device, precision.

In: the configuration and the `Job` of this process. Out: a `Runtime` that the training step asks for sums over ranks
and autocast. Accelerate picks the device, reduces over ranks and feeds trackers.
"""

from __future__ import annotations

import gc
import os
import platform
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, assert_never

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration
from rich.console import Console
from torch import Tensor
from torch._inductor import config as inductor

from pipeline.config import Config, TrainConfig
from pipeline.credentials import mask, masked
from pipeline.errors import UserError
from pipeline.train.processes.ending import tell
from pipeline.train.processes.job import Job
from pipeline.train.processes.launched import Launch, prepare_libraries
from pipeline.train.processes.pulse import PATIENCE, Pulse

NOTICE = 60.0  # seconds after which a process group that does not come about is told of
GARBAGE_STEPS = 100  # steps between collections
LONG_STEP = 20.0  # seconds: with its checkpoint such a step hardly fits into the 30 s that torchrun leaves

_DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32, "fp64": torch.float64,
}  # fmt: skip


@dataclass(frozen=True)
class Runtime:
    """One process among `world_size`; `precision` is the resolved dtype of matrix products."""

    accelerator: Accelerator
    device: torch.device
    rank: int
    world_size: int
    precision: torch.dtype
    console: Console
    local_rank: int = 0
    local_world_size: int = 1
    job: Job = field(default_factory=Job.alone)

    @staticmethod
    def start(config: Config, job: Job | None = None) -> Runtime:
        """Join the process group and settle device and precision. Errors: a device that is not there.

        job: this process as `run_job` made it; without one it is alone.
        """
        job = Job.alone() if job is None else job
        own = device_of(config.train, job.launch)
        if config.train.deterministic:
            _use_deterministic_kernels()
        torch.set_float32_matmul_precision(_matmul_precision(config.train))
        job.pulse.limit = 60 * config.train.hang_minutes
        job.pulse.stacks = Path(config.run_dir) / "stacks"
        if config.train.max_minutes is not None and job.signal is not None and job.launch.rank == 0:
            job.signal.within(config.train.max_minutes)
        _join_group(job, own, alone_too=config.parallel.strategy in ("fsdp", "hsdp"))
        accelerator = _accelerator(config, own.type)
        if job.launch.world_size != accelerator.num_processes:
            launched = job.launch.world_size
            raise UserError(f"launched as one of {launched} ranks but joined a group of {accelerator.num_processes}")
        return Runtime(
            accelerator=accelerator,
            device=_numbered(accelerator.device),
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            precision=_precision(config.train, own.type),
            console=SteadyConsole(highlight=False, soft_wrap=True),
            local_rank=job.launch.local_rank,
            local_world_size=job.launch.local_world_size,
            job=job,
        )

    @property
    def pulse(self) -> Pulse:
        """Where the main thread says how far it has come."""
        return self.job.pulse

    @property
    def patience(self) -> timedelta:
        """How long ranks wait in an exchange; the pulse ends those that wait in vain before, and says why."""
        return _patience(self.job)

    @property
    def is_main(self) -> bool:
        """The rank that writes records and speaks."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """Matrix products in `precision`, reductions in float32; nothing to do in float32 and float64."""
        if self.precision.itemsize >= 4:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.precision)

    def seed(self, value: int) -> None:
        """Seed what this process draws from; `torch.manual_seed` asks for absent devices, too, in 2 ms each time."""
        torch.default_generator.manual_seed(value)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(value)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, element by element; `values` itself when alone."""
        return values if self.world_size == 1 else self.accelerator.reduce(values, reduction="sum")

    def number(self, value: float) -> Tensor:
        """() float64 on the device, put there without waiting for what the device is at."""
        return torch.full((), value, dtype=torch.float64, device=self.device)

    def sum_of_counts(self, count: int) -> int:
        """Sum of whole numbers over ranks; alone it needs no device, and waits for none."""
        return count if self.world_size == 1 else int(self.sum(self.number(count)).item())

    def any(self, flag: bool) -> bool:
        """True on every rank when it is on one."""
        return self.sum_of_counts(int(flag)) > 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.accelerator.wait_for_everyone()

    def after_step(self, step: int, *, seconds: float) -> None:
        """What is due between steps: the first has compiled and may have taken its time, garbage is collected."""
        self.job.steady()
        self.collect_garbage(step)
        launch = self.job.launch
        if seconds > LONG_STEP and launch.elastic and not launch.endings and self.job.once("long step"):
            self.say(
                f"warning: a step takes {seconds:.0f} s, and torchrun kills its ranks 30 s after SIGTERM: what is not "
                "saved by then is lost; use smaller batches or launch by launch/, which waits (said once)"
            )

    def collect_garbage(self, step: int) -> None:
        """Collect at the same step in all ranks: a rank that stops to collect holds up the others."""
        if gc.isenabled():
            gc.collect()
            gc.freeze()  # what the start has made stays: never look at it again
            gc.disable()
        elif step % GARBAGE_STEPS == 0:
            gc.collect()

    def stop(self) -> None:
        """Leave the process group; nothing may hold a wrapped model any more.

        DDP's reducer owns the group, too. Were it the last owner, the group would end while Python's lock is held
        and wait for its own thread, which may be waiting for that lock: seen with gloo, once in some hundred runs.
        """
        self.accelerator.free_memory()
        gc.unfreeze()
        gc.enable()
        gc.collect()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def say(self, message: str) -> None:
        """One line on the console, from the main rank only."""
        if self.is_main:
            self.console.print(mask(message), markup=False)

    @property
    def arithmetic(self) -> str:
        """How matrix products are computed, as states record it: `torch.bfloat16`, or `tf32` for rounded float32."""
        exact = self.device.type == "cpu" or torch.get_float32_matmul_precision() == "highest"
        return str(self.precision) if exact or self.precision != torch.float32 else "tf32"

    def describe(self) -> str:
        """Device, ranks and precision in words."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _cpu_name()
        ranks = "1 process" if self.world_size == 1 else f"{self.world_size} ranks"
        return f"{ranks} on {name}, {self.arithmetic.removeprefix('torch.')}"


def _use_deterministic_kernels() -> None:
    """The same bits in every run of the same program on the same kind of device."""
    torch.use_deterministic_algorithms(True)
    # every element is written, so filling would only cost a pass
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # set through its module
    inductor.deterministic = True  # no choice of kernels by a measurement, which another start may decide otherwise


class SteadyConsole(Console):
    """A console that goes quiet when nobody reads it any more (a dead `tee`, a lost terminal): training goes on."""

    def on_broken_pipe(self) -> None:
        """Where rich would end the program."""
        self.quiet = True
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())  # what other libraries print must not fail either


def device_of(config: TrainConfig, launch: Launch) -> torch.device:
    """The device of this process, after setting what libraries read when it starts. Raises UserError without it.

    A process that sees one GPU uses it: `srun --gpus-per-task=1` shows each task its own one, as number 0.
    """
    device = torch.device("cpu")
    if _device_type(config) == "cuda":
        count = torch.cuda.device_count()
        number = 0 if count == 1 else launch.local_rank
        if number >= count:
            raise UserError(
                f"{launch.who} is number {number} on its host, but may use {count} GPUs there; "
                "start as many processes per node as it has GPUs"
            )
        device = torch.device("cuda", number)
    prepare_libraries(device=str(device), deterministic=config.deterministic)
    return device


def _join_group(job: Job, device: torch.device, *, alone_too: bool) -> None:
    """Start the process group, in a session of the store that no earlier start of these ranks has written to.

    Accelerate would start it, but from MASTER_PORT: the store there may be older than this start (see `job.py`). So
    it would for one process of torchrun. alone_too: one process becomes a group as well, which sharding asks for.
    """
    launch = job.launch
    if launch.world_size == 1 and not (alone_too or launch.grouped):
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    job.assemble()
    with _told_if_slow(launch):
        dist.init_process_group(
            backend, store=job.store, rank=launch.rank, world_size=launch.world_size, timeout=_patience(job)
        )
        if launch.world_size > 1:
            dist.all_reduce(torch.zeros(1, device=device))  # NCCL connects at its first exchange


@contextmanager
def _told_if_slow(launch: Launch) -> Iterator[None]:
    """Say what to look at when ranks that have all reached rank 0 do not reach each other."""
    text = (
        f"the {launch.world_size} ranks have found rank 0, but have not connected to each other within {NOTICE:.0f} s; "
        "a firewall, or an interface that other machines do not reach: name the right one by GLOO_SOCKET_IFNAME and "
        "NCCL_SOCKET_IFNAME (docs/launch.md)"
    )
    timer = threading.Timer(NOTICE, tell, (text,))
    timer.daemon = True
    if launch.rank == 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _patience(job: Job) -> timedelta:
    return timedelta(seconds=2 * PATIENCE * job.pulse.limit + 60)


def _numbered(device: torch.device) -> torch.device:
    """With the number of a CUDA device: threads that are to use it must name it, for they begin with the first one."""
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


def _accelerator(config: Config, device_type: str) -> Accelerator:
    """Accelerate, with all that it would add left out. Errors: `accelerate launch` was told to use another engine."""
    # Constructed with one accumulation step: accelerate would divide the loss, we normalise by targets.
    # On a CPU `cpu=True` matters: without it each rank of torchrun would believe to be alone.
    accelerator = Accelerator(
        cpu=device_type == "cpu",
        mixed_precision="no",  # autocast is ours; what `accelerate launch` exports must not add a second one
        gradient_accumulation_steps=1,
        project_config=ProjectConfiguration(project_dir=config.run_dir, logging_dir=config.run_dir),
    )
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UserError(f"accelerate was told to use {kind.value}; launch without it, parallel.strategy decides here")
    return accelerator


def environment() -> dict[str, Any]:
    """What a start ran on: for the run folder's environment.json."""
    packages = ("torch", "accelerate", "numpy", "tokenizers", "datasets", "safetensors", "pydantic")
    return {
        "command": masked(sys.argv),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "cpu": _cpu_name(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "git": git_commit(),
    }


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: on a GPU those that PyTorch reserved there, else resident ones."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _device_type(config: TrainConfig) -> str:
    available = torch.cuda.is_available()
    match config.device:
        case "auto":
            return "cuda" if available else "cpu"
        case "cpu":
            return "cpu"
        case "cuda":
            if not available:
                raise UserError("train.device is cuda, but PyTorch finds no CUDA device; use train.device auto or cpu")
            return "cuda"
    assert_never(config.device)


def _matmul_precision(config: TrainConfig) -> str:
    """How float32 matrix products are rounded, in PyTorch's words."""
    return "high" if config.precision == "tf32" else "highest"


def _precision(config: TrainConfig, device_type: str) -> torch.dtype:
    if config.precision == "auto":
        native = torch.cuda.is_bf16_supported(including_emulation=False) if device_type == "cuda" else _cpu_has_bf16()
        return torch.bfloat16 if native else torch.float32
    if config.precision in ("fp16", "tf32") and device_type == "cpu":
        raise UserError(f"train.precision {config.precision} needs CUDA; on a CPU use bf16 or fp32")
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


def git_commit() -> str | None:
    """The commit that this code is, with "-dirty" when it was changed; None outside of a repository."""
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
