"""Two ranks under torchrun's agent, one of which fails, dies or sleeps: all end soon, and the cause is told once."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import pipeline.train.runtime as runtime_module
from pipeline.train.saving.checkpoint import list_checkpoints, verify
from tests.distributed.faulty import act_of, at
from tests.support import (
    FORKS,
    _print_into,
    make_dataset,
    record,
    run_main,
    run_pretrain,
    run_ranks,
    tiny_settings,
    write_config,
)

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.slow

LIMIT = 4.0  # seconds without progress
SOON = 30.0  # seconds in which all must have ended

KINDS = ("raises", "is killed", "sleeps")


def settings_of(dataset: Path, run_dir: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    return tiny_settings(dataset, run_dir, **{"train": {"hang_minutes": LIMIT / 60, "micro_batch": 2}, **sections})


def run_with(place: str, what: str, config: Path, *, rank: int = 1) -> tuple[int, str]:
    """The exit code and what the ranks printed, without the agent's own report; the end must come soon."""
    when, output = config.with_suffix(".when"), config.with_suffix(".txt")
    fault = partial(at, place, act_of(what), rank=rank, when=when)
    code, printed = run_ranks(2, str(config), output=output, before=fault)
    assert when.exists(), printed
    assert time.monotonic() - float(when.read_text()) < SOON
    return code, of_ranks(printed)


def of_ranks(printed: str) -> str:
    """Without what the agent reports of its ranks: log lines, and its own exception at the end."""
    return re.sub(r"(?m)^[EW]\d{4} .*\n?", "", printed.split("\nProcess ")[0])


def status_of(run_dir: Path) -> tuple[str, int]:
    found = json.loads((run_dir / "status.json").read_text())
    return found["status"], found["exit_code"]


PLACES = ("data", "step 3, micro-batch", "evaluation on", "saving step 4")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_a_rank_that_fails_ends_all(place: str, kind: str, dataset: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "a.yaml", settings_of(dataset, tmp_path / "run"))
    code, printed = run_with(place, kind, config)
    assert code != 0
    assert printed.count("Traceback") == (kind == "raises"), printed
    if kind == "raises":
        assert printed.count("rank 1 on ") >= 1
        assert printed.count("in injected") == 1
        assert status_of(tmp_path / "run") == ("failed", 1)
    elif kind == "is killed":
        assert re.search(r"rank 1 on \S+( failed)?: it is gone without a word", printed), printed
        assert status_of(tmp_path / "run") == ("failed", 124)
    elif kind == "sleeps":
        assert printed.count("error: no progress for") == 1, printed
        late = printed.split("error: no progress for")[1]
        assert "    rank 1 on " in late
        assert "in asleep" in late or place == "data", "a thread reads ahead: the main thread waits for it"
        stacks = {file.name: file.read_text() for file in (tmp_path / "run" / "stacks").iterdir()}
        assert list(stacks) != []
        assert "in asleep" in stacks["rank-1.txt"]
        assert status_of(tmp_path / "run") == ("failed", 124)
    for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints"):
        assert verify(checkpoint) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_while_starting_ends_all(rank: int, dataset: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "a.yaml", settings_of(dataset, tmp_path / "run"))
    code, printed = run_with("start", "raises", config, rank=rank)
    assert code != 0
    assert printed.count("Traceback") == printed.count("in injected") == 1
    assert f"rank {rank} on " in printed


def test_a_checkpoint_that_cannot_be_written_is_told_once(dataset: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "a.yaml", settings_of(dataset, tmp_path / "run"))
    code, printed = run_with("flush", "raises", config)
    assert code != 0
    assert printed.count("in injected") == 1, printed
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


def test_a_mistake_is_told_once(dataset: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "a.yaml", settings_of(dataset, tmp_path / "run"))
    for number, flags in enumerate([("--parallel.strategy", "single"), ("--data.path", str(tmp_path / "none"))]):
        code, printed = run_ranks(2, str(config), *flags, output=tmp_path / f"{number}.txt")
        assert code != 0
        assert printed.count("error: ") == 1, printed
        assert "Traceback" not in of_ranks(printed)


def poison(rank: int) -> None:
    """In that rank the loss of the third step's second micro-batch is not a number."""
    if int(os.environ["RANK"]) == rank:
        import torch

        from pipeline.train.step import Trainer

        backward = Trainer._backward

        def poisoned(self: Trainer, *arguments: Any, **named: Any) -> Any:
            losses = backward(self, *arguments, **named)
            if named["step"] == 3:
                losses[1] = torch.nan
            return losses

        Trainer._backward = poisoned  # type: ignore[method-assign]


def test_documents_are_named_once_by_the_rank_that_had_them(dataset: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "a.yaml", settings_of(dataset, tmp_path / "run"))
    code, printed = run_ranks(2, str(config), output=tmp_path / "o.txt", before=partial(poison, 1))
    assert code != 0
    assert printed.count("error: step 3: loss nan") == 1, printed
    assert printed.count("  rows [") == 1
    rows = printed.split("  rows [")[1].split("]")[0]
    assert rows == "22, 23", "of 8 rows rank 1 has the last 4, two a micro-batch"
    assert "another rank" not in printed


SIGNALS = [
    ("start", "SIGTERM rank"),
    ("step 7, micro-batch", "SIGTERM agent"),
    ("step 7, micro-batch", "SIGUSR1 rank"),  # no evaluation follows, in which ranks agree, too
    ("evaluation on", "SIGINT rank"),
    ("saving step 8", "SIGTERM agent"),
]
STOPPED = {"step": 7, "evaluation": 5, "saving": 9}  # after which step; ranks agree on it in the next loss


def torchrun(place: str, what: str, config: Path) -> tuple[int, str]:
    """As `run_with`, by torchrun itself: it alone takes a rank's exit code 0 for what it is, however the rank ended."""
    when = config.with_suffix(".when")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    launched = subprocess.run(
        [*command, "tests.distributed.faulty", place, what, "1", str(when), str(config)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
    )  # fmt: skip
    assert when.exists(), launched.stdout
    assert time.monotonic() - float(when.read_text()) < SOON
    return launched.returncode, launched.stdout


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_config(folder / "a.yaml", settings_of(dataset, folder / "run"))
    code, printed = run_ranks(2, str(config), output=folder / "o.txt")
    assert code == 0, printed
    return folder / "run"


def final_files(run_dir: Path) -> dict[str, bytes]:
    last = list_checkpoints(run_dir / "checkpoints")[-1]
    return {str(file.relative_to(last)): file.read_bytes() for file in sorted(last.rglob("*.safetensors"))}


@pytest.mark.parametrize(("place", "what"), SIGNALS)
def test_a_signal_saves_the_last_step_of_all_ranks(
    place: str, what: str, undisturbed: Path, dataset: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    config = write_config(tmp_path / "a.yaml", settings_of(dataset, run_dir))
    if what.endswith("rank"):
        code, printed = torchrun(place, what, config)
        assert code == 0, printed  # to torchrun a stop is no failure
    else:
        _, printed = run_with(place, what, config)
    if place == "start":
        assert printed.count("before the first step was done, so nothing was lost") == 1, printed
        assert not (run_dir / "status.json").exists() or status_of(run_dir) == ("stopped", 75)
        assert list_checkpoints(run_dir / "checkpoints") == []
    else:
        again = "everything is saved; go on with the same command: torchrun --standalone --nproc_per_node=2 pretrain.py"
        assert printed.count(again) == 1, printed
        assert status_of(run_dir) == ("stopped", 75)
        stopped = STOPPED[place.split()[0]]
        assert f"stopped after step {stopped}" in printed
        assert list_checkpoints(run_dir / "checkpoints")[-1].name == f"step-{stopped:08}"
        assert record(run_dir)[-1]["step"] == stopped
    code, printed = run_ranks(2, str(config), output=tmp_path / "again.txt")
    assert code == 0, printed
    assert record(run_dir) == record(undisturbed)
    assert final_files(run_dir) == final_files(undisturbed)


def test_what_torchrun_starts_again_goes_on(undisturbed: Path, dataset: Path, tmp_path: Path) -> None:
    """In the store that the first start has left behind."""
    config = write_config(tmp_path / "a.yaml", settings_of(dataset, tmp_path / "run"))
    fault = partial(at, "step 7, micro-batch", act_of("raises"), rank=1, when=tmp_path / "when")
    code, printed = run_ranks(2, str(config), output=tmp_path / "o.txt", before=fault, max_restarts=1)
    assert code == 0, printed
    assert printed.count("in injected") == 1
    assert printed.count("resuming from") == 1
    assert record(tmp_path / "run") == record(undisturbed)
    assert final_files(tmp_path / "run") == final_files(undisturbed)


def as_srun_does(rank: int, port: int, config: str, output: str, place: str, what: str) -> None:
    """A task of srun, which has no agent: rank 0 serves the store."""
    _print_into(output)
    step = {"SLURM_STEP_NUM_TASKS": 2, "SLURM_STEP_TASKS_PER_NODE": 2, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}
    places = {"SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": port, "RANK": rank}
    os.environ.update({name: str(value) for name, value in {**step, **places}.items()})
    at(place, act_of(what), rank=0, when=Path(output).with_suffix(".when"))
    run_main([config])


@pytest.mark.parametrize(
    ("place", "what", "codes"),
    [
        ("nowhere", "raises", [0, 0]),
        ("step 3, micro-batch", "is killed", [-9, 124]),
        ("step 3", "SIGTERM rank", [75, 75]),
    ],
)
def test_tasks_of_srun_are_a_job(place: str, what: str, codes: list[int], dataset: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "a.yaml", settings_of(dataset, tmp_path / "run"))
    found, printed = run_tasks([config, config], tmp_path, place=place, what=what)
    assert found == codes, printed
    assert "Traceback" not in printed
    assert "2 ranks, alike in settings" in printed
    assert ("rank 0 on" in printed) == (what == "is killed"), printed


def run_tasks(
    configs: list[Path], folder: Path, *, place: str, what: str, task: Callable[..., None] = as_srun_does
) -> tuple[list[int | None], str]:
    """Exit codes and what was printed of tasks of srun, each with a config of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    outputs = [str(folder / f"{rank}.txt") for rank in range(len(configs))]
    arguments = [(rank, port, str(config), outputs[rank], place, what) for rank, config in enumerate(configs)]
    tasks = [FORKS.Process(target=task, args=one) for one in arguments]
    for one in tasks:
        one.start()
    for one in tasks:
        one.join(60)
    return [one.exitcode for one in tasks], "".join(Path(output).read_text() for output in outputs)


def test_ranks_that_do_not_belong_together_are_refused(dataset: Path, tmp_path: Path) -> None:
    """Nodes with other data, or with a config that somebody has edited on one of them, would train nonsense."""
    other = make_dataset(tmp_path / "other", seed=2)
    for name, values in (
        ("optim.lr", settings_of(dataset, tmp_path / "run", optim={"lr": 1e-3})),
        ("data", settings_of(other, tmp_path / "run")),
    ):
        config = write_config(tmp_path / "a.yaml", settings_of(dataset, tmp_path / "run"))
        edited = write_config(tmp_path / "b.yaml", values)
        codes, printed = run_tasks([config, edited], tmp_path, place="nowhere", what="raises")
        assert codes == [2, 2], printed
        assert "Traceback" not in printed
        assert name in printed
        assert "rank 1" in printed
        assert not (tmp_path / "run").exists()


def differs_in_torch(rank: int, port: int, config: str, output: str, place: str, what: str) -> None:
    """Another PyTorch in rank 1, whose process group would never come about."""
    if rank == 1:
        torch.__version__ = "0.1"
    torch.distributed.init_process_group = dozes  # type: ignore[assignment]
    as_srun_does(rank, port, config, output, place, what)


def dozes(*arguments: Any, **named: Any) -> None:
    time.sleep(100)


def test_ranks_are_compared_before_the_process_group(dataset: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "a.yaml", settings_of(dataset, tmp_path / "run"))
    codes, printed = run_tasks([config] * 2, tmp_path, place="nowhere", what="raises", task=differs_in_torch)
    assert codes == [2, 2], printed
    assert "torch: rank 1 on " in printed


@pytest.mark.parametrize("what", ["no data", "no config"])
def test_a_mistake_on_one_host_ends_all(what: str, dataset: Path, tmp_path: Path) -> None:
    """A node on which the data is not mounted, or the config does not lie: nobody waits for its ranks."""
    config = write_config(tmp_path / "a.yaml", settings_of(dataset, tmp_path / "run"))
    other = tmp_path / "b.yaml"
    if what == "no data":
        write_config(other, settings_of(tmp_path / "none", tmp_path / "run"))
    began = time.monotonic()
    codes, printed = run_tasks([config, other], tmp_path, place="nowhere", what="raises")
    assert codes == [124, 2], printed
    assert time.monotonic() - began < SOON
    assert printed.count("error: ") == 1, printed
    assert re.search(r"rank 0 on \S+ ends because rank 1 on \S+ failed: ", printed), printed


def hears_nothing_of_the_others(rank: int, port: int, config: str, output: str, place: str, what: str) -> None:
    """As if gloo of one could not reach that of the other."""
    runtime_module.NOTICE = 0.5
    join = torch.distributed.init_process_group

    def slowly(*arguments: Any, **named: Any) -> None:
        time.sleep(2)
        join(*arguments, **named)

    torch.distributed.init_process_group = slowly  # type: ignore[assignment]
    as_srun_does(rank, port, config, output, place, what)


def test_a_process_group_that_does_not_come_about_is_told_of(dataset: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "a.yaml", settings_of(dataset, tmp_path / "run"))
    codes, printed = run_tasks([config] * 2, tmp_path, place="nowhere", what="raises", task=hears_nothing_of_the_others)
    assert codes == [0, 0], printed
    assert printed.count("name the right one by GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME") == 1


def test_a_signal_while_compiling_ends_all_at_once(dataset: Path, tmp_path: Path) -> None:
    sections = {"train": {"compile": True}}
    config = write_config(tmp_path / "a.yaml", tiny_settings(dataset, tmp_path / "run", **sections))
    _, printed = run_with("compile", "SIGTERM agent", config)
    assert printed.count("stopped by SIGTERM before the first step was done, so nothing was lost") == 1, printed
    assert "step  1/12" not in printed
    assert "Traceback" not in printed
    assert status_of(tmp_path / "run") == ("stopped", 75)
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


@pytest.mark.parametrize("ranks", [1, 2])
def test_time_is_up(ranks: int, dataset: Path, tmp_path: Path) -> None:
    train = {"steps": 100_000, "max_minutes": 0.05}
    config = write_config(tmp_path / "a.yaml", settings_of(dataset, tmp_path / "run", train=train))
    if ranks == 1:
        code, printed = run_pretrain(config)
        assert code == 75, printed
    else:  # rank 0 has the watch
        codes, printed = run_tasks([config] * 2, tmp_path, place="nowhere", what="raises")
        assert codes == [75, 75], printed
    assert status_of(tmp_path / "run") == ("stopped", 75)
    assert "everything is saved; go on with the same command" in printed
    assert list_checkpoints(tmp_path / "run" / "checkpoints") != []
