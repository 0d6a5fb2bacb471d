"""Who may write into the folder of a dataset: one preparation, or the shares of one beside each other.

In: the folder. Out: the right to write, until the block ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pipeline.locks import LOCK_NAME, locked, refuse_held


@contextmanager
def held(output: Path, *, share: tuple[int, int] | None) -> Iterator[None]:
    """Hold a folder, which is made if need be: alone, or as share (K, N) beside those of the same N.

    What was refused before anything was written leaves no folder. Raises `UserError` naming whoever holds it.
    """
    output.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.callback(_remove_if_empty, output)
        if share:
            part, parts = share
            stack.enter_context(locked(output, ask_of_other_hosts=False, name=f"{LOCK_NAME}-{part}-of-{parts}"))
            refuse_held(output)
            for path in sorted(output.glob(f"{LOCK_NAME}-*")):
                if not path.name.endswith(f"-of-{parts}"):  # divided otherwise, two shares would do the same unit
                    refuse_held(output, name=path.name)
        else:
            stack.enter_context(locked(output, ask_of_other_hosts=True))
            for path in sorted(output.glob(f"{LOCK_NAME}-*")):  # of shares: whoever still works is named
                stack.enter_context(locked(output, ask_of_other_hosts=True, name=path.name))
        yield


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # it holds something
        folder.rmdir()
