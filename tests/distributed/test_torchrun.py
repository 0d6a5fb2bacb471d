"""`torchrun pretrain.py` as a user types it: every rank starts its own Python. Other tests fork ranks, for speed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from pipeline.train.saving.checkpoint import list_checkpoints, load_model
from tests.strangers import wait_until
from tests.support import end_tree, record, run_pretrain, tiny_settings, write_config

ROOT = Path(__file__).parent.parent.parent
SOON = 30.0  # seconds in which all ranks of a killed job must have ended
# Stands for a library that takes long to be imported; the rank VICTIM is killed meanwhile.
ACCELERATE = """
import os, pathlib, signal, time
rank = os.environ["RANK"]
pathlib.Path(os.environ["FOLDER"], rank).touch()
while not all(pathlib.Path(os.environ["FOLDER"], other).exists() for other in "01"):
    time.sleep(0.05)
if rank == os.environ.get("VICTIM"):
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(100)
"""


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
    """The shares of 3 ranks are uneven; the whole is the run of one process.

    In float64: AdamW makes whole steps of gradients that are 0 but for rounding, on some CPUs more than on others.
    """
    configs = {
        name: write_config(
            tmp_path / f"{name}.yaml",
            tiny_settings(
                dataset, tmp_path / name, train={"micro_batch": 2, "precision": "fp64"}, optim={"horizon_steps": 12}
            ),
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
            assert line[key] == pytest.approx(expected[key], rel=1e-9), (expected["step"], key)
    weights = [
        load_model(list_checkpoints(tmp_path / run / "checkpoints")[-1], device=torch.device("cpu"))[0].state_dict()
        for run in ("ranks", "alone")
    ]
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, atol=1e-9, rtol=1e-9)


Start = Callable[..., tuple[subprocess.Popen[bytes], Path]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts torchrun; it and the file that the ranks print into. Nothing of it outlives the test."""
    begun: list[subprocess.Popen[bytes]] = []

    def begin(number: int, config: Path, **environment: str) -> tuple[subprocess.Popen[bytes], Path]:
        output = tmp_path / "output.txt"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*command, "pretrain.py", str(config)], cwd=ROOT, stdout=file, stderr=file,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, start_new_session=True,
            )  # fmt: skip
        begun.append(process)
        return process, output

    yield begin
    for process in begun:
        end_tree(process.pid)
        process.wait()


def slow_to_import(folder: Path) -> dict[str, str]:
    """An environment in which both ranks are held up by an import; they leave files that bear their numbers."""
    (folder / "accelerate.py").write_text(ACCELERATE)
    return {"PYTHONPATH": str(folder), "FOLDER": str(folder)}


def kill_torchrun(process: subprocess.Popen[bytes], output: Path) -> None:
    """SIGKILL, and wait until its ranks have ended by themselves."""
    ranks = psutil.Process(process.pid).children()
    assert ranks != []
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(ranks, timeout=SOON)
    for rank in left:
        end_tree(rank.pid)
    assert left == [], output.read_text()
    assert "ends because torchrun on " in output.read_text()
    assert "is gone" in output.read_text()


@pytest.mark.slow
def test_ranks_end_with_a_torchrun_that_is_killed_while_they_import(start: Start, tmp_path: Path) -> None:
    process, output = start(2, tmp_path / "none.yaml", **slow_to_import(tmp_path))
    wait_until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists(), seconds=60, what="no ranks")
    kill_torchrun(process, output)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_rank_that_is_killed_while_it_imports_is_missed(victim: str, start: Start, tmp_path: Path) -> None:
    process, output = start(2, tmp_path / "none.yaml", **slow_to_import(tmp_path), VICTIM=victim)
    wait_until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists(), seconds=60, what="no ranks")
    ranks = psutil.Process(process.pid).children()
    assert process.wait(SOON) == 1, output.read_text()
    assert not any(rank.is_running() for rank in ranks)


@pytest.mark.slow
def test_one_rank_ends_with_its_torchrun(start: Start, dataset: Path, tmp_path: Path) -> None:
    """It has no other rank whose end would tell it, and would go on for ever, holding the run's lock."""
    settings = tiny_settings(dataset, tmp_path / "run", train={"steps": 100_000}, checkpoint={"every": 100_000})
    process, output = start(1, write_config(tmp_path / "a.yaml", settings))
    wait_until((tmp_path / "run" / "metrics.jsonl").exists, seconds=60, what=output.read_text())
    kill_torchrun(process, output)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["status"], status["exit_code"]) == ("failed", 124)
