"""Files that survive a kill or a power cut whole.

In: content. Out: the old file or the new one under a name, never something between.
"""

from __future__ import annotations

import os
from pathlib import Path


def write_durably(path: Path, content: bytes, *, writer: str = "") -> None:
    """Replace `path` by `content` in one step that survives a power cut once the folder is synced too.

    Writers that may write the same file at the same time have different names: each has its temporary file.
    """
    temporary = path.with_name(f"{path.name}{writer}.tmp")
    try:
        with temporary.open("wb") as file:
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
