"""How ranks share the work, applied to a plain model from outside.

In: a model that knows nothing of ranks. Out: the callable that the training step runs. The plain model stays
the one that is initialised, saved and loaded, so names in checkpoints never carry a wrapper's prefix.
"""

from __future__ import annotations

from torch import nn

from pipeline.config import ParallelConfig
from pipeline.errors import UserError
from pipeline.train.runtime import Runtime


def parallelise(model: nn.Module, config: ParallelConfig, *, runtime: Runtime, compiled: bool) -> nn.Module:
    """Wrap `model` for the strategy; `auto` is ddp for several ranks and single for one.

    Errors: a strategy that contradicts the number of ranks.
    """
    strategy = config.strategy
    if strategy == "auto":
        strategy = "ddp" if runtime.world_size > 1 else "single"
    if strategy == "single" and runtime.world_size > 1:
        raise UserError(f"parallel.strategy single was launched with {runtime.world_size} ranks; use ddp or auto")
    if compiled:
        model.compile()  # in place: no _orig_mod prefix
    if strategy == "ddp" and runtime.world_size > 1:
        wrapped: nn.Module = runtime.accelerator.prepare_model(model)
        return wrapped
    return model
