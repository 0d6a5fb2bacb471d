"""How a run goes or ended, for those who started it: RUN/status.json.

    python -m pipeline.status RUN           one run in a line; exits with the run's own code
    python -m pipeline.status RUN RUN ...   several in a table

In: how a run goes or ended. Out: one small JSON file, written anew at each change and every few seconds; what a person
wants to know of it. torchrun reports 1 for whatever its ranks exit with, so launch scripts ask here whether to queue
the run again. A killed run leaves "running" behind: its lock and its heartbeat tell that it is gone.
"""

from __future__ import annotations

import argparse
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict

from pipeline.credentials import mask
from pipeline.errors import EXIT_USER_ERROR, UserError, duration, run_command
from pipeline.files import write_durably
from pipeline.locks import LOCK_NAME, holder, look
from pipeline.untrusted import read_json

NAME = "status.json"
KILLED = 137  # 128 + SIGKILL, as shells report it
RUNNING = 3  # as `systemctl status` has codes of its own for what is neither success nor failure
HEARTBEAT = 2.0  # seconds between two
STALE = 60.0  # seconds without a heartbeat after which a process that no lock speaks for is taken for dead
COLUMNS = ("run", "state", "step", "loss", "tokens/s", "ETA", "heartbeat")


class Status(BaseModel):
    """A run as RUN/status.json has it; docs/run_folder.md says what each key means."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: Literal["running", "stopped", "finished", "failed"]
    step: int
    exit_code: int | None
    message: str
    total_steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    heartbeat: AwareDatetime | None = None


def write_status(run_dir: Path, status: Status) -> None:
    """Replace the run's status."""
    status = status.model_copy(update={"message": mask(status.message)})
    write_durably(run_dir / NAME, status.model_dump_json().encode() + b"\n")


def read_status(run_dir: Path) -> Status:
    """The run's status. Raises `UserError` if there is none, or if it is not one."""
    path = run_dir / NAME
    try:
        return read_json(Status, path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no {path}: {run_dir} is no run folder, or its run never began") from None


def is_alive(run_dir: Path, status: Status) -> bool:
    """Whether the process of a run that is "running" is there: it holds the lock of the folder.

    Where the lock cannot tell (its file was removed, the file system has no locks or does not carry them from the
    host of the run to this one), the process is there as long as its heartbeat is young.
    """
    path = run_dir / LOCK_NAME
    try:
        found = look(path)
    except OSError:  # may not be read
        found = "no locks"
    if found == "held":
        return True
    if found == "free" and holder(path).get("host") == socket.gethostname():
        return False
    age = age_of(status)
    return age is not None and age < STALE


def age_of(status: Status) -> float | None:
    """Seconds since the last heartbeat; None where there was none."""
    return None if status.heartbeat is None else max((datetime.now(UTC) - status.heartbeat).total_seconds(), 0.0)


def state_of(run_dir: Path, status: Status) -> tuple[str, int]:
    """The state in a word, and the exit code that stands for it."""
    if status.exit_code is not None:
        return status.status, status.exit_code
    return ("running", RUNNING) if is_alive(run_dir, status) else ("killed", KILLED)


def cells(run_dir: Path, status: Status, *, state: str) -> dict[str, str]:
    """What is known of a run, by column; "-" for what is not."""
    age, live = age_of(status), state == "running"
    known = {
        "step": f"{status.step}" if status.total_steps is None else f"{status.step}/{status.total_steps}",
        "loss": None if status.loss is None else f"{status.loss:.4f}",
        "tokens/s": f"{status.tokens_per_second:,.0f}" if live and status.tokens_per_second is not None else None,
        "ETA": duration(status.eta_seconds) if live and status.eta_seconds is not None else None,
        "heartbeat": None if age is None else f"{duration(age)} ago",
    }
    return {"run": str(run_dir), "state": state, **{column: text or "-" for column, text in known.items()}}


def sentence(run_dir: Path, status: Status, *, state: str) -> str:
    """One run in a line."""
    found = cells(run_dir, status, state=state)
    about = [status.message]
    if state in ("running", "killed"):
        about = [f"{name} {found[name]}" for name in ("loss", "tokens/s", "ETA", "heartbeat") if found[name] != "-"]
        if state == "killed":
            about += ["no process holds the folder any more; the same command goes on from the newest checkpoint"]
        else:
            about += [status.message]
    return f"{state} at step {found['step']}: {', '.join(about)}"


def table(rows: list[dict[str, str]]) -> str:
    """Rows of `COLUMNS`, aligned, whatever the width of the terminal."""
    lines = [{column: column for column in COLUMNS}, *rows]
    widths = [max(len(line[column]) for line in lines) for column in COLUMNS]
    return "\n".join(
        "  ".join(line[column].ljust(width) for column, width in zip(COLUMNS, widths, strict=True)).rstrip()
        for line in lines
    )


def main() -> None:
    """Print one run and exit with its code, or several in a table."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.status",
        description="Show how runs go: running, stopped, finished, failed or killed; step, loss, tokens/s and ETA.",
        epilog="Exit code for one run: that of its process (0 finished, 75 stopped and saved, others failed), "
        f"{RUNNING} while it is running, {KILLED} if it was killed; for several 0. {EXIT_USER_ERROR}: no run there.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, such as runs/quickstart")
    runs: list[Path] = parser.parse_args().runs
    if len(runs) == 1:
        status = read_status(runs[0])
        state, code = state_of(runs[0], status)
        print(sentence(runs[0], status, state=state))
        raise SystemExit(code)
    rows, faults = [], []
    for run in runs:
        try:
            status = read_status(run)
            rows.append(cells(run, status, state=state_of(run, status)[0]))
        except (UserError, OSError) as error:
            faults.append(str(error))
            rows.append({**dict.fromkeys(COLUMNS, "-"), "run": str(run), "state": "no run"})
    print(table(rows))
    if faults:
        raise UserError("\n  ".join(faults))


if __name__ == "__main__":
    run_command(main)
