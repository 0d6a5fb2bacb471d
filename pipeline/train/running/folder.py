"""The folder of a run: one process writes into it, and it stays the folder that the process began with.

In: a path. Out: a `RunFolder`, held against other processes; environment.json; an error once the folder was renamed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import BaseModel, ConfigDict

from pipeline.errors import UserError
from pipeline.files import write_durably
from pipeline.locks import locked
from pipeline.untrusted import DamagedFileError, read_json

ENVIRONMENT = "environment.json"


class Start(BaseModel):
    """A start of the run: the step that it went on from, when, and on what."""

    model_config = ConfigDict(frozen=True, extra="allow")

    from_step: int
    started: str


class Environment(BaseModel):
    """environment.json: the run's id, the inode number of the folder that it was made for, every start.

    The number is None in files of versions that did not write it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_id: str
    folder_inode: int | None = None
    starts: tuple[Start, ...]


class RunFolder:
    """The folder of a run: its first rank holds it, and every rank notices that it was renamed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held = ExitStack()
        self._descriptor: int | None = None

    def hold(self, *, patience: float, say: Callable[[str], None]) -> None:
        """Make the folder and keep other processes out of it until `release`. Raises `UserError` if one holds it."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._held.enter_context(locked(self.path, ask_of_other_hosts=False, patience=patience, say=say))
        self.watch()

    def watch(self) -> None:
        """Remember which folder bears the name now. Does nothing on a node that has none: only the first rank needs it.

        While it is open no other folder gets its inode number.
        """
        with suppress(FileNotFoundError):
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            self._held.callback(os.close, self._descriptor)

    def release(self) -> None:
        """Let other processes in."""
        self._descriptor = None
        self._held.close()

    def check(self) -> None:
        """Raise `UserError` if the folder no longer has its name: what is written there would make another one."""
        if self._descriptor is None or self._is_at(self.path):
            return
        now = self.whereabouts()
        place, remedy = "", ""
        if now is not None:
            place = f" and is now {now}"
            remedy = f"; rename it back, or give --run-dir {now}, and run the same command again to go on"
        raise UserError(
            f"{self.path} was renamed, removed or replaced while this run was writing into it{place}: "
            f"nothing more is written{remedy}"
        )

    def whereabouts(self) -> Path | None:
        """Where the folder is now; None if it was removed, or where the system cannot tell."""
        if self._descriptor is None or self._is_at(self.path):
            return self.path
        with suppress(OSError):
            now = Path(f"/proc/self/fd/{self._descriptor}").readlink()
            return now if self._is_at(now) else None
        return None

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Name a renamed folder as the cause where something fails because of it."""
        try:
            yield
        except (UserError, OSError):
            self.check()
            raise

    def _is_at(self, path: Path) -> bool:
        assert self._descriptor is not None, "the folder is held"
        try:
            return os.path.samestat(path.stat(), os.fstat(self._descriptor))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def read_environment(self, *, say: Callable[[str], None]) -> Environment:
        """environment.json, with a new id where the folder is a copy of the one that it was made for.

        Two runs under one id would overwrite each other in wandb. Raises `UserError` if the file is damaged.
        """
        path, inode = self.path / ENVIRONMENT, self.path.stat().st_ino
        new = Environment(run_id=uuid4().hex[:12], folder_inode=inode, starts=())
        try:
            found = read_json(Environment, path)
        except FileNotFoundError:
            return new
        except DamagedFileError as error:
            raise UserError(f"{error}; restore it, or move it away: the run then gets a new wandb id") from None
        if found.folder_inode not in (None, inode):
            say(f"{self.path} is a copy of another run's folder: wandb shows it as a run of its own, {new.run_id}")
            return new.model_copy(update={"starts": found.starts})
        return found.model_copy(update={"folder_inode": inode})

    def write_environment(self, before: Environment, *, from_step: int, about: dict[str, Any]) -> None:
        """Add a start to environment.json. about: versions, hardware and commit."""
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        starts = (*before.starts, Start(from_step=from_step, started=started, **about))
        content = before.model_copy(update={"starts": starts}).model_dump_json(indent=2)
        write_durably(self.path / ENVIRONMENT, content.encode() + b"\n")
