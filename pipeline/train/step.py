"""The arithmetic of one update, and of evaluation.

In: a model as the ranks share it, this rank's micro-batches. Out: the loss and gradient norm of the global batch.
The loss is the sum of nats over all targets of all ranks and micro-batches divided by their number, never a mean of
means, so splitting the same rows differently changes nothing but rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass
from time import perf_counter

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pipeline.config import Config
from pipeline.data.loading.loader import Loader, RankBatch
from pipeline.data.loading.sources import ValidationSet
from pipeline.errors import UserError
from pipeline.seeds import named_seed
from pipeline.train.guard import refuse_update
from pipeline.train.parallel import Parallel
from pipeline.train.runtime import Runtime

EVALUATION_ROWS = 64  # about so many rows are read at a time and rank in an evaluation


@dataclass(frozen=True)
class StepResult:
    """loss: mean nats per target of the global batch; grad_norm: global L2 norm before clipping; wall seconds.

    stop: some rank was asked to stop. skipped: loss or norm was not finite, and no rank applied the update.
    """

    loss: float
    grad_norm: float
    targets: int
    lr: float
    seconds: float
    stop: bool = False
    skipped: bool = False


class Trainer:
    """A model with its optimizer: one `step` per global batch.

    stop: whether this rank was asked to stop. skipped: updates that the run has left out so far.
    """

    def __init__(
        self,
        parallel: Parallel,
        optimizer: torch.optim.Optimizer,
        *,
        loader: Loader,
        runtime: Runtime,
        config: Config,
        stop: Callable[[], bool] = lambda: False,
        skipped: int = 0,
    ) -> None:
        self.parallel = parallel
        self.optimizer = optimizer
        self.loader = loader
        self.runtime = runtime
        self.config = config
        self.stop = stop
        self.skipped = skipped
        self.parameters = [p for p in parallel.model.parameters() if p.requires_grad]
        self.scale = LossScale() if runtime.precision == torch.float16 else None

    def step(self, batch: RankBatch, *, step: int, lr: float) -> StepResult:
        """Make update number `step`.

        Errors: a loss or gradient that is not finite, before it is applied, unless `train.on_nonfinite` is skip.
        """
        began = perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, norm, targets, stop = self._gradients(batch, step=step)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.runtime.pulse.beat(f"step {step}, update")
            self._clip(norm)
            self.optimizer.step()
            if self.scale is not None:
                self.scale.passed()
        else:
            self.skipped += 1
        self.parallel.clear_gradients()
        return StepResult(loss, norm, targets, lr, seconds=perf_counter() - began, stop=stop, skipped=not finite)

    def loss_scale(self) -> dict[str, float | int]:
        """State of the fp16 loss scale, for the checkpoint; empty in other precisions."""
        return {} if self.scale is None else asdict(self.scale)

    def load_loss_scale(self, state: dict[str, float | int]) -> None:
        """Go on with the loss scale of a checkpoint."""
        if state and self.scale is not None:
            self.scale = LossScale(scale=float(state["scale"]), passes=int(state["passes"]))

    def _gradients(self, batch: RankBatch, *, step: int) -> tuple[float, float, int, bool]:
        """Leave gradients; return the mean loss, their norm, the targets and whether to stop, or refuse the update.

        What decides is summed over ranks first, so that all decide the same. The body runs once, but for fp16, where
        an overflow is tried again at a smaller loss scale.
        """
        number, scale = self.runtime.number, copy(self.scale)
        targets = self.runtime.sum(number(sum(part.targets for part in batch.micro_batches)))
        targets = targets.clamp(min=1)  # a batch without any target has loss 0 and no gradient
        while True:
            losses = self._backward(batch, step=step, targets=targets)
            summed = self.runtime.sum(torch.stack([losses.sum(), self._squared_norm(), number(self.stop())]))
            # all in one transfer: this is the one place where a step waits for the device
            nats, squared, stops, count = torch.cat([summed, targets.view(1)]).tolist()
            found = (nats / count, math.sqrt(squared), int(count), stops > 0)
            loss, norm = found[:2]
            if math.isfinite(loss) and math.isfinite(norm):
                return found
            if math.isfinite(loss) and self.scale is not None and self.scale.lower():
                self.parallel.clear_gradients()  # the same batch once more, so that none is lost
                continue
            self.scale = scale  # no scale helped
            if self.skipped < self.config.train.allowed_skips:
                return found
            refuse_update(loss, norm, losses, batch=batch, step=step, loader=self.loader)

    def _backward(self, batch: RankBatch, *, step: int, targets: Tensor) -> Tensor:
        """Accumulate d(mean loss)/d(parameters); return the summed nats of each micro-batch (M,), float64."""
        factor = (1.0 if self.scale is None else self.scale.scale) / targets
        losses = []
        for number, part in enumerate(batch.micro_batches):
            self.runtime.pulse.beat(f"step {step}, micro-batch {number + 1} of {len(batch.micro_batches)}")
            place = self.runtime.rank * len(batch.micro_batches) + number
            self.runtime.seed(named_seed(self.config.seed, "dropout", step, place))
            part = part.to(self.runtime.device)
            last = number == len(batch.micro_batches) - 1
            with self.parallel.sync(last=last), naming_memory(self.config, rows=len(part.labels)):
                with self.runtime.autocast():
                    loss = self.parallel.forward(**part.inputs, labels=part.labels)
                torch.autograd.backward(loss * factor)
            losses.append(loss.detach().double())
        return torch.stack(losses)

    def _local_gradients(self) -> list[Tensor]:
        """The gradients that this rank holds, to be read and changed in place."""
        found = [p.grad for p in self.parameters if p.grad is not None]
        return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in found]

    def _squared_norm(self) -> Tensor:
        """This rank's share of the squared gradient norm, () float64: what several ranks hold, the first one counts."""
        grads = self._local_gradients()
        if self.scale is not None:
            torch._foreach_mul_(grads, 1 / self.scale.scale)
        if not self.parallel.counts_gradients:
            return torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        return torch.nn.utils.get_total_norm(grads).to(self.runtime.device, torch.float64).square()

    def _clip(self, norm: float) -> None:
        """Scale gradients down to `optim.clip_norm`, by the norm over all ranks."""
        limit = self.config.optim.clip_norm
        if limit is not None and norm > limit:
            torch._foreach_mul_(self._local_gradients(), limit / norm)


@dataclass
class LossScale:
    """fp16 has too little range for small gradients: the loss is scaled up, gradients down again.

    A power of two, so that nothing but range changes; halved after an overflow, doubled after enough updates without
    (Micikevicius et al. 2018, arXiv:1710.03740). `passes` counts those.
    """

    scale: float = 2.0**16
    passes: int = 0

    def passed(self) -> None:
        """An update was made."""
        self.passes += 1
        if self.passes == 2000:
            self.scale, self.passes = self.scale * 2, 0

    def lower(self) -> bool:
        """After an overflow: whether it can be tried again at a smaller scale."""
        if self.scale <= 1:
            return False
        self.scale, self.passes = self.scale / 2, 0
        return True


@contextmanager
def naming_memory(config: Config, *, rows: int) -> Iterator[None]:
    """Say which setting to lower when the memory of the device, or of the host, runs out."""
    try:
        yield
    except RuntimeError as error:
        # on a CPU PyTorch raises a plain RuntimeError and tells it by the text alone
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        ways = ["train.activation_checkpointing full"] * (config.train.activation_checkpointing != "full")
        ways += ["parallel.strategy fsdp"] * (config.parallel.strategy not in ("fsdp", "hsdp"))
        smaller = f"lower train.micro_batch to {rows // 2}, or to auto, which finds the largest that fits; " * (
            rows > 1
        )
        raise UserError(
            f"out of memory with a micro-batch of {rows}: {str(error).splitlines()[0]}\n"
            f"  {smaller}the global batch stays as it is. {' or '.join(ways)} takes less memory".rstrip()
        ) from None


@dataclass(frozen=True)
class Evaluation:
    """loss: mean nats per target over all validation sets; bits_per_byte compares across tokenizers.

    sources: the loss on each validation set by its name.
    """

    loss: float
    bits_per_byte: float
    targets: int
    sources: dict[str, float]


@torch.no_grad()
def evaluate(
    parallel: Parallel,
    validation: Sequence[ValidationSet],
    *,
    runtime: Runtime,
    tokens: int | None,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Mean loss over the first `tokens` tokens (default: all) of each fixed validation set, each counted once.

    bits per byte = nats / ln 2 / bytes, where a target stands for as many bytes as a token has on average in its
    whole split, end-of-document tokens included. None: given up between two batches because some rank was asked to
    stop, which all ranks agree on.
    """
    parallel.eval()
    try:
        nats, targets, text_bytes, losses = 0.0, 0, 0.0, {}
        for one in validation:
            summed = _nats(parallel, one, runtime=runtime, tokens=tokens, stop=stop)
            if summed is None:
                return None
            losses[one.name] = summed[0] / summed[1]
            nats, targets = nats + summed[0], targets + summed[1]
            text_bytes += summed[1] * one.plan.split.text_bytes / one.plan.split.n_tokens
    finally:
        parallel.train()
    return Evaluation(nats / targets, nats / math.log(2) / text_bytes, targets, sources=losses)


def _nats(
    parallel: Parallel, one: ValidationSet, *, runtime: Runtime, tokens: int | None, stop: Callable[[], bool]
) -> tuple[float, int] | None:
    """Summed nats and targets of one validation set over all ranks; None when some rank was asked to stop."""
    total, counted = torch.zeros((), dtype=torch.float64, device=runtime.device), 0
    for number, batch in enumerate(_validation_batches(one, tokens=tokens)):
        runtime.pulse.beat(f"evaluation on {one.name}, batch {number + 1}")
        if runtime.any(stop()):
            return None
        for part in batch.micro_batches:
            counted += part.targets
            part = part.to(runtime.device)
            with runtime.autocast(), naming_memory(one.loader.config, rows=len(part.labels)):
                total += parallel.forward(**part.inputs, labels=part.labels).double()
    counted = runtime.sum_of_counts(counted)
    nats = runtime.sum(total).item()
    if counted == 0 or not math.isfinite(nats):
        loss = nats / max(counted, 1)
        raise UserError(f"validation loss is {loss} over {counted} targets; look at the val split of {one.name}")
    return nats, counted


def _validation_batches(one: ValidationSet, *, tokens: int | None) -> Iterator[RankBatch]:
    loader, rows = one.loader, one.plan.all_rows
    if tokens is not None:
        rows = min(rows, -(-tokens // one.plan.context_length))
    # whole micro-batches: a compiled model then sees one shape, but for the last rows
    size = max(EVALUATION_ROWS // loader.micro_batch, 1) * loader.micro_batch * loader.world_size
    for first in range(0, rows, size):
        yield loader.batch(first, min(size, rows - first))
