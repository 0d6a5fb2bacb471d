"""What the launch scripts submit does what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from pipeline.data.dataset import open_dataset

ROOT = Path(__file__).parents[1]
SBATCH = """#!/bin/sh
for argument; do printf '%s\\0' "$argument"; done >> "$JOBS"; printf '\\n' >> "$JOBS"
echo 4711
"""


def test_the_array_job_prepares_what_one_machine_does(tmp_path: Path) -> None:
    """A stand-in for sbatch notes the jobs; their commands are then run as SLURM would, the tasks in reverse."""
    (tmp_path / "a corpus.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(300)))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(SBATCH)
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "JOBS": str(tmp_path / "jobs")}
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


def test_scripts_are_valid_shell() -> None:
    for script in sorted((ROOT / "launch").glob("*.sh")):
        checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr
        assert "set -euo pipefail" in script.read_text(), f"{script.name} would go on after an error"
