"""What ends a run early: numbers that are not finite, and signals.

In: a loss and a gradient norm; SIGINT or SIGTERM. Out: an error that names the step and the documents, or a
flag that the loop asks for between steps, so that a stopped run has saved its last finished step.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn

import numpy as np
from torch import Tensor

from pipeline.data.loading.loader import Loader, RankBatch
from pipeline.errors import UserError

SHOWN = 8  # documents named in a message


def refuse_update(
    loss: float, grad_norm: float, losses: Tensor, *, batch: RankBatch, step: int, loader: Loader
) -> NoReturn:
    """Raise instead of an update that would poison the weights, naming what it would have learned from.

    losses: summed nats (M,) of this rank's micro-batches. Those that are not finite are named alone; when all are
    finite, the gradient is not, or another rank's loss, and all of them are.
    """
    bad = [number for number, finite in enumerate(losses.isfinite().tolist()) if not finite]
    rows = np.concatenate([batch.rows[number] for number in bad or range(len(batch.rows))])
    documents = loader.sources(rows)
    shown = "\n".join(f"    {document}" for document in documents[:SHOWN])
    more = f"\n    and {len(documents) - SHOWN} more" if len(documents) > SHOWN else ""
    raise UserError(
        f"step {step}: loss {loss}, gradient norm {grad_norm}. The update was not applied and checkpoints of earlier "
        f"steps are intact.\n  rows {rows.tolist()[:SHOWN]} of the run, from\n{shown}{more}\n"
        "  To go on: look at these documents, lower optim.lr or optim.clip_norm, or use train.precision fp32 "
        "(with checkpoint.allow_changes true)."
    )


class StopSignal:
    """Remembers SIGINT or SIGTERM until the loop looks; a second one ends the process at once."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        print("stopping after this step; a second signal ends the process at once", file=sys.stderr, flush=True)
        for other in (signal.SIGINT, signal.SIGTERM):
            signal.signal(other, signal.SIG_DFL)
