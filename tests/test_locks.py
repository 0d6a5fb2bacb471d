"""One writer per folder: who holds it is named, and a lock ends with its process."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.locks import LOCK_NAME, holder, locked, look, refuse_held

HOLDER = """
import os, sys, time
from pathlib import Path
from pipeline.locks import locked
with locked(Path(sys.argv[1]), ask_of_other_hosts=False):
    if os.fork() == 0:
        print("forked", os.getpid(), flush=True)
    time.sleep(60)
"""
NO_LOCKS = [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO, errno.EINVAL, errno.EACCES]


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Make every flock fail as a file system without locks does."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_lock_ends_with_its_process_even_if_a_forked_child_lives_on(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline().split()[1])
    try:
        assert look(tmp_path / LOCK_NAME) == "held"
        with (
            pytest.raises(UserError, match=f"is being written by process {process.pid} on .* since 20"),
            locked(tmp_path, ask_of_other_hosts=False),
        ):
            pass
        process.kill()
        process.wait()
        os.kill(child, 0)  # it is still there
        assert look(tmp_path / LOCK_NAME) == "free"
        with locked(tmp_path, ask_of_other_hosts=True):
            assert holder(tmp_path / LOCK_NAME)["pid"] == os.getpid()
    finally:
        os.kill(child, signal.SIGKILL)
        process.kill()
        process.wait()
        process.stdout.close()
    assert list(tmp_path.iterdir()) == []


def test_looking_at_a_lock_does_not_take_it(tmp_path: Path) -> None:
    refuse_held(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path, ask_of_other_hosts=False):
        assert [look(tmp_path / LOCK_NAME) for _ in range(3)] == ["held"] * 3
        with pytest.raises(UserError, match=f"process {os.getpid()} on"):
            refuse_held(tmp_path)
    assert look(tmp_path / LOCK_NAME) == "free"


@pytest.mark.parametrize("number", NO_LOCKS, ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_said_and_used(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, number)
    said: list[str] = []
    with locked(tmp_path, ask_of_other_hosts=True, patience=30.0, say=said.append):
        assert holder(tmp_path / LOCK_NAME)["pid"] == os.getpid()
        assert look(tmp_path / LOCK_NAME) == "no locks"
        refuse_held(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(said) == 1
    assert said[0].startswith(f"warning: the file system of {tmp_path} has no locks (")
    assert "start only one" in said[0]


def test_a_held_lock_is_busy_and_waited_for(tmp_path: Path) -> None:
    said: list[str] = []
    with locked(tmp_path, ask_of_other_hosts=False):
        with (
            pytest.raises(UserError, match=f"process {os.getpid()} on"),
            locked(tmp_path, ask_of_other_hosts=False, patience=0.5, say=said.append),
        ):
            pass
        assert len(said) == 1
        assert said[0].startswith(f"waiting 0 s: {tmp_path} is being written by process {os.getpid()} on ")


def test_a_full_disk_names_the_lock_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str, encoding: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*/\.lock'"),
        locked(tmp_path, ask_of_other_hosts=False),
    ):
        pass
    monkeypatch.undo()
    with locked(tmp_path, ask_of_other_hosts=False):
        pass


def test_the_lock_of_a_folder_that_took_the_place_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with locked(folder, ask_of_other_hosts=False):
        folder.rename(tmp_path / "moved")
        folder.mkdir()
        (folder / LOCK_NAME).write_text('{"pid": 1, "host": "elsewhere", "since": "2020"}')
    assert holder(folder / LOCK_NAME)["host"] == "elsewhere"


def test_an_unreadable_or_foreign_lock_file_names_no_holder(tmp_path: Path) -> None:
    for content in (b"", b"\xff", b"5", b"[" * 5000, b"{" * 5000):
        (tmp_path / LOCK_NAME).write_bytes(content)
        assert holder(tmp_path / LOCK_NAME) == {}
        with locked(tmp_path, ask_of_other_hosts=True):
            pass


def test_a_pipe_in_place_of_the_lock_file_holds_up_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / LOCK_NAME)
    script = "import sys; from pathlib import Path; from pipeline.locks import *; lock = Path(sys.argv[1])\n"
    script += "print(look(lock), holder(lock))"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / LOCK_NAME)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == "free {}\n", done.stderr
