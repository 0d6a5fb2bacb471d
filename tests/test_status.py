"""How a run goes can be asked from a shell: live runs and killed ones are told apart."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.locks import LOCK_NAME, locked
from pipeline.status import RUNNING, STALE, Status, is_alive, read_status, state_of, write_status


def ask(*arguments: Path | str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.status", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def running(folder: Path, *, seconds_ago: float | None = 0.0, **known: Any) -> Status:
    folder.mkdir(exist_ok=True)
    heartbeat = None if seconds_ago is None else datetime.now(UTC) - timedelta(seconds=seconds_ago)
    status = Status(status="running", step=12, exit_code=None, message="because", heartbeat=heartbeat, **known)
    write_status(folder, status)
    return status


def test_the_shell_gets_the_runs_own_code(tmp_path: Path) -> None:
    for status, code in (("stopped", 75), ("finished", 0), ("failed", 2)):
        write_status(tmp_path, Status(status=status, step=12, exit_code=code, message="because"))  # type: ignore[arg-type]
        assert read_status(tmp_path).step == 12
        assert ask(tmp_path) == (code, f"{status} at step 12: because\n")


def test_a_live_run_and_a_killed_one_are_told_apart(tmp_path: Path) -> None:
    known = {"total_steps": 100, "loss": 3.25, "tokens_per_second": 12345.6, "eta_seconds": 3661.0}
    running(tmp_path, **known)
    with locked(tmp_path, ask_of_other_hosts=False):
        code, printed = ask(tmp_path)
        left = (tmp_path / LOCK_NAME).read_bytes()
    assert code == RUNNING
    assert printed.startswith("running at step 12/100: loss 3.2500, tokens/s 12,346, ETA 1:01:01, heartbeat 0:0")
    (tmp_path / LOCK_NAME).write_bytes(left)  # a kill leaves the file and drops the lock
    code, printed = ask(tmp_path)
    assert code == 137
    assert printed.startswith("killed at step 12/100: loss 3.2500, heartbeat 0:0")
    assert "no process holds the folder any more; the same command goes on from the newest checkpoint" in printed


def test_a_run_whose_process_died_under_a_lock_file_is_killed(tmp_path: Path) -> None:
    running(tmp_path)
    (tmp_path / LOCK_NAME).write_text(f'{{"pid": 1, "host": "{os.uname().nodename}", "since": "2020"}}')
    assert state_of(tmp_path, read_status(tmp_path)) == ("killed", 137)


@pytest.mark.parametrize("seconds_ago", [None, 1.0, STALE + 1])
def test_the_heartbeat_decides_where_locks_cannot(
    seconds_ago: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a lock file that was removed, a lock of another host that is not seen here, a file system without locks."""
    status, alive = running(tmp_path, seconds_ago=seconds_ago), seconds_ago == 1.0
    assert is_alive(tmp_path, status) == alive
    (tmp_path / LOCK_NAME).write_text('{"pid": 1, "host": "elsewhere", "since": "2020"}')
    assert is_alive(tmp_path, status) == alive
    (tmp_path / LOCK_NAME).unlink()

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / LOCK_NAME).write_text(f'{{"pid": 1, "host": "{os.uname().nodename}", "since": "2020"}}')
    assert is_alive(tmp_path, status) == alive


def test_several_runs_are_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.chdir(tmp_path)
    running(Path("live"), total_steps=100, loss=3.25, tokens_per_second=1e6, eta_seconds=61.0)
    running(Path("dead"), seconds_ago=90.0)
    Path("done").mkdir()
    write_status(Path("done"), Status(status="finished", step=7, exit_code=0, message="because", loss=2.0))
    with locked(Path("live"), ask_of_other_hosts=False):
        code, printed = ask("live", "dead", "done")
    lines = [line.split() for line in printed.splitlines()]
    assert code == 0
    assert lines[0] == ["run", "state", "step", "loss", "tokens/s", "ETA", "heartbeat"]
    assert lines[1][:6] == ["live", "running", "12/100", "3.2500", "1,000,000", "1:01"]
    assert lines[2][:6] == ["dead", "killed", "12", "-", "-", "-"]
    assert lines[2][6] in ("1:30", "1:31", "1:32", "1:33")
    assert lines[3] == ["done", "finished", "7", "2.0000", "-", "-", "-"]
    starts = {
        line.index(word) for line, word in zip(printed.splitlines(), ("state", "running", "killed"), strict=False)
    }
    assert len(starts) == 1  # aligned
    code, printed = ask("live", "nowhere")
    assert code == 2
    assert "nowhere  no run" in printed
    assert "error: no nowhere/status.json: nowhere is no run folder" in printed


@pytest.mark.parametrize(
    "content",
    ['{"status": "runn', "5", "[]", '{"status": "running"}', "[" * 9999, "\udcff", '{"step": ' + "1" * 5000 + "}"],
)
def test_no_status_or_a_damaged_one_is_said(content: str, tmp_path: Path) -> None:
    code, printed = ask(tmp_path / "nowhere")
    assert code == 2
    assert "no run folder" in printed
    (tmp_path / "status.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"status\.json cannot be read"):
        read_status(tmp_path)


def test_help_tells_what_is_shown_and_the_codes() -> None:
    code, printed = ask("--help")
    assert code == 0
    assert "RUN [RUN ...]" in printed
    assert "137 if it was killed" in " ".join(printed.split())


def test_asking_needs_no_torch_and_is_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken" / "torch").mkdir(parents=True)
    (tmp_path / "broken" / "torch" / "__init__.py").write_text("raise ImportError('torch is broken here')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'broken'}:{Path(__file__).parent.parent}")
    running(tmp_path, seconds_ago=STALE)
    before = os.times()
    assert ask(tmp_path)[0] == 137
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert seconds < 1.5  # of CPU: the clock depends on what else the machine does. Here 0.3 s; torch alone takes 2 s
