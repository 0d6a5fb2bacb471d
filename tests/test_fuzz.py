"""The fuzzer in a bounded form; `python -m tests.fuzz 1000` looks further."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.__main__ import try_one
from tests.fuzz.commands import KINDS, Command
from tests.fuzz.samples import make_configs

INPUTS = 105  # 15 of each kind


def test_no_damaged_file_ends_in_anything_but_success_or_one_message() -> None:
    """In a process of its own: it forks, and a process of the tests has threads."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", str(INPUTS)], capture_output=True, text=True, timeout=600
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.startswith(f"{INPUTS} inputs, ")
    assert "'refused'" in found.stdout
    assert "'read'" in found.stdout


def test_the_fuzzer_sees_tracebacks_deaths_and_what_leaves_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commands(folder: Path, *_: object) -> Iterator[Command]:
        yield lambda: None
        yield lambda: [][1]
        yield lambda: (folder.parent / "victim" / "more").touch()

    make_configs(tmp_path / "config")
    monkeypatch.setitem(KINDS, "config", commands)
    result = try_one(tmp_path / "config", tmp_path / "case", kind="config", seed=1)
    assert result["outcomes"] == ["read", "failed", "read"]
    assert "IndexError" in result["faults"][0]
    assert "wrote outside of its folder: ['file', 'more']" in result["faults"][1]
    shutil.rmtree(tmp_path / "case")
    monkeypatch.setitem(KINDS, "config", lambda *_: iter([lambda: os.kill(os.getpid(), signal.SIGKILL)]))
    assert try_one(tmp_path / "config", tmp_path / "case", kind="config", seed=1)["faults"] == ["ended with status 9"]
