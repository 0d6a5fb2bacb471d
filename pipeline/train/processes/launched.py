"""How this process was started: alone, or as one of many by torchrun, accelerate or srun.

In: the environment, read here and nowhere else. Out: a `Launch`; and what libraries and torchrun look for in the
environment, set before they do. Under srun the names of torchrun are derived from SLURM's.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from pipeline.errors import EXIT_STOPPED, UserError

# Where ranks leave their exit code for `launch.ranks`, which started torchrun: set by it alone, and no option of a run.
_ENDINGS = "PRETRAIN_ENDINGS"
_NCCL_ABORT = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
_DAY = 24 * 60 * 60
# Sizes that other launchers announce. A world of one among several such tasks would train the same run several times.
_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Launch:
    """One of `world_size` processes, `local_world_size` of them on this host.

    address, port: where rank 0 (or torchrun's agent on its node, then `agent_store`) serves the store that ranks meet
    in. elastic: started by torchrun, which starts ranks again that end with another code than 0; parent: its process
    id then, else 0. grouped: LOCAL_RANK is set, which makes accelerate start a process group even for one process.
    endings: the file in which `launch.ranks` looks for the exit code of this start, if that launched it.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = ""
    port: int = 0
    agent_store: bool = False
    elastic: bool = False
    parent: int = 0
    grouped: bool = False
    host: str = ""
    endings: str = ""

    @property
    def stopped_code(self) -> int:
        """Exit code of a process that was asked to stop: to torchrun that is no failure, or it would start it again."""
        return 0 if self.elastic else EXIT_STOPPED

    @property
    def serves(self) -> bool:
        """Whether the store lives in this process."""
        return self.world_size > 1 and self.rank == 0 and not self.agent_store

    @property
    def orphaned(self) -> bool:
        """Whether the torchrun that started this process has died: the kernel gives its children another parent."""
        return self.parent != 0 and os.getppid() != self.parent

    @property
    def one_host(self) -> bool:
        """Whether torchrun started all ranks on this host; other launchers may not say how many are here."""
        return self.elastic and self.world_size == self.local_world_size

    @property
    def launcher(self) -> str:
        """What starts this many processes, to stand before the script; on several nodes only its name is known here."""
        if self.elastic:
            return f"torchrun --standalone --nproc_per_node={self.world_size}" if self.one_host else "torchrun ..."
        return "srun ... python" if self.world_size > 1 else "python"

    @property
    def who(self) -> str:
        """This process in a message."""
        return f"rank {self.rank} on {self.host}" if self.world_size > 1 else "this process"


def read_launch() -> Launch:
    """The launch of this process; under srun also exports it the way torchrun does. Errors: see `launch_of`."""
    launch = launch_of(os.environ, host=socket.gethostname())
    if launch.elastic:
        launch = replace(launch, parent=_parent(os.getpid()))
    if launch.world_size > 1:
        os.environ.update(
            RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size), LOCAL_RANK=str(launch.local_rank),
            LOCAL_WORLD_SIZE=str(launch.local_world_size), MASTER_ADDR=launch.address, MASTER_PORT=str(launch.port),
        )  # fmt: skip
    return launch


@cache
def _parent(process: int) -> int:
    """Who started this `process`, as it was first asked: a torchrun that dies later is then known to be gone."""
    assert process == os.getpid(), "a process asks for itself; a fork of it asks anew"
    return os.getppid()


def launch_of(environment: Mapping[str, str], *, host: str) -> Launch:
    """What an environment says. Errors: half a launch; a world of one among several tasks; a rank outside its world."""
    elastic, endings = "TORCHELASTIC_RUN_ID" in environment, _endings(environment)
    grouped = environment.get("LOCAL_RANK", "-1") != "-1"
    srun = int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "WORLD_SIZE" not in environment
    found = _from_slurm(environment) if srun else dict(environment)
    world_size = _number(found, "WORLD_SIZE", default=1)
    if world_size == 1:
        _refuse_lonely(environment)
        return Launch(host=host, elastic=elastic, grouped=grouped, endings=endings)
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    if nodes > 1 and environment.get("GROUP_WORLD_SIZE") == "1":
        raise UserError(
            f"srun started torchrun on {nodes} nodes, but each made a world of its own with {world_size} ranks; give "
            f"torchrun --nnodes {nodes} and a common --rdzv-endpoint (see launch/)"
        )
    launch = Launch(
        rank=_number(found, "RANK"),
        world_size=world_size,
        local_rank=_number(found, "LOCAL_RANK"),
        local_world_size=_number(found, "LOCAL_WORLD_SIZE", default=1 if nodes > 1 else world_size),
        address=found.get("MASTER_ADDR", "127.0.0.1"),
        port=_number(found, "MASTER_PORT", default=29500),
        agent_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        elastic=elastic,
        grouped=grouped,
        host=host,
        endings=endings,
    )
    if not (0 <= launch.rank < launch.world_size and 0 <= launch.local_rank < launch.local_world_size):
        raise UserError(
            f"rank {launch.rank} (local {launch.local_rank}) does not lie in a world of {launch.world_size} with "
            f"{launch.local_world_size} on this host; look at RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE"
        )
    return launch


def for_torchrun(endings: Path) -> dict[str, str]:
    """The environment of a torchrun that waits as long as ranks save, and whose ranks leave their codes in `endings`.

    After SIGTERM torchrun sends SIGKILL, by default 30 s later; the limit is the cluster's, not its. torch
    2.13 looks at this variable, 2.11 does not. torchrun would set NCCL's error handling to 1 in its ranks.
    """
    defaults = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_DAY), _NCCL_ABORT: "0"}
    return {**defaults, **os.environ, _ENDINGS: str(endings)}


def _endings(environment: Mapping[str, str]) -> str:
    """One file for each start of the ranks: torchrun may start them several times."""
    folder, start = environment.get(_ENDINGS, ""), environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"{folder}/{start}" if folder else ""


def prepare_allocator() -> None:
    """Let the segments of CUDA's allocator grow, unless the user chose otherwise. Call it before `import torch`.

    Segments that grow do not break up memory when sizes vary: evaluation, saving, the last micro-batch. PyTorch reads
    the variable once, while it is imported.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the name of older releases
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def prepare_libraries(*, device: str, deterministic: bool) -> None:
    """Set what NCCL and accelerate read when they start; what the user set stays, but for the device.

    device: of this process, such as `cuda:0`; accelerate would take the one whose number is LOCAL_RANK.
    """
    os.environ["ACCELERATE_TORCH_DEVICE"] = device
    # NCCL's own watchdog would abort the process before ours has named the late rank and exits with 124. torchrun sets
    # 1 where the user set nothing; launch.ranks sets 0 there, so that below it a 1 is the user's.
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and _ENDINGS not in os.environ
    if by_torchrun and os.environ.get(_NCCL_ABORT) == "1":
        os.environ[_NCCL_ABORT] = "0"
    os.environ.setdefault(_NCCL_ABORT, "0")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _number(environment: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not text.strip().isdecimal():
        told = f"it is {text!r}" if name in environment else "it is not set"
        raise UserError(f"WORLD_SIZE says that there are several processes, so {name} must be a number, but {told}")
    return int(text)


def _refuse_lonely(environment: Mapping[str, str]) -> None:
    for name in _TASKS:
        tasks = environment.get(name, "1")
        if tasks.isdecimal() and int(tasks) > 1:
            raise UserError(
                f"started as one of {tasks} tasks ({name}), but as a world of one: each would train the whole run. "
                "Start one task, or all as one job by srun or torchrun (see launch/)"
            )


def _from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of torchrun for a task of srun. Source: srun(1), "output environment variables"."""
    node = int(environment.get("SLURM_NODEID", "0"))
    job = environment.get("SLURM_JOB_ID", "0")
    derived = {
        "RANK": environment.get("SLURM_PROCID", ""),
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", ""),
        "LOCAL_WORLD_SIZE": str(tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))[node]),
        "MASTER_ADDR": first_host(environment.get("SLURM_STEP_NODELIST", "127.0.0.1")),
        "MASTER_PORT": str(20000 + int(re.sub(r"\D", "", job) or "0") % 20000),  # below the ports of clients
    }
    return {**derived, **{name: environment[name] for name in derived if name in environment}}


def tasks_per_node(text: str) -> list[int]:
    """SLURM's `2(x3),1` is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or "1")
    return counts


def first_host(text: str) -> str:
    """The first of SLURM's `node[007-009,12],other` is node007."""
    prefix, bracket, rest = text.partition("[")
    if "," in prefix or not bracket:
        return prefix.split(",")[0]
    first = re.split(r"[-,\]]", rest, maxsplit=1)[0]
    return prefix + first + rest.partition("]")[2].split(",")[0]
