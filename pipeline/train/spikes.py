"""When a loss is a spike: far above what the last steps would let one expect.

In: the losses before it, as `TrainState` carries them. Out: yes or no, from numbers that every rank has alike, so
that all ranks decide alike and a resumed run decides as the undisturbed one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

WINDOW = 64  # losses looked back on
ENOUGH = 16  # fewer tell no spread


def threshold(recent: Sequence[float], *, deviations: float) -> float:
    """The loss above which a step is a spike: mean + deviations x standard deviation of the recent ones; or infinity.

    Spikes of this kind are described by Chowdhery et al. 2022 (arXiv:2204.02311, section 5.1), who went back to an
    earlier checkpoint and left out the batches around them.
    """
    if len(recent) < ENOUGH:
        return math.inf
    mean = math.fsum(recent) / len(recent)
    variance = math.fsum((loss - mean) ** 2 for loss in recent) / len(recent)
    return mean + deviations * math.sqrt(variance)


def is_spike(loss: float, recent: Sequence[float], *, deviations: float) -> bool:
    """Whether `loss` lies above `threshold`."""
    return loss > threshold(recent, deviations=deviations)
