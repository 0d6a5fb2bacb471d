"""The largest micro-batch that fits, for `train.micro_batch: auto`. The global batch stays as it is.

In: a model ready to train, and a way to get batches. Out: a number of sequences, the same on every rank.

Memory is measured with the real model on real rows and grows in proportion: on CUDA, in the program that will run
(compiled or not), for one sequence and for two; on a CPU for half a sequence and for a whole one. On CUDA without
sharding the size found is then tried, and made smaller while memory runs out. Under FSDP a rank that ran out would
leave the others waiting in an exchange, so there the proportion decides.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pipeline.config import Config
from pipeline.data.loading.blend import Phase
from pipeline.data.loading.loader import Loader
from pipeline.data.loading.sources import TrainingData
from pipeline.errors import UserError, sized
from pipeline.train.memory import activation_bytes, available_memory
from pipeline.train.parallel import Parallel, held_rows
from pipeline.train.runtime import Runtime

FILLED = 0.9  # of what is free: sizes of later allocations differ, and leave gaps
MOMENTS = 2  # of AdamW, not there yet
MOST_LOGITS = 2**31 - 1  # kernels that count further are slower, or wrong (pytorch/pytorch#85786)
_LESS_MEMORY = "use train.activation_checkpointing full, parallel.strategy fsdp or a shorter model.context_length"


def with_micro_batch(config: Config, parallel: Parallel, *, data: TrainingData, runtime: Runtime) -> Config:
    """The settings with a number for `train.micro_batch`: what it was, or for auto the largest that fits.

    Errors: on CUDA, more logits than kernels count right.
    """
    if config.train.micro_batch != "auto":
        most = most_rows(config, n_tokens=parallel.model.n_tokens)
        if runtime.device.type == "cuda" and config.train.micro_batch > most:
            raise UserError(
                f"train.micro_batch is {config.train.micro_batch}, but CUDA kernels count logits by 31 bits, and with "
                f"model.context_length {config.model.context_length} that is {most} sequences; "
                f"lower it to {evened(most, most=config.ramp_of_rows.full)}, or use auto"
            )
        return config
    blend = data.blend([Phase(row=0, sources=data.described())])

    def sized(size: int) -> Config:
        return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": size})})

    def loader_of(size: int) -> Loader:
        return Loader(blend, sized(size), rank=runtime.rank, world_size=runtime.world_size)

    with runtime.pulse.unhurried("finding the micro-batch"):
        return sized(find_micro_batch(parallel, config, runtime=runtime, loader_of=loader_of))


def find_micro_batch(
    parallel: Parallel,
    config: Config,
    *,
    runtime: Runtime,
    loader_of: Callable[[int], Loader],
    free: int | None = None,
) -> int:
    """The largest number of sequences per forward pass that fits, evened out over the micro-batches of a step.

    loader_of: a loader for a size of micro-batch. free: bytes for gradients, moments and activations, where they are
    known better. Neither gradients nor random numbers of the run are touched. Errors: not even one sequence fits.
    """
    trial = _Trial(parallel, config, runtime, loader_of)
    room = trial.room(free)
    with torch.random.fork_rng(devices=trial.devices), trial.stance():
        one, more = trial.growth(room)

        def needed(size: int) -> int:
            return one + more * (size - 1) + (trial.waiting if size < trial.rows else 0)

        # all rows at once may fit where half of them do not: then no gradients wait for others
        found = trial.most
        if runtime.any(needed(found) > room):
            found = bisect_left(range(1, trial.most), True, key=lambda size: runtime.any(needed(size) > room))
        while trial.can_run_out and found > 0 and runtime.any(not trial.succeeds(found)):
            found -= max(found // 8, 1)
    if found == 0:
        raise UserError(
            f"train.micro_batch auto: one sequence of {config.model.context_length} tokens takes {sized(needed(1))}, "
            f"but {sized(max(room, 0))} are free for it on rank {runtime.rank}; {_LESS_MEMORY}"
        )
    return evened(found, most=trial.rows)


def most_rows(config: Config, *, n_tokens: int) -> int:
    """Sequences of a micro-batch whose logits can be counted by 31 bits; at least 1."""
    return max(MOST_LOGITS // (config.model.context_length * config.model.embedding_rows(n_tokens)), 1)


def evened(size: int, *, most: int) -> int:
    """The smallest micro-batch that cuts `most` rows into no more parts than `size` does: 50 of 64 becomes 32."""
    return -(-most // -(-most // size))


class _Trial:
    """Forward and backward passes that leave nothing behind."""

    def __init__(
        self, parallel: Parallel, config: Config, runtime: Runtime, loader_of: Callable[[int], Loader]
    ) -> None:
        self.parallel, self.config, self.runtime, self.loader_of = parallel, config, runtime, loader_of
        self.on_cuda = runtime.device.type == "cuda"
        self.devices = [runtime.device] if self.on_cuda else []
        self.can_run_out = self.on_cuda and parallel.strategy in ("single", "ddp")
        self.held = sum(held_rows(parameter)[0].nbytes for parameter in parallel.model.parameters())
        ramp = config.ramp_of_rows
        rows = max(ramp.full, *(rows for _, rows in ramp.stages), 1)
        self.rows = self.most = -(-rows // runtime.world_size)  # of a step, and of a micro-batch
        if self.on_cuda:
            self.most = min(self.rows, most_rows(config, n_tokens=parallel.model.n_tokens))
        # FSDP holds whole gradients until the last micro-batch of a step, where it sums them over ranks
        waits = parallel.strategy in ("fsdp", "hsdp") and not parallel.sync_every_micro_batch
        self.waiting = sum(parameter.nbytes for parameter in parallel.model.parameters()) if waits else 0

    def room(self, free: int | None) -> int:
        """Bytes for activations, and on CUDA for gradients: the moments of the optimizer are still to come."""
        known = available_memory(self.runtime) if free is None else free
        if known is None:
            raise UserError("train.micro_batch auto: this system does not tell how much memory is free; give a number")
        return int(FILLED * known) - (MOMENTS if self.on_cuda else MOMENTS + 1) * self.held

    def stance(self) -> AbstractContextManager[object]:
        """Compiled programs take other memory; where it is estimated from what autograd keeps, none is compiled."""
        return nullcontext() if self.on_cuda else torch.compiler.set_stance("force_eager")

    def growth(self, room: int) -> tuple[int, int]:
        """Bytes that one sequence takes at its peak, and each further one: more than `room` if two cannot be run."""
        if self.on_cuda:
            with self._explained():
                one = self._measured(1)
            return one, self._further(one, room=room)
        context = self.config.model.context_length
        half, one = self._estimated(max(context // 2, 1)), self._estimated(context)
        return one, 2 * (one - half)  # too much, where attention takes the square of the length

    def _further(self, one: int, *, room: int) -> int:
        if self.most == 1:
            return 0  # there is no second one
        if not self.can_run_out:
            with self._explained("two sequences", first="give train.micro_batch 1, "):
                return self._measured(2) - one
        try:
            return self._measured(2) - one
        except torch.OutOfMemoryError:
            return max(one, room)

    def _measured(self, size: int) -> int:
        """On CUDA: the peak of a pass, the second of its size; the first may compile and set up libraries."""
        self._run(size)
        torch.cuda.reset_peak_memory_stats(self.runtime.device)
        before = torch.cuda.memory_allocated(self.runtime.device)
        self._run(size)
        return torch.cuda.max_memory_allocated(self.runtime.device) - before

    def _estimated(self, tokens: int) -> int:
        """On a CPU: what a pass over the first `tokens` of a sequence keeps for its backward pass."""
        kept: dict[int, int] = {}  # storages that wait for the backward pass; views of one count once
        own = {p.untyped_storage().data_ptr() for p in self.parallel.model.parameters() if not isinstance(p, DTensor)}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            self._run(1, tokens=tokens)
        counted = sum(size for place, size in kept.items() if place not in own)
        # what checkpointing holds on to is not seen by hooks, and neither is the gradient of the logits
        estimate = activation_bytes(
            self.config, n_tokens=self.parallel.model.n_tokens, precision=self.runtime.precision
        )
        return max(counted, tokens * estimate // self.config.model.context_length)

    def succeeds(self, size: int) -> bool:
        """Whether memory lasts, with room left for the moments."""
        try:
            moments = torch.empty(MOMENTS * self.held, dtype=torch.uint8, device=self.runtime.device)
            self._run(size)
        except torch.OutOfMemoryError:
            return False
        else:
            del moments
            return True
        finally:
            torch.cuda.empty_cache()

    @contextmanager
    def _explained(self, what: str = "one sequence", *, first: str = "") -> Iterator[None]:
        """Say what to do where memory does not last for `what`; `first` stands before the other remedies."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"train.micro_batch auto: memory does not last for {what} of "
                f"{self.config.model.context_length} tokens on rank {self.runtime.rank}: {str(error).splitlines()[0]}; "
                f"{first}{_LESS_MEMORY}"
            ) from None

    def _run(self, size: int, *, tokens: int | None = None) -> None:
        part = self.loader_of(size).batch(0, size * self.runtime.world_size).micro_batches[0].to(self.runtime.device)
        inputs = {name: tensor[:, :tokens] for name, tensor in part.inputs.items()}
        try:
            # DDP needs no exchange for it; FSDP would keep whole gradients without one
            with self.parallel.sync(last=self.parallel.strategy in ("fsdp", "hsdp")):
                with self.runtime.autocast():
                    loss = self.parallel.forward(**inputs, labels=part.labels[:, :tokens])
                torch.autograd.backward(loss)
        finally:
            self.parallel.clear_gradients()
