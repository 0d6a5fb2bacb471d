"""Numbers that must not be learned from.

In: a loss and a gradient norm of which one is not finite. Out: an error that names the step and the documents.
"""

from __future__ import annotations

import math
from typing import NoReturn

import numpy as np
from torch import Tensor

from pipeline.data.loading.loader import Loader, RankBatch
from pipeline.errors import UserError
from pipeline.train.processes.pulse import Elsewhere

SHOWN = 8  # documents named in a message


def refuse_update(
    loss: float, grad_norm: float, losses: Tensor, *, batch: RankBatch, step: int, loader: Loader
) -> NoReturn:
    """Raise instead of an update that would poison the weights, naming what it would have learned from.

    losses: summed nats (M,) of this rank's micro-batches. Those that are not finite are named alone; when all are
    finite but the global loss is not, the rank tells that has the others; when it is, the gradient is not finite, and
    all are named.
    """
    bad = [number for number, finite in enumerate(losses.isfinite().tolist()) if not finite]
    if not bad and not math.isfinite(loss):
        raise Elsewhere(f"step {step}: the loss of another rank is not finite; it names the documents")
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
