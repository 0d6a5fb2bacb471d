"""torchrun and the things it lacks: patience with a signal, the run's own exit code, and no traceback of its own.

    python -m launch.ranks TORCHRUN_FLAG... pretrain.py [configs/NAME.yaml] [--section.key VALUE ...]

In: a command line of torchrun that starts pretrain.py. Out: its ranks on this node, and the exit code that
RUN/status.json tells, or that a rank of this node has left (docs/launch.md). torchrun gives its ranks 30 s after
SIGTERM, then SIGKILL; it dies of SIGUSR1, and reports 1 for every other code than 0. Here signals go to the ranks,
which end when they have saved.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from pipeline.train.processes.early import stop_while_importing

if __name__ == "__main__":
    stop_while_importing()

import psutil

from pipeline.cli import read_command
from pipeline.errors import EXIT_STOPPED, UserError, run_command
from pipeline.status import NAME, Status, read_status
from pipeline.train.processes.launched import for_torchrun

SCRIPT = "pretrain.py"
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
ECHO = 2.0  # seconds in which a signal repeats the one before: a cluster may send to a process group and through srun


class Agent:
    """torchrun in a session of its own, so that a terminal's Ctrl-C reaches its ranks once: from here."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self.asked_at: float | None = None  # when it was last asked to stop, but for echoes
        self.told: set[int] = set()  # ranks that know
        self.process: subprocess.Popen[bytes] | None = None
        for number in STOPS:  # before there is a torchrun, which would be left behind
            signal.signal(number, self._stop)
        command = [sys.executable, str(Path(__file__).with_name("torchrun.py")), *arguments]
        self.process = subprocess.Popen(
            command, env=environment, start_new_session=True, preexec_fn=_ignore_the_polite_one
        )
        if self.asked:
            self.process.terminate()

    @property
    def asked(self) -> bool:
        """Whether it was asked to stop."""
        return self.asked_at is not None

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Ask the ranks of this node to stop; torchrun itself while it has none, for then there is nothing to save."""
        now = time.monotonic()
        if self.asked_at is not None and now - self.asked_at < ECHO:
            return  # a second signal ends a rank at once, and must be meant
        self.asked_at = now
        if self.process is None:
            return
        ranks = self._ranks()
        for rank in ranks:
            self.told.add(rank.pid)
            with suppress(psutil.NoSuchProcess):
                rank.terminate()  # for any signal: this one also ends what does not handle signals yet
        if not ranks:
            self.process.terminate()

    def wait(self) -> int:
        """torchrun's exit code. What it starts again after a signal (--max-restarts) is ended."""
        assert self.process is not None, "started by now"
        while True:
            with suppress(subprocess.TimeoutExpired):
                return self.process.wait(timeout=1)
            if self.asked and any(rank.pid not in self.told for rank in self._ranks()):
                self.process.terminate()

    def _ranks(self) -> list[psutil.Process]:
        try:
            ranks: list[psutil.Process] = [] if self.process is None else psutil.Process(self.process.pid).children()
            return ranks
        except psutil.NoSuchProcess:  # it has just ended
            return []


def _ignore_the_polite_one() -> None:
    """In torchrun, which dies of SIGUSR1: it lives on when a cluster sends it to all processes of a job."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def exit_code(launched: int, status: Status | None, *, left: int | None = None, asked: bool) -> int:
    """The code of a launch.

    launched: torchrun's; status: what the run has told since this launch, if anything; left: the code that a rank of
    this node has left in the last start of the ranks, if one did; asked: whether it was to stop.
    """
    if status is not None and status.status == "finished":
        return 0  # whatever torchrun met on its way out, when other nodes had left
    if status is not None and status.status == "stopped":
        return EXIT_STOPPED
    if left == EXIT_STOPPED and launched != 0 and not asked:
        left = None  # torchrun itself stopped it, for another rank had failed
    if left is not None and (launched != 0 or left == EXIT_STOPPED):
        return left
    if status is None:  # it ended before the run began
        return EXIT_STOPPED if asked else _as_shells_do(launched)
    return status.exit_code or _as_shells_do(launched) or 1


def code_left(folder: Path) -> int | None:
    """What a rank has left in the last start of which one did; starts are files that bear their number."""
    starts = sorted((int(file.name), file) for file in folder.iterdir() if file.name.isdecimal())
    text = starts[-1][1].read_text(encoding="utf-8") if starts else ""
    return int(text) if text.isdecimal() else None


def _as_shells_do(code: int) -> int:
    return 128 - code if code < 0 else code


def _writing(path: Path) -> tuple[int, int] | None:
    """What tells one writing of a file from the next, which may say the same."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def main() -> None:
    """Judge the settings once, start the ranks, and give back what became of the run."""
    arguments = sys.argv[1:]
    scripts = [place for place, argument in enumerate(arguments) if Path(argument).name == SCRIPT]
    if not scripts:
        raise UserError(
            f"no {SCRIPT} among the arguments; "
            f"usage: python -m launch.ranks TORCHRUN_FLAG... {SCRIPT} [CONFIG] [--section.key VALUE ...]"
        )
    config, _ = read_command(arguments[scripts[0] + 1 :])
    run_dir = Path(config.run_dir)
    before = _writing(run_dir / NAME)
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        agent = Agent(arguments, for_torchrun(Path(folder)))
        launched = agent.wait()
        left = code_left(Path(folder))
    told = _writing(run_dir / NAME) not in (None, before)
    status = read_status(run_dir) if told else None
    raise SystemExit(exit_code(launched, status, left=left, asked=agent.asked))


if __name__ == "__main__":
    run_command(main)
