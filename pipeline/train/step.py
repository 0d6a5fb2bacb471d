"""The arithmetic of one update, and of evaluation.

In: a model, this rank's micro-batches. Out: the loss and gradient norm of the global batch. The loss is the
sum of nats over all targets of all ranks and micro-batches divided by their number, never a mean of means,
so splitting the same rows differently changes nothing but rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from pipeline.data.loading.loader import Loader, RankBatch
from pipeline.data.loading.sources import ValidationSet
from pipeline.errors import UserError
from pipeline.seeds import named_seed
from pipeline.train.guard import refuse_update
from pipeline.train.runtime import Runtime

EVALUATION_ROWS = 64  # about so many rows are read at a time and rank in an evaluation


@dataclass(frozen=True)
class StepResult:
    """loss: mean nats per target of the global batch; grad_norm: global L2 norm before clipping; wall seconds."""

    loss: float
    grad_norm: float
    targets: int
    lr: float
    seconds: float


class Trainer:
    """A model with its optimizer: one `step` per global batch."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        loader: Loader,
        runtime: Runtime,
        clip_norm: float | None,
        seed: int,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loader = loader
        self.runtime = runtime
        self.clip_norm = clip_norm
        self.seed = seed
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # fp16 has too little range for small gradients: the loss is scaled up, gradients down again
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == torch.float16)

    def step(self, batch: RankBatch, *, step: int, lr: float) -> StepResult:
        """Make update number `step`. Errors: a loss or gradient that is not finite, before it is applied."""
        began = perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        local = sum(part.targets for part in batch.micro_batches)
        targets = max(self.runtime.sum_of_counts(local), 1)  # a batch without any target has loss 0 and no gradient
        loss, norm, grad_norm = self._gradients(batch, step=step, targets=targets)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss=loss, grad_norm=norm, targets=targets, lr=lr, seconds=perf_counter() - began)

    def loss_scale(self) -> dict[str, float | int]:
        """State of the fp16 loss scale, for the checkpoint; empty in other precisions."""
        return self.scaler.state_dict()

    def load_loss_scale(self, state: dict[str, float | int]) -> None:
        """Go on with the loss scale of a checkpoint."""
        if state:
            self.scaler.load_state_dict(state)

    def _gradients(self, batch: RankBatch, *, step: int, targets: int) -> tuple[float, float, Tensor]:
        """Leave finite gradients; return the mean loss and their norm, also as a tensor (), or refuse the update.

        The body runs once, but for fp16, where an overflow is tried again at a smaller loss scale.
        """
        while True:
            losses = self._backward(batch, step=step, targets=targets)
            self.scaler.unscale_(self.optimizer)
            grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
            nats = self.runtime.sum(losses.sum())
            # both in one transfer: this is where the step waits for the device
            loss, norm = torch.stack([nats / targets, grad_norm.double()]).tolist()
            if math.isfinite(loss) and math.isfinite(norm):
                return loss, norm, grad_norm
            overflow = math.isfinite(loss) and self._lower_scale()
            if not overflow:
                refuse_update(loss, norm, losses, batch=batch, step=step, loader=self.loader)

    def _backward(self, batch: RankBatch, *, step: int, targets: int) -> Tensor:
        """Accumulate d(mean loss)/d(parameters); return the summed nats of each micro-batch (M,), float64."""
        # DDP averages gradients over ranks where we want their sum, hence the factor.
        scale = self.runtime.world_size / targets
        losses = []
        for number, part in enumerate(batch.micro_batches):
            place = self.runtime.rank * len(batch.micro_batches) + number
            torch.manual_seed(named_seed(self.seed, "dropout", step, place))
            part = part.to(self.runtime.device)
            last = number == len(batch.micro_batches) - 1
            with self.runtime.without_sync(self.model, last=last), naming_memory():
                with self.runtime.autocast():
                    loss = self.model(**part.inputs, labels=part.labels)
                self.scaler.scale(loss * scale).backward()
            losses.append(loss.detach().double())
        return torch.stack(losses)

    def _lower_scale(self) -> bool:
        """After an overflow in fp16: halve the scale for another try at the same batch, so that none is lost."""
        if not self.scaler.is_enabled() or self.scaler.get_scale() <= 1:
            return False
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return True


@contextmanager
def naming_memory() -> Iterator[None]:
    """Say which setting to lower when the device's memory runs out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{str(error).splitlines()[0]}\n  lower train.micro_batch; the global batch stays as it is"
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
    model: nn.Module, validation: Sequence[ValidationSet], *, runtime: Runtime, tokens: int | None
) -> Evaluation:
    """Mean loss over the first `tokens` tokens (default: all) of each fixed validation set, each counted once.

    bits per byte = nats / ln 2 / bytes, where a target stands for as many bytes as a token has on average in its
    whole split, end-of-document tokens included.
    """
    model.eval()
    nats, targets, text_bytes, losses = 0.0, 0, 0.0, {}
    for one in validation:
        total, counted = torch.zeros((), dtype=torch.float64, device=runtime.device), 0
        for batch in _validation_batches(one, tokens=tokens):
            for part in batch.micro_batches:
                counted += part.targets
                part = part.to(runtime.device)
                with runtime.autocast(), naming_memory():
                    total += model(**part.inputs, labels=part.labels).double()
        counted = runtime.sum_of_counts(counted)
        loss = runtime.sum(total).item() / max(counted, 1)
        if counted == 0 or not math.isfinite(loss):
            raise UserError(f"validation loss is {loss} over {counted} targets; look at the val split of {one.name}")
        losses[one.name] = loss
        nats, targets = nats + loss * counted, targets + counted
        text_bytes += counted * one.plan.split.text_bytes / one.plan.split.n_tokens
    model.train()
    return Evaluation(nats / targets, nats / math.log(2) / text_bytes, targets, sources=losses)


def _validation_batches(one: ValidationSet, *, tokens: int | None) -> Iterator[RankBatch]:
    loader, rows = one.loader, one.plan.all_rows
    if tokens is not None:
        rows = min(rows, -(-tokens // one.plan.context_length))
    # whole micro-batches: a compiled model then sees one shape, but for the last rows
    size = max(EVALUATION_ROWS // loader.micro_batch, 1) * loader.micro_batch * loader.world_size
    for first in range(0, rows, size):
        yield loader.batch(first, min(size, rows - first))
