"""The launch scripts do what they say, and the manifests are what their readers take."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

import launch.torchrun as torchrun_module
from launch.ranks import STOPS, Agent, code_left, exit_code
from pipeline.data.dataset import open_dataset
from pipeline.errors import EXIT_HUNG, EXIT_STOPPED, EXIT_USER_ERROR
from pipeline.status import Status, read_status
from pipeline.train.processes.ending import hand_over
from tests.support import end_tree, record, run_ranks, tiny_settings, write_config

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
SBATCH = """#!/bin/sh
for argument; do printf '%s\\0' "$argument"; done >> "$JOBS"; printf '\\n' >> "$JOBS"
echo 4711
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then printf 'node07\\nnode08\\n'; else echo "$*" >> "$FOLDER/requeued"; fi
"""
# A step that ends with the code of its first argument; at a signal with 75, half a second later, as one that saves.
SRUN = """#!/bin/bash
trap 'sleep 0.5; exit 75' USR1
printf '%s\\n' "$HEAD $NODES" "$@" > "$FOLDER/called"
[ "${!#}" = run ] || exit "${!#}"
for i in $(seq 200); do sleep 0.05; done
"""
# As srun: runs what follows its options, and hands the signal on.
SRUN_FOR_REAL = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
"$@" & step=$!
trap 'kill -USR1 $step' USR1
wait $step; code=$?
while kill -0 $step 2> /dev/null; do wait $step; code=$?; done
exit $code
"""
STEPS = 150  # some seconds of two ranks: time to stop them
# "finished" beside a torchrun that failed: it lost the other nodes when they had left
CODES = {
    (0, "finished", 0, False): 0,
    (1, "finished", 0, False): 0,
    (0, "stopped", 75, True): 75,
    (0, "stopped", 75, False): 75,
    (1, "stopped", 75, True): 75,
    (1, "failed", 2, False): 2,
    (1, "failed", 124, True): 124,
    (0, "failed", 1, False): 1,
    (1, "running", None, False): 1,
    (0, "running", None, True): 1,
    (-9, "running", None, True): 137,
    (1, None, None, False): 1,
    (0, None, None, False): 0,
    (1, None, None, True): 75,
    (-15, None, None, False): 143,
}
# What a rank has left for the launcher, where the run did not come to tell.
LEFT = {
    (1, None, None, 2, False): 2,  # a mistake that only ranks find
    (1, "running", None, 143, True): 143,
    (1, "failed", 1, 2, False): 2,  # of an earlier start, and of the last
    (0, None, None, 75, False): 75,  # a signal that went to ranks alone
    (1, None, None, 75, False): 1,  # torchrun stopped this one, for another rank had failed
    (1, None, None, 75, True): 75,
    (1, "finished", 0, 124, False): 0,
    (0, None, None, 1, False): 0,  # of an earlier start; the last one is done
}


def commands(folder: Path, **programs: str) -> dict[str, str]:
    """An environment in which these programs stand before the machine's, and this environment's before both."""
    folder.mkdir(exist_ok=True)
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "FOLDER": str(folder), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def test_the_array_job_prepares_what_one_machine_does(tmp_path: Path) -> None:
    """A stand-in for sbatch notes the jobs; their commands are then run as SLURM would, the tasks in reverse."""
    (tmp_path / "a corpus.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(300)))
    environment = {**commands(tmp_path / "bin", sbatch=SBATCH), "JOBS": str(tmp_path / "jobs")}
    arguments = [str(tmp_path / "a corpus.jsonl"), "--tokenizer", "bytes", "--val-fraction", "0.1"]
    submit = ["launch/slurm_data_prep.sh", "2", *arguments, "--output", str(tmp_path / "array")]
    subprocess.run(submit, check=True, cwd=ROOT, env=environment, capture_output=True)
    array, last = [line.split("\0") for line in (tmp_path / "jobs").read_text().splitlines()]
    assert array[array.index("--array") + 1] == "0-1"
    assert last[last.index("--dependency") + 1] == "afterany:4711"
    for job, task in ((array, "1"), (array, "0"), (last, "")):
        command = job[job.index("--wrap") + 1].replace("--workers 8", "--workers 1")
        run = subprocess.run(
            ["bash", "-c", command], cwd=ROOT, env={**environment, "SLURM_ARRAY_TASK_ID": task}, capture_output=True
        )
        assert run.returncode == 0, run.stderr
    subprocess.run(
        [sys.executable, "data_prep.py", *arguments, "--output", str(tmp_path / "one")],
        check=True,
        cwd=ROOT,
        capture_output=True,
    )
    assert open_dataset(tmp_path / "array").data_digest == open_dataset(tmp_path / "one").data_digest


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_valid_shell(script: Path) -> None:
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    text = script.read_text()
    if text.startswith("#!"):
        assert "set -euo pipefail" in text, "it would go on after an error"
    assert not re.search(r"--(optim|model|train|data)[.]", text), "hyper-parameters belong into configs"


def test_shellcheck_finds_nothing() -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not there: its package has no wheel for this machine")
    checked = subprocess.run([program, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def start_job(script: str, what: str, folder: Path) -> tuple[subprocess.Popen[str], Path]:
    """The batch script, as SLURM starts its copy elsewhere: with stand-ins for what it calls."""
    environment = commands(folder, srun=SRUN, scontrol=SCONTROL)
    places = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[07-08]", "SLURM_JOB_NUM_NODES": "2"}
    copy = folder / "slurm_script"
    shutil.copy(LAUNCH / script, copy)
    return subprocess.Popen(
        ["bash", copy, "configs/gpt_124m.yaml", what],
        cwd=ROOT, env={**environment, **places, "SLURM_CPUS_PER_TASK": "3"}, stdout=subprocess.PIPE, text=True,
    ), folder  # fmt: skip


def catches(pid: int) -> bool:
    """Whether a process has a handler for SIGUSR1: proc(5), a mask of signals from 1 on."""
    (mask,) = re.findall(r"^SigCgt:\s*([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), flags=re.MULTILINE)
    return bool(int(mask, 16) & 1 << (signal.SIGUSR1 - 1))


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm_srun.sbatch"])
def test_a_job_that_was_stopped_goes_back_into_the_queue_once(script: str, tmp_path: Path) -> None:
    job, folder = start_job(script, "run", tmp_path)
    deadline = time.monotonic() + 20
    while not (folder / "called").exists() or not (folder / "called").read_text() or not catches(job.pid):
        assert time.monotonic() < deadline, "srun was not called"
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=20)
    assert job.returncode == EXIT_STOPPED
    assert (folder / "requeued").read_text() == "requeue 4711\n"
    assert "goes back into the queue" in said
    called = (folder / "called").read_text().splitlines()
    assert "--cpus-per-task=3" in called, "srun does not take it over from sbatch"
    assert called[-2:] == ["configs/gpt_124m.yaml", "run"]
    if script == "slurm.sbatch":
        assert called[0] == "node07 2"
        assert "launch/several_nodes.sh" in called
    else:
        assert called[-4:-2] == ["python", "pretrain.py"]


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm_srun.sbatch"])
@pytest.mark.parametrize("code", [0, 1, 2, 124, 137])
def test_a_job_that_finished_or_failed_ends(script: str, code: int, tmp_path: Path) -> None:
    job, folder = start_job(script, str(code), tmp_path)
    job.communicate(timeout=20)
    assert job.returncode == code
    assert not (folder / "requeued").exists(), "it would run for ever"


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm_srun.sbatch"])
def test_batch_scripts_ask_for_what_they_rely_on(script: str) -> None:
    options = re.findall(r"^#SBATCH --(\S+)$", (LAUNCH / script).read_text(), flags=re.MULTILINE)
    assert "signal=B:USR1@120" in options, "the batch shell alone, early enough to save"
    assert {"requeue", "open-mode=append"} <= set(options)
    assert any(option.startswith("cpus-per-task=") for option in options)


@pytest.mark.parametrize("config", sorted(LAUNCH.glob("accelerate_*.yaml")), ids=lambda config: config.stem)
def test_accelerate_reads_its_configs(config: Path) -> None:
    """Its own reader refuses keys that it does not know."""
    found = load_config_from_file(str(config))
    assert found.distributed_type == "MULTI_GPU", "ranks of torchrun; sharding is ours"
    assert found.mixed_precision == "no", "train.precision decides"
    assert found.use_cpu == ("cpu" in config.stem)


@pytest.mark.parametrize(("case", "code"), CODES.items(), ids=str)
def test_the_exit_code_is_what_became_of_the_run(case: tuple[int, Any, int | None, bool], code: int) -> None:
    launched, word, told, asked = case
    status = None if word is None else Status(status=word, step=3, exit_code=told, message="")
    assert exit_code(launched, status, asked=asked) == code


@pytest.mark.parametrize(("case", "code"), LEFT.items(), ids=str)
def test_a_rank_tells_the_launcher_what_no_run_does(case: tuple[int, Any, int | None, int, bool], code: int) -> None:
    launched, word, told, left, asked = case
    status = None if word is None else Status(status=word, step=3, exit_code=told, message="")
    assert exit_code(launched, status, left=left, asked=asked) == code


def test_the_last_start_of_the_ranks_counts(tmp_path: Path) -> None:
    assert code_left(tmp_path) is None
    for start, code in (("0", 1), ("10", 2), ("9", 124)):
        hand_over(str(tmp_path / start), code)
        hand_over(str(tmp_path / start), 75)  # the first of several ranks is heard
    assert code_left(tmp_path) == 2


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOPS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_counts_again_after_the_last_that_counted(
    handlers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C every 1.5 s: the third is a second signal, though only 1.5 s after the echo before it."""
    clock = iter([100.0, 101.5, 103.0])
    agent = Agent(["--help"], {**os.environ, "PATH": str(tmp_path)})
    agent.wait()
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    accepted = []
    for _ in range(3):
        agent._stop(signal.SIGINT, None)
        accepted.append(agent.asked_at)
    assert accepted == [100.0, 100.0, 103.0]


def test_a_signal_while_torchrun_starts_reaches_it(
    handlers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    popen = subprocess.Popen

    def interrupted(*arguments: Any, **named: Any) -> subprocess.Popen[bytes]:
        process = popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    agent = Agent([], {})
    assert agent.wait() == -signal.SIGTERM
    assert agent.asked_at is not None


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))


def test_the_manifest_is_of_the_api_of_kubeflow_trainer() -> None:
    """Their models are generated from their API; what they do not know is dropped on the way."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="a development dependency")
    runtime, job = documents()
    for document, model in ((runtime, models.TrainerV1alpha1TrainingRuntime), (job, models.TrainerV1alpha1TrainJob)):
        assert document["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
        assert model.__name__.endswith(document["kind"])
        assert model.from_dict(document).to_dict() == document
    assert job["spec"]["runtimeRef"] == {"kind": runtime["kind"], "name": runtime["metadata"]["name"]}


def test_the_manifest_says_what_a_controller_looks_for() -> None:
    """What no schema tells: names that must meet, and what comes back after which exit code."""
    template = documents()[0]["spec"]["template"]["spec"]
    (node,) = template["replicatedJobs"]
    assert node["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    job = node["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == node["name"] == "node", "where the controller puts image, command and PET_* variables"
    assert pod["restartPolicy"] == "Never", "a pod failure policy needs it"
    assert pod["terminationGracePeriodSeconds"] >= 120, "a step and a checkpoint"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    rules = job["podFailurePolicy"]["rules"]
    codes = {rule["onExitCodes"]["values"][0]: rule["action"] for rule in rules if "onExitCodes" in rule}
    assert codes == {EXIT_USER_ERROR: "FailJob", EXIT_STOPPED: "Ignore"}
    assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == {"node"}
    (failure,) = template["failurePolicy"]["rules"]
    assert failure["action"] == "FailJobSet"
    assert failure["onJobFailureReasons"] == ["PodFailurePolicy"], "the reason of a job that FailJob ended"
    trainer = documents()[1]["spec"]["trainer"]
    assert trainer["command"] == ["python", "-m", "launch.ranks", "pretrain.py"]
    assert (ROOT / trainer["args"][0]).exists()


def test_the_image_copies_what_is_there_and_runs_as_nobody_special() -> None:
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
    allowed = {line[1:] for line in (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert set(copied) == allowed, "the context holds other files than those that are copied"
    assert all((ROOT / source).exists() for source in copied)
    assert {"pipeline", "pretrain.py", "data_prep.py", "sample.py", "launch", "configs"} <= set(copied)
    (base,) = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert "." not in base.split("/")[0] or "/" not in base, "an image by its name, not by a registry's"
    assert lines.index("USER 1000") > max(number for number, line in enumerate(lines) if line.startswith("RUN "))
    (entry,) = [json.loads(line.removeprefix("ENTRYPOINT ")) for line in lines if line.startswith("ENTRYPOINT ")]
    assert os.access(ROOT / entry[0], os.X_OK)


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Launches that must not outlive the test."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        end_tree(process.pid)


def launched(
    started: list[subprocess.Popen[str]], environment: dict[str, str], *command: object
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    started.append(process)
    return process


def config_of(dataset: Path, folder: Path, *, steps: int) -> Path:
    """A run on two ranks; few checkpoints, so that stopping has to save one."""
    settings = tiny_settings(dataset, folder / "run", train={"steps": steps}, checkpoint={"every": 1000})
    folder.mkdir(exist_ok=True)
    return write_config(folder / "run.yaml", settings)


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    code, printed = run_ranks(2, str(config_of(dataset, folder, steps=STEPS)), output=folder / "output")
    assert code == 0, printed
    return folder / "run"


@pytest.mark.slow
def test_accelerate_computes_what_torchrun_does(
    dataset: Path, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    torchrun, accelerate = (config_of(dataset, tmp_path / name, steps=12) for name in ("torchrun", "accelerate"))
    command = ["accelerate", "launch", "--config_file", "launch/accelerate_cpu.yaml", "pretrain.py", accelerate]
    launch = launched(started, commands(tmp_path / "bin"), *command)
    printed, _ = launch.communicate(timeout=180)
    assert launch.returncode == 0, printed
    assert "2 ranks on" in printed
    code, printed = run_ranks(2, str(torchrun), output=tmp_path / "output")
    assert code == 0, printed
    found, expected = (record(config.parent / "run") for config in (accelerate, torchrun))
    assert len(found) == len(expected) > 12
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.slow
def test_a_stopped_job_is_requeued_and_goes_on_on_one_node(
    dataset: Path, tmp_path: Path, started: list[subprocess.Popen[str]], undisturbed: Path
) -> None:
    """The batch script with real ranks, stopped in the middle; the rest under another launcher."""
    config = config_of(dataset, tmp_path / "job", steps=STEPS)
    scontrol = SCONTROL.replace("node07\\nnode08", "localhost")
    environment = commands(tmp_path / "bin", srun=SRUN_FOR_REAL, scontrol=scontrol)
    environment |= {
        "SLURM_JOB_ID": str(free_port() - 20000), "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_PER_TASK": "2", "RANKS": "2",
    }  # fmt: skip
    job = launched(started, environment, "bash", "launch/slurm.sbatch", config)
    metrics = tmp_path / "job" / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while not metrics.exists() or metrics.read_text().count("\n") < 20:
        assert time.monotonic() < deadline, "no steps"
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    printed, _ = job.communicate(timeout=120)
    assert job.returncode == EXIT_STOPPED, printed
    stopped = read_status(tmp_path / "job" / "run")
    assert stopped.status == "stopped"
    assert 10 < stopped.step < STEPS
    assert (tmp_path / "bin" / "requeued").read_text() == f"requeue {environment['SLURM_JOB_ID']}\n"
    rest = launched(started, environment, "launch/one_node.sh", config)
    printed, _ = rest.communicate(timeout=180)
    assert rest.returncode == 0, printed
    assert f"step-{stopped.step:08d}" in printed, "it went on from there"
    assert read_status(tmp_path / "job" / "run").status == "finished"
    assert record(tmp_path / "job" / "run") == record(undisturbed)


def free_port() -> int:
    """One of those that launch/slurm.sbatch derives from the number of a job."""
    for port in range(20000 + os.getpid() % 5000, 30000):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)) != 0:
                return port
    raise AssertionError("no port is free")


@pytest.mark.slow
def test_a_signal_before_the_run_has_begun_is_a_stop(
    dataset: Path, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    environment = {**commands(tmp_path / "bin"), "RANKS": "2"}
    launch = launched(started, environment, "launch/one_node.sh", config_of(dataset, tmp_path / "run", steps=12))
    deadline = time.monotonic() + 60
    while not children_of(launch.pid) or not catches(launch.pid):
        assert time.monotonic() < deadline, "torchrun was not started"
        time.sleep(0.05)
    (torchrun,) = children_of(launch.pid)
    launch.send_signal(signal.SIGTERM)
    printed, _ = launch.communicate(timeout=60)
    assert launch.returncode == EXIT_STOPPED, printed
    assert not psutil.pid_exists(torchrun.pid)


@pytest.mark.slow
def test_a_mistake_that_only_ranks_find_has_its_code(
    dataset: Path, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    """Before the run has begun, and so without a status: Kubernetes would start it again and again."""
    environment = {**commands(tmp_path / "bin"), "RANKS": "2"}
    config = config_of(tmp_path / "none", tmp_path / "run", steps=12)
    launch = launched(started, environment, "launch/one_node.sh", config)
    printed, _ = launch.communicate(timeout=120)
    assert launch.returncode == EXIT_USER_ERROR, printed
    assert printed.count("error: ") == 1, printed


@pytest.mark.slow
def test_what_torchrun_says_of_a_killed_rank_is_a_line(
    dataset: Path, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    """Its own traceback, 40 lines of it, would bury what the ranks have told."""
    environment = {**commands(tmp_path / "bin"), "RANKS": "2"}
    config = config_of(dataset, tmp_path / "run", steps=100_000)
    launch = launched(started, environment, "launch/one_node.sh", config)
    metrics = tmp_path / "run" / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists():
        assert time.monotonic() < deadline, "no steps"
        time.sleep(0.1)
    (torchrun,) = children_of(launch.pid)
    victim = children_of(torchrun.pid)[1]
    victim.kill()
    printed, _ = launch.communicate(timeout=60)
    assert launch.returncode == EXIT_HUNG, printed
    assert "Traceback" not in printed
    assert printed.count("rank 1 on ") >= 1
    assert f"torchrun: rank 1 (pid {victim.pid}) was killed by SIGKILL, the first to end\n" in printed
    after = printed[printed.index("it is gone without a word") :].splitlines()
    assert len(after) <= 6, after


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            ChildFailedError("x", {3: ProcessFailure(local_rank=1, pid=42, exitcode=-9, error_file="none")}), 1,
            "torchrun: rank 3 (pid 42) was killed by SIGKILL, the first to end\n",
        ),
        (
            ChildFailedError("x", {0: ProcessFailure(local_rank=0, pid=42, exitcode=2, error_file="none")}), 1,
            "torchrun: rank 0 (pid 42) exited with 2, the first to end\n",
        ),
        (RendezvousTimeoutError("no answer"), 1, "torchrun: the machines of this job lost each other or did not meet"),
        (SignalException("x", signal.SIGTERM), 143, ""),
        (None, 0, ""),
    ],
)  # fmt: skip
def test_torchrun_ends_without_a_traceback(
    error: Exception | None, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(torchrun_module, "main", main)
    assert torchrun_module.run() == code
    assert capsys.readouterr().err.startswith(line)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "elastic"), [("SIGTERM", False), ("SIGINT", False), ("SIGUSR1", True)])
def test_a_signal_while_libraries_are_imported_is_a_stop(
    name: str, elastic: bool, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    environment = {**commands(tmp_path / "bin"), **({"TORCHELASTIC_RUN_ID": "x"} if elastic else {})}
    launch = launched(started, environment, sys.executable, "pretrain.py", "--data.path", tmp_path / "none")
    deadline = time.monotonic() + 60
    while not catches(launch.pid):
        assert time.monotonic() < deadline, "it hears nothing"
        time.sleep(0.01)
    launch.send_signal(getattr(signal, name))
    printed, _ = launch.communicate(timeout=60)
    assert launch.returncode == (0 if elastic else EXIT_STOPPED), printed
    assert printed == f"stopped by {name} while starting, so nothing was lost; run the same command again to go on\n"


def children_of(pid: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children())
    except psutil.NoSuchProcess:
        return []
