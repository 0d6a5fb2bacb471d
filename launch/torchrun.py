"""torchrun without the traceback that it ends with when a rank fails: `launch.ranks` starts this in its place.

In: a command line of torchrun. Out: its ranks, and one line about what ended them; the ranks have told the cause. Exit
code 1 where a rank failed or the machines did not meet, 128 + N after signal N.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import main


def run() -> int:
    """torchrun's `main`, with exceptions that are no fault of torchrun turned into a line; the exit code."""
    try:
        main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"exited with {failure.exitcode}"
        print(f"torchrun: rank {rank} (pid {failure.pid}) {how}, the first to end", file=sys.stderr)
        return 1
    except RendezvousError as error:
        print(f"torchrun: the machines of this job lost each other or did not meet: {error}", file=sys.stderr)
        return 1
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(run())
