"""The folder of a run: renamed while the run goes on, copied, damaged, on a full disk; asked how the run goes."""

from __future__ import annotations

import errno
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.locks import LOCK_NAME, look
from pipeline.status import Status, read_status, sentence, state_of
from pipeline.train.saving.storage import LocalShelf
from pipeline.train.step import Trainer
from tests.end_to_end.test_bad_runs import files_of, mistake
from tests.support import make_dataset, record, run_pretrain, run_ranks, start_pretrain, tiny_settings, write_config

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def config(dataset: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path / "run.yaml", tiny_settings(dataset, tmp_path / "run"))


@pytest.fixture
def run(config: Path) -> Path:
    """A run of 8 of its 12 steps."""
    go(config, "--train.steps", "8", "--optim.horizon-steps", "12")
    return config.parent / "run"


def go(config: Path, *flags: str) -> str:
    code, printed = run_pretrain(config, *flags)
    assert code == 0, printed
    return printed


def at_step(step: int, do: Callable[[], None]) -> None:
    """Do something in the middle of a step of training, once, in the first rank."""
    backward = Trainer._backward

    def doing(self: Trainer, batch: Any, *, step: int, targets: int) -> Any:
        if step == at and self.runtime.is_main:
            do()
        return backward(self, batch, step=step, targets=targets)

    at = step
    Trainer._backward = doing  # type: ignore[method-assign]  # a fault put in place


def rename(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


def replace(folder: Path) -> None:
    """As a user who keeps a run under another name and starts anew."""
    rename(folder)
    shutil.copytree(folder.with_name("moved"), folder)


def rename_in_step(step: int, how: Callable[[Path], None], folder: Path) -> None:
    at_step(step, partial(how, folder))


def remove(folder: Path) -> None:
    """Also while a checkpoint is written into it, which renames what is about to be deleted."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)


def rename_while_saving(folder: Path) -> None:
    """Between the look at the folder and the first file of a checkpoint."""
    make = LocalShelf.make
    LocalShelf.make = lambda shelf, place: (rename(folder), make(shelf, place))[1]  # type: ignore[method-assign,func-returns-value]


@pytest.mark.parametrize("every", [1, 100])
def test_a_run_folder_renamed_midway_ends_the_run_and_is_not_made_again(
    every: int, dataset: Path, tmp_path: Path
) -> None:
    """Also where nothing is logged before the next checkpoint."""
    sections = {"log": {"every": every}, "eval": {"every": 100}}
    undisturbed = write_config(tmp_path / "a.yaml", tiny_settings(dataset, tmp_path / "undisturbed", **sections))
    go(undisturbed)
    config = write_config(tmp_path / "b.yaml", tiny_settings(dataset, tmp_path / "run", **sections))
    printed = mistake(config, before=partial(rename_in_step, 6, rename, tmp_path / "run"))
    moved = tmp_path / "moved"
    assert f"{tmp_path / 'run'} was renamed, removed or replaced while this run was writing into it" in printed
    assert f"and is now {moved}: nothing more is written; rename it back, or give --run-dir {moved}" in printed
    assert not (tmp_path / "run").exists()
    assert read_status(moved).status == "failed"
    assert read_status(moved).exit_code == 2
    go(config, "--run-dir", str(moved))
    assert record(moved) == record(tmp_path / "undisturbed")


def test_a_folder_renamed_while_a_checkpoint_is_begun(config: Path, tmp_path: Path) -> None:
    printed = mistake(config, before=partial(rename_while_saving, tmp_path / "run"))
    assert f"and is now {tmp_path / 'moved'}" in printed
    assert not (tmp_path / "run").exists()


def test_a_folder_in_the_place_of_the_renamed_one_is_left_alone(config: Path, tmp_path: Path) -> None:
    printed = mistake(config, before=partial(rename_in_step, 6, replace, tmp_path / "run"))
    assert f"and is now {tmp_path / 'moved'}" in printed
    assert [line["step"] for line in record(tmp_path / "run")] == [1, 2, 3, 4, 5, 5]  # as it was copied
    assert read_status(tmp_path / "run").status == "running"
    assert (tmp_path / "run" / ".lock").exists()


def test_a_folder_removed_midway(config: Path, tmp_path: Path) -> None:
    printed = mistake(config, before=partial(rename_in_step, 6, remove, tmp_path / "run"))
    assert "was renamed, removed or replaced while this run was writing into it: nothing more is written" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_folder_renamed_midway_ends_all_ranks(config: Path, tmp_path: Path) -> None:
    before = partial(rename_in_step, 6, rename, tmp_path / "run")
    code, printed = run_ranks(2, str(config), output=tmp_path / "o.txt", before=before)
    assert code != 0
    assert f"error: {tmp_path / 'run'} was renamed, removed or replaced" in printed
    assert not (tmp_path / "run").exists()


def test_a_finished_run_started_again_is_told_of_another_run_dir(config: Path, dataset: Path, tmp_path: Path) -> None:
    """Whatever speaks against going on: data, model, settings, or that there is nothing left to do."""
    go(config)
    other = make_dataset(tmp_path / "other", documents=60, seed=2)
    for flags in (
        ("--optim.lr", "1e-2"),
        ("--train.batch-tokens", "512"),
        ("--train.precision", "bf16"),
        ("--model.d-model", "64"),
        ("--seed", "3"),
        ("--data.path", str(other)),
        (
            *("--train.batch-tokens", "512", "--train.steps", "null", "--train.tokens", "9000"),
            *("--checkpoint.allow-changes", "true"),
        ),
    ):
        assert "--run-dir" in mistake(config, *flags), flags
    for flags in ((), ("--eval.every", "3")):
        printed = go(config, *flags)
        assert "already at step 12 of 12; raise train.steps to go further, or begin another run with" in printed
        assert f" --run-dir {tmp_path / 'run-2'}" in printed


def run_id(folder: Path) -> str:
    return str(json.loads((folder / "environment.json").read_text())["run_id"])


def test_a_copy_of_a_run_gets_an_id_of_its_own_and_a_moved_one_keeps_it(run: Path, config: Path) -> None:
    first, copy = run_id(run), run.with_name("copy")
    shutil.copytree(run, copy)
    printed = go(config, "--run-dir", str(copy), "--optim.horizon-steps", "12")
    assert f"{copy} is a copy of another run's folder: wandb shows it as a run of its own, {run_id(copy)}" in printed
    assert run_id(copy) != first
    run.rename(run.with_name("moved"))
    printed = go(config, "--run-dir", str(run.with_name("moved")), "--optim.horizon-steps", "12")
    assert "is a copy of" not in printed
    assert run_id(run.with_name("moved")) == first
    starts = json.loads((copy / "environment.json").read_text())["starts"]
    assert [start["from_step"] for start in starts] == [0, 8]


def test_a_run_of_a_version_that_wrote_no_number_keeps_its_id(run: Path, config: Path) -> None:
    path = run / "environment.json"
    before = json.loads(path.read_text())
    del before["folder_inode"]
    path.write_text(json.dumps(before))
    go(config, "--optim.horizon-steps", "12")
    assert run_id(run) == before["run_id"]


@pytest.mark.parametrize(
    "content", ["", "5", "[]", "{}", '{"run_id": 5, "starts": []}', '{"run_id": "a", "starts": 3}', "[" * 9999]
)
def test_a_damaged_environment_is_told_and_changes_nothing(content: str, run: Path, config: Path) -> None:
    (run / "environment.json").write_text(content)
    before = files_of(run)
    printed = mistake(config, "--optim.horizon-steps", "12")
    assert f"error: {run / 'environment.json'} cannot be read" in printed
    assert files_of(run) == before


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{}", "is no line of a record (step: Field required)"),
        ("5", "is no line of a record (int: "),
        ('{"step": "4"}', "is no line of a record (step: "),
        ('{"step": 4, "loss": "low"}', "is no line of a record (loss: "),
        ('{"step": 4, "val_loss/web": []}', "is no line of a record (val_loss/web: "),
        ("{", "is not JSON"),
    ],
)
def test_a_damaged_line_of_the_record_is_named_and_changes_nothing(
    line: str, said: str, run: Path, config: Path
) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[3] = line
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    before = files_of(run)
    printed = mistake(config, "--optim.horizon-steps", "12")
    assert f"error: {run / 'metrics.jsonl'}, line 4 {said}" in printed
    assert files_of(run) == before


@pytest.mark.parametrize("tail", [b'{"step": 9, "lo', b"{", b"\0\0\0\0", b'{"step": 9, "loss": 3.\xff'])
def test_a_torn_tail_is_dropped(tail: bytes, run: Path, config: Path) -> None:
    whole = record(run)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    printed = go(config, "--optim.horizon-steps", "12")
    assert "warning" not in printed
    assert record(run)[: len(whole)] == whole
    assert [line["step"] for line in record(run) if "loss" in line] == list(range(1, 13))


def test_a_record_that_ends_before_its_checkpoint_is_told(run: Path, config: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:4]) + "\n")
    printed = go(config, "--optim.horizon-steps", "12")
    assert f"{run / 'metrics.jsonl'} ends at step 4, before the checkpoint of step 8: the lines between are" in printed
    assert [line["step"] for line in record(run) if "loss" in line] == [1, 2, 3, 4, 9, 10, 11, 12]


def test_a_record_is_not_called_short_where_nothing_was_to_be_logged(dataset: Path, tmp_path: Path) -> None:
    """Lines are rarer than checkpoints, and became more frequent on the way."""
    settings = tiny_settings(dataset, tmp_path / "run", log={"every": 5}, optim={"schedule": "constant", "min_lr": 0.0})
    config = write_config(tmp_path / "run.yaml", settings)
    go(config, "--train.steps", "4", "--log.every", "100")
    assert "ends at step" not in go(config, "--train.steps", "8", "--log.every", "3")
    assert "ends at step" not in go(config, "--train.steps", "11")
    assert "ends at step" not in go(config, "--train.steps", "12")


def full_disk(call: str) -> None:
    """Every write of the start fails, as it does on a full disk."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    setattr(os, call, full)


def test_a_full_disk_at_the_start_names_the_file(config: Path, tmp_path: Path) -> None:
    printed = mistake(config, before=partial(full_disk, "fsync"))
    assert f"error: cannot use {tmp_path / 'run' / 'config.yaml'}: No space left on device" in printed


@pytest.mark.parametrize("name", [".step-00000012.partial", ".step-00000004.removed", ".step-00000008.partial"])
def test_leftovers_that_are_links_are_removed_and_not_followed(name: str, run: Path, config: Path) -> None:
    elsewhere = run.with_name("elsewhere")
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    (run / "checkpoints" / name).symlink_to(elsewhere)
    go(config, "--optim.horizon-steps", "12")
    assert (elsewhere / "precious").read_text() == "x"
    assert not (run / "checkpoints" / name).is_symlink()


def test_time_and_memory_are_recorded_and_go_on_over_restarts(run: Path, config: Path) -> None:
    time.sleep(1.5)  # between the starts: not counted
    began = time.monotonic()
    go(config, "--optim.horizon-steps", "12")
    took = time.monotonic() - began
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    elapsed = [line["elapsed_seconds"] for line in lines]
    assert elapsed == sorted(elapsed)
    first_of_second = next(number for number, line in enumerate(lines) if line["step"] == 9)
    assert 0 < elapsed[first_of_second] - elapsed[first_of_second - 1] < took
    times = [datetime.fromisoformat(line["time"]) for line in lines]
    assert all(moment.tzinfo is not None for moment in times)
    assert times == sorted(times)
    assert (times[first_of_second] - times[first_of_second - 1]).total_seconds() > 1.5
    assert all(10_000_000 < line["peak_memory_bytes"] < 100_000_000_000 for line in lines)


@pytest.mark.slow
def test_wandb_without_a_login_never_asks_and_records_offline(config: Path, tmp_path: Path) -> None:
    """At a terminal, where wandb would wait for an answer."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_") and name != "NETRC"}
    ours, terminal = pty.openpty()
    command = [sys.executable, str(ROOT / "pretrain.py"), str(config), "--log.trackers", "wandb"]
    process = subprocess.Popen(
        command,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**kept, "HOME": str(tmp_path), "TERM": "xterm", "PYTHONPATH": str(ROOT)},
    )
    os.close(terminal)
    printed, deadline = b"", time.monotonic() + 240
    try:
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 1)[0]:
                try:
                    printed += os.read(ours, 1 << 16)
                except OSError:  # the terminal closes with its last process
                    break
        code = process.wait(max(deadline - time.monotonic(), 1.0))
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    text = printed.decode(errors="replace")
    assert code == 0, text
    assert "Enter your choice" not in text
    assert text.count("wandb has no login on this machine: it records offline") == 1
    folders = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert [folder.name.endswith(run_id(tmp_path / "run")) for folder in folders] == [True]


def note_locks(notes: Path) -> None:
    """Append, for each status that is written, what it says and whether the folder is held meanwhile."""
    import pipeline.train.running.run as run_module

    write = run_module.write_status

    def noting(folder: Path, status: Status) -> None:
        write(folder, status)
        with notes.open("a", encoding="utf-8") as file:
            file.write(f"{status.status} {look(folder / LOCK_NAME)}\n")

    run_module.write_status = noting


@pytest.mark.parametrize(("flags", "last"), [((), "finished"), (("--train.max-minutes", "1e-6"), "stopped")])
def test_a_run_tells_of_its_end_before_the_next_start_can_begin(
    config: Path, tmp_path: Path, flags: tuple[str, ...], last: str
) -> None:
    """Else it would write over what that start tells."""
    run_ranks(1, str(config), *flags, output=tmp_path / "o.txt", before=partial(note_locks, tmp_path / "notes"))
    told = (tmp_path / "notes").read_text(encoding="utf-8").splitlines()
    assert told[-1] == f"{last} held"
    assert set(told[:-1]) == {"running held"}
    assert not (tmp_path / "run" / LOCK_NAME).exists()


def beat_often(path: Path) -> None:
    """A step takes a tenth of a second, a heartbeat comes as often."""
    import pipeline.train.running.run as run_module

    run_module.HEARTBEAT = 0.1
    at_step(1, lambda: None)
    backward = Trainer._backward

    def slow(self: Trainer, batch: Any, *, step: int, targets: int) -> Any:
        time.sleep(0.1)
        return backward(self, batch, step=step, targets=targets)

    Trainer._backward = slow  # type: ignore[method-assign]


def test_a_live_run_is_seen_going_on_and_a_killed_one_is_told(dataset: Path, tmp_path: Path) -> None:
    settings = tiny_settings(dataset, tmp_path / "run", train={"steps": 4000}, checkpoint={"every": 2000})
    config = write_config(tmp_path / "run.yaml", settings)
    process = start_pretrain(config, tmp_path / "o.txt", before=partial(beat_often, tmp_path))
    seen: list[str] = []
    try:
        deadline = time.monotonic() + 120
        while len({text.split(":")[0] for text in seen}) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
            try:
                status = read_status(tmp_path / "run")
            except UserError:  # not begun yet
                continue
            if status.loss is not None and status.eta_seconds is not None:
                assert state_of(tmp_path / "run", status)[0] == "running"
                seen.append(sentence(tmp_path / "run", status, state="running"))
        assert process.is_alive(), (tmp_path / "o.txt").read_text()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert len(seen) >= 2
    assert all(" tokens/s " in text.replace(",", " ") or "tokens/s" in text for text in seen)
    assert seen[0].startswith("running at step ")
    assert "/4000: loss " in seen[0]
    assert "ETA " in seen[0]
    assert state_of(tmp_path / "run", read_status(tmp_path / "run")) == ("killed", 137)
