"""What became of a run can be asked from a shell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.status import Status, read_status, write_status


def ask(folder: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.status", str(folder)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_the_shell_gets_the_runs_own_code(tmp_path: Path) -> None:
    for status, code, expected in (("stopped", 75, 75), ("finished", 0, 0), ("failed", 2, 2), ("running", None, 137)):
        write_status(tmp_path, Status(status=status, step=12, exit_code=code, message="because"))
        assert read_status(tmp_path).step == 12
        assert ask(tmp_path) == (expected, f"{status} at step 12: because\n")


def test_no_status_or_a_torn_one_is_said(tmp_path: Path) -> None:
    code, printed = ask(tmp_path / "nowhere")
    assert code == 2
    assert "no run folder" in printed
    (tmp_path / "status.json").write_text('{"status": "runn')
    with pytest.raises(UserError, match="cannot be read"):
        read_status(tmp_path)


def test_asking_loads_no_torch() -> None:
    probe = "import sys, pipeline.status; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
