"""Files that survive a kill or a power cut whole.

In: content. Out: the old file or the new one under a name, never something between; errors that name the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """The path with `~` in its place; where nobody has that name, it is one like any other."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - `Path.expanduser` raises RuntimeError there


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make an `OSError` of the block name the file: those of `write` and `fsync` know only a descriptor."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def write_durably(path: Path, content: bytes, *, writer: str = "") -> None:
    """Replace `path` by `content` in one step that survives a power cut once the folder is synced too.

    Writers that may write the same file at the same time have different names: each has its temporary file.
    Raises `OSError` naming the file, for example when the disk is full.
    """
    temporary = path.with_name(f"{path.name}{writer}.tmp")
    with naming(path):
        temporary.unlink(missing_ok=True)  # a link left there would be followed
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:  # Ctrl-C included
            temporary.unlink(missing_ok=True)
            raise


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
