"""What became of a run, for those who started it: RUN/status.json.

    python -m pipeline.status RUN       prints it and exits with the run's own code

In: how a run goes or ended. Out: one small JSON file, written anew at each change. torchrun reports 1 for whatever its
ranks exit with, so launch scripts ask here whether to queue the run again. A killed run leaves "running" behind.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import EXIT_USER_ERROR, UserError, run_command
from pipeline.files import write_durably

NAME = "status.json"
KILLED = 137  # 128 + SIGKILL, as shells report it


class Status(BaseModel):
    """`step`: the last one whose update counts; `exit_code`: the process's, none while it runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: Literal["running", "stopped", "finished", "failed"]
    step: int
    exit_code: int | None
    message: str


def write_status(run_dir: Path, status: Status) -> None:
    """Replace the run's status."""
    write_durably(run_dir / NAME, status.model_dump_json().encode() + b"\n")


def read_status(run_dir: Path) -> Status:
    """The run's status. Errors: there is none, or it is not one."""
    path = run_dir / NAME
    try:
        return Status.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"no {path}: {run_dir} is no run folder, or its run never began") from None
    except (ValidationError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def main() -> None:
    """Print the status of the run folder named and exit with its code; 137 when it was killed."""
    if len(sys.argv) != 2:
        print("usage: python -m pipeline.status RUN", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR)
    status = read_status(Path(sys.argv[1]))
    code = KILLED if status.exit_code is None else status.exit_code
    print(f"{status.status} at step {status.step}: {status.message}")
    raise SystemExit(code)


if __name__ == "__main__":
    run_command(main)
