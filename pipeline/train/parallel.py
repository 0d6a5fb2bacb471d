"""How ranks share the work, applied to a plain model from outside.

In: the configuration, the size of the vocabulary, a `Runtime`. Out: a `Parallel`: the plain model with its initial
weights in place, and the way to run it. Parameters keep the plain model's names under every strategy; under FSDP they
are DTensors of which each rank holds some rows.

| strategy | each rank holds                                | exchanged per step                               |
|----------|------------------------------------------------|--------------------------------------------------|
| single   | everything                                     | nothing                                          |
| ddp      | everything                                     | gradients                                        |
| fsdp     | 1/ranks of weights, gradients, moments         | weights of each block as it is used; gradients   |
| hsdp     | 1/shard_ranks of them, replicated over groups  | the same within a group; gradients between them  |

One rule holds for all: gradients are summed over ranks, never averaged, and the loss was divided by the global number
of targets. So the strategies compute the same numbers but for rounding. In bf16 and fp16 FSDP gathers blocks in that
type, which rounds the weights as autocast would have; norm weights alone are rounded besides. Embedding, head and last
norm are gathered in float32, and gradients are summed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Literal, assert_never

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from pipeline.config import Config, ParallelConfig
from pipeline.errors import UserError, sized
from pipeline.model.layers import GRAPHS, Sight
from pipeline.model.transformer import Block, Decoder, build_model, initialise
from pipeline.train.memory import bytes_needed, device_memory, model_sizes
from pipeline.train.runtime import Runtime

Strategy = Literal["single", "ddp", "fsdp", "hsdp"]
FITS = 0.9  # of the memory: the rest is for buffers of communication and for what the allocator cannot use

BlockForward = Callable[[Block, Tensor, Sight], Tensor]


@dataclass(frozen=True)
class Parallel:
    """A model as the ranks share it. `why` tells how the strategy was chosen."""

    model: Decoder
    strategy: Strategy
    why: str
    wrapped: nn.Module
    counts_gradients: bool = True  # of ranks that hold the same gradients one counts them in the norm
    sync_every_micro_batch: bool = False

    def forward(self, *, labels: Tensor | None = None, **inputs: Tensor) -> Tensor:
        """As the model's own `forward`, with the exchange that the strategy needs."""
        result: Tensor = self.wrapped(**inputs, labels=labels)
        return result

    @contextmanager
    def sync(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: gradients are summed over ranks in the `last` one alone.

        Under FSDP `parallel.sync_every_micro_batch` sums in each: then only a shard of them is kept between.
        """
        if isinstance(self.wrapped, DistributedDataParallel) and not last:
            with self.wrapped.no_sync():
                yield
            return
        if isinstance(self.wrapped, FSDPModule):
            self.wrapped.set_requires_gradient_sync(last or self.sync_every_micro_batch)
            self.wrapped.set_is_last_backward(last)
        yield

    def clear_gradients(self) -> None:
        """Begin a sum anew. DDP's gradients stay in its buckets: were they let go, accumulation would make others."""
        if isinstance(self.wrapped, DistributedDataParallel):
            torch._foreach_zero_([p.grad for p in self.model.parameters() if p.grad is not None])
        else:
            for parameter in self.model.parameters():
                parameter.grad = None

    def train(self) -> None:
        """Dropout from here on; after an evaluation under FSDP also lets go of what it had gathered."""
        for module in self.wrapped.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # no backward pass does it for the weights that stay after the forward pass
        self.wrapped.train()

    def eval(self) -> None:
        """No dropout from here on."""
        self.wrapped.eval()


def choose(
    config: Config,
    *,
    parameters: int,
    largest: int,
    n_tokens: int,
    memory: int | None,
    world_size: int,
    local_world_size: int,
    precision: torch.dtype = torch.bfloat16,
) -> tuple[Strategy, str]:
    """The strategy and the reason for it; a pure function.

    parameters: of the whole model; largest: of the largest part gathered at once, a block or the rest. memory: bytes
    of one rank's device, None where it is not known. Errors: a strategy that contradicts the number of ranks.
    """
    asked = config.parallel.strategy
    if asked == "single" and world_size > 1:
        raise UserError(f"parallel.strategy single was launched with {world_size} ranks; use ddp, fsdp or auto")
    if asked == "hsdp":
        _shard_ranks(config.parallel, world_size=world_size, local_world_size=local_world_size)
    if asked != "auto":
        return asked, "as configured"
    if world_size == 1:
        return "single", "one process"
    if memory is None:
        return "ddp", "the memory of the device is not known"
    need = partial(
        bytes_needed,
        config,
        parameters=parameters,
        largest=largest,
        n_tokens=n_tokens,
        precision=precision,
        ranks=world_size,
    )
    limit, whole = FITS * memory, need(shards=1)
    of = f"of the {sized(memory)} of one rank"
    if whole <= limit:
        return "ddp", f"a replica needs about {sized(whole)} {of}"
    nodes, uneven = divmod(world_size, local_world_size)
    node = need(shards=config.parallel.shard_ranks or local_world_size)
    why = f"a replica needs about {sized(whole)}, more than {FITS:.0%} {of}"
    if nodes > 1 and not uneven and local_world_size > 1 and node <= limit:
        return "hsdp", f"{why}; sharded over a node about {sized(node)}"
    shared = need(shards=world_size)
    tight = "" if shared <= limit else ": try train.activation_checkpointing full or a smaller train.micro_batch"
    return "fsdp", f"{why}; sharded over {world_size} ranks about {sized(shared)}{tight}"


def _shard_ranks(config: ParallelConfig, *, world_size: int, local_world_size: int) -> int:
    """Ranks that share one replica under hsdp. Errors: they do not divide the ranks into several groups."""
    ranks = config.shard_ranks or local_world_size
    works = [n for n in range(2, world_size // 2 + 1) if world_size % n == 0]
    if ranks in works:
        return ranks
    asked = "parallel.shard_ranks" if config.shard_ranks else "the ranks of one node, the default of shard_ranks,"
    hint = f"parallel.shard_ranks can be {', '.join(map(str, works))}" if works else "no number of them would"
    raise UserError(
        f"parallel.strategy hsdp needs groups of at least 2 ranks and at least 2 groups: {asked} is {ranks} of "
        f"{world_size} ranks; {hint}; or use parallel.strategy fsdp"
    )


def parallelise(config: Config, *, n_tokens: int, runtime: Runtime) -> Parallel:
    """The model of `config` for a vocabulary of `n_tokens`, with its initial weights, ready to train.

    It is built without memory (on the meta device), wrapped, and then filled: no rank ever holds more than its share,
    and draws only that. Errors: a strategy that contradicts ranks or device.
    """
    parameters, largest = model_sizes(config.model, n_tokens=n_tokens)
    strategy, why = choose(
        config,
        parameters=parameters,
        largest=largest,
        n_tokens=n_tokens,
        memory=device_memory(runtime),
        world_size=runtime.world_size,
        local_world_size=runtime.local_world_size,
        precision=runtime.precision,
    )
    with torch.device("meta"):
        model = build_model(config.model, n_tokens=n_tokens)
    if runtime.precision == torch.float64:
        model.double()
    adapt_blocks(model, checkpointing=config.train.activation_checkpointing, compiled=config.train.compile)
    shards = shards_of(strategy, config.parallel, runtime=runtime)
    if strategy in ("fsdp", "hsdp"):
        _shard(model, config.parallel, mesh=_mesh(strategy, shards, runtime), runtime=runtime)
    model.to_empty(device="cpu" if config.parallel.cpu_offload else runtime.device)
    initialise(model, seed=config.seed, held=held_rows)
    if config.train.rounds_residual:
        _round_residual_stream(model, runtime.precision)
    wrapped: nn.Module = model
    if strategy == "ddp" and runtime.world_size > 1:
        wrapped = _replicate(model, bucket_mb=config.parallel.bucket_mb, device=runtime.device)
    return Parallel(
        model,
        strategy,
        why,
        wrapped,
        counts_gradients=runtime.rank < shards,
        sync_every_micro_batch=config.parallel.sync_every_micro_batch,
    )


def shards_of(strategy: Strategy, config: ParallelConfig, *, runtime: Runtime) -> int:
    """Ranks among which one replica is divided."""
    match strategy:
        case "single" | "ddp":
            return 1
        case "fsdp":
            return runtime.world_size
        case "hsdp":
            return _shard_ranks(config, world_size=runtime.world_size, local_world_size=runtime.local_world_size)
    assert_never(strategy)


def held_rows(parameter: Tensor) -> tuple[Tensor, range]:
    """What this rank holds of a parameter, and which rows that is: all, or a chunk as `torch.chunk` cuts them."""
    if not isinstance(parameter, DTensor):
        return parameter, range(len(parameter))
    mesh = parameter.device_mesh
    shards, number = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)  # of (replicate, shard) or (shard)
    size = -(-len(parameter) // shards)
    return parameter.to_local(), range(len(parameter))[number * size : (number + 1) * size]


def _round_residual_stream(model: Decoder, precision: torch.dtype) -> None:
    """Keep the sum that blocks add to in bf16: a fifth less memory traffic. Errors: products of another precision."""
    if precision != torch.bfloat16:
        raise UserError(
            f"train.residual bf16 goes with train.precision bf16, but this run computes in {precision}: use fp32"
        )
    model.embedding.register_forward_hook(lambda _module, _inputs, stream: stream.to(torch.bfloat16))


def adapt_blocks(model: Decoder, *, checkpointing: Literal["none", "selective", "full"], compiled: bool) -> None:
    """Recompute activations in the backward pass, and compile; block by block, without renaming a parameter.

    All blocks share one function, so a model of any depth compiles one graph for each kind of block; so does the loss.
    """
    ways: dict[str, BlockForward] = {
        "none": Block.forward,
        "selective": _recomputed_but_products,
        "full": _recomputed,
    }
    forward = ways[checkpointing]
    if compiled:
        dynamo.optimize_ddp = False  # for models in one graph, which it cuts at DDP's buckets; blocks are cut already
        dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
        # each size of micro-batch gets a graph of its own: one odd size would leave a slower graph of all sizes behind
        forward = torch.compile(forward, dynamic=False)
        model.nats = MethodType(torch.compile(Decoder.nats, dynamic=False), model)  # type: ignore[method-assign] # of this one alone
    if forward is not Block.forward:
        for block in model.stack.blocks:
            block.forward = MethodType(forward, block)  # hooks of wrappers stay around it


def _recomputed(block: Block, x: Tensor, sight: Sight) -> Tensor:
    """Keep the input alone (Chen et al. 2016, arXiv:1604.06174); dropout draws the same masks again."""
    result: Tensor = checkpoint(Block.forward, block, x, sight, use_reentrant=False)
    return result


def _recomputed_but_products(block: Block, x: Tensor, sight: Sight) -> Tensor:
    """Keep what matrix products and attention made, which is most of the work, and recompute the rest."""
    context = _PRODUCTS_ONLY if block.attention.dropout else _PRODUCTS_AND_ATTENTION
    result: Tensor = checkpoint(Block.forward, block, x, sight, use_reentrant=False, context_fn=context)
    return result


_PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default]
_ATTENTION = [
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
]
_PRODUCTS_AND_ATTENTION = partial(create_selective_checkpoint_contexts, [*_PRODUCTS, *_ATTENTION])
# A kernel of attention draws its own dropout masks. Were its result kept, recomputing would pass over its draws, and
# the masks after it would be others than in the forward pass.
_PRODUCTS_ONLY = partial(create_selective_checkpoint_contexts, _PRODUCTS)


def _mesh(strategy: Strategy, shards: int, runtime: Runtime) -> DeviceMesh:
    """Neighbouring ranks share a replica: they are on one node, where exchange is fast."""
    kind, ranks = runtime.device.type, runtime.world_size
    if strategy == "fsdp":
        return init_device_mesh(kind, (ranks,), mesh_dim_names=("shard",))
    grid = torch.arange(ranks).view(-1, shards)
    make = partial(dist.new_subgroups_by_enumeration, timeout=runtime.patience)  # a mesh would give them 30 minutes
    groups = [make(lines.tolist())[0] for lines in (grid.T, grid)]
    return DeviceMesh.from_group(groups, kind, mesh=grid, mesh_dim_names=("replicate", "shard"))


def _shard(model: Decoder, config: ParallelConfig, *, mesh: DeviceMesh, runtime: Runtime) -> None:
    """FSDP2 (arXiv:2304.11277): each block is a group that is gathered at once; embedding, head and last norm another.

    Inputs are never cast: autocast decides what is computed in which type, as without FSDP.
    """
    if config.cpu_offload and runtime.device.type != "cuda":
        raise UserError(
            "parallel.cpu_offload moves weights from CUDA to the CPU; this run is on the CPU: set it to false"
        )
    low = runtime.precision in (torch.bfloat16, torch.float16)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    rounded = MixedPrecisionPolicy(param_dtype=runtime.precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy()
    shard = partial(fully_shard, mesh=mesh, offload_policy=offload)
    blocks = [
        shard(block, mp_policy=rounded if low else exact, reshard_after_forward=config.reshard_after_forward)
        for block in model.stack.blocks
    ]
    root = shard(model, mp_policy=exact, reshard_after_forward=False)  # the backward pass begins with it
    for group in (root, *blocks):
        group.set_gradient_divide_factor(1.0)  # a sum, not a mean
        group.set_force_sum_reduction_for_comms(True)
    for number, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[number + 1 : number + 1 + config.prefetch])
        block.set_modules_to_backward_prefetch(blocks[max(number - config.prefetch, 0) : number][::-1])


def _replicate(model: Decoder, *, bucket_mb: float, device: torch.device) -> DistributedDataParallel:
    wrapped = DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        init_sync=False,  # every rank drew the same weights, or reads the same checkpoint
        bucket_cap_mb=bucket_mb,
        gradient_as_bucket_view=True,  # gradients are summed where they are, without a second copy
    )
    wrapped.register_comm_hook(None, lambda _, bucket: _sum(bucket.buffer()))
    _settle_buckets(wrapped, device)
    return wrapped


def _settle_buckets(wrapped: DistributedDataParallel, device: torch.device) -> None:
    """Make backward passes here, on one token, so that every step of every start adds in the same order.

    Before the forward pass that follows its first backward pass DDP makes its buckets anew, in the order in which
    gradients came; and where a number lies in a bucket decides in which order the ranks' shares of it are added. The
    second pass moves the gradients into the new buckets.
    """
    token = torch.zeros((1, 1), dtype=torch.int64, device=device)
    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with forked, torch.compiler.set_stance("force_eager"):
        for _ in range(2):
            torch.autograd.backward(wrapped(token, labels=token))
    torch._foreach_zero_([parameter.grad for parameter in wrapped.parameters() if parameter.grad is not None])


def _sum(gradients: Tensor) -> torch.futures.Future[Tensor]:
    """Sum over ranks, where DDP's own way takes the mean."""
    work = dist.all_reduce(gradients, async_op=True)
    assert work is not None, "an asynchronous collective returns its work"
    summed: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return summed
