"""How much memory training takes, and how much there is.

In: sizes of the model and settings; a `Runtime`. Out: bytes, before anything is allocated.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

from pipeline.config import Config, ModelConfig
from pipeline.model.transformer import build_model, count_parameters
from pipeline.train.runtime import Runtime


def model_sizes(config: ModelConfig, *, n_tokens: int) -> tuple[int, int]:
    """Parameters of the whole model, and of its largest part that FSDP gathers at once: a block, or all else."""
    with torch.device("meta"):
        model = build_model(config, n_tokens=n_tokens)
    parameters, block = count_parameters(model), count_parameters(model.stack.blocks[0])
    return parameters, max(block, parameters - block * config.n_layers)


def bytes_needed(
    config: Config, *, parameters: int, largest: int, n_tokens: int, precision: torch.dtype, shards: int, ranks: int
) -> int:
    """Peak memory of one of `ranks` in training: an estimate. `shards`: ranks that divide a replica (1: ddp).

    Weights, gradients and AdamW's two moments take 16 bytes per parameter, 32 in float64. To that come copies in the
    precision of matrix products, and activations.
    """
    exact, low = _widths(precision)
    state = 4 * exact * parameters // shards
    if shards == 1:
        gathered = low * parameters if low < exact else 0
    else:
        held = largest * (2 + config.parallel.prefetch) if config.parallel.reshard_after_forward else parameters
        kept = _accumulates(config, ranks) and not config.parallel.sync_every_micro_batch
        gathered = low * held + exact * (parameters if kept else 2 * largest)
    return state + gathered + _rows(config) * activation_bytes(config, n_tokens=n_tokens, precision=precision)


def _rows(config: Config) -> int:
    """Sequences of a micro-batch; the least there can be, where it is yet to be found."""
    return 1 if config.train.micro_batch == "auto" else config.train.micro_batch


def _accumulates(config: Config, ranks: int) -> bool:
    """Whether gradients wait for further micro-batches."""
    return config.ramp_of_rows.full > ranks * _rows(config)


def activation_bytes(config: Config, *, n_tokens: int, precision: torch.dtype) -> int:
    """What one sequence keeps for the backward pass, the logits' gradient included: an estimate.

    Per token and layer without checkpointing, with w bytes in matrix products, e elsewhere (4, or 8 in float64) and s
    in the residual stream (e, or w with train.residual bf16): 2 s C inputs of norms, w (5 C + 2 G D + 2 F) inputs and
    outputs of products and of attention, twice F more for a gated MLP. Logits: V in w, and three times in e: exact,
    normalised, and their gradient.
    """
    model = config.model
    e, w = _widths(precision)
    s = w if config.train.rounds_residual else e
    width, hidden, keys = model.d_model, model.hidden, model.kv_heads * model.head_dim
    matrices = 2 if model.mlp == "swiglu" else 1
    full = 2 * s * width + w * (5 * width + 2 * keys + 2 * matrices * hidden)
    per_layer = {
        "none": full,
        "selective": s * width + w * (4 * width + 2 * keys + matrices * hidden),
        "full": s * width,
    }[config.train.activation_checkpointing]
    again = 0 if config.train.activation_checkpointing == "none" else full  # the block that is being recomputed
    logits = n_tokens * (3 * e + (w if w < e else 0))
    return model.context_length * (model.n_layers * per_layer + again + logits)


def _widths(precision: torch.dtype) -> tuple[int, int]:
    """Bytes of a number outside of matrix products, and within."""
    return max(precision.itemsize, 4), precision.itemsize


def device_memory(runtime: Runtime) -> int | None:
    """Bytes that one rank may use in all: its CUDA device's, or its part of the host's. None: not known."""
    if runtime.device.type == "cuda":
        return torch.cuda.get_device_properties(runtime.device).total_memory
    found = (_meminfo("MemTotal"), _number(_CONTAINER / "memory.max"))
    known = [size for size in found if size is not None]
    return min(known) // runtime.local_world_size if known else None


def available_memory(runtime: Runtime) -> int | None:
    """Of that, what is free now. None: not known."""
    if runtime.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(runtime.device)
        kept = torch.cuda.memory_reserved(runtime.device) - torch.cuda.memory_allocated(runtime.device)
        return free + kept
    found = [_meminfo("MemAvailable")]
    limit, used = _number(_CONTAINER / "memory.max"), _number(_CONTAINER / "memory.current")
    if limit is not None and used is not None:
        found.append(limit - used)
    known = [size for size in found if size is not None]
    return min(known) // runtime.local_world_size if known else None


_CONTAINER = Path("/sys/fs/cgroup")


def _meminfo(key: str) -> int | None:
    """A line of what Linux tells of its memory, in bytes."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return None


def _number(path: Path) -> int | None:
    """A number that a container's limits hold; `max` stands for none."""
    with suppress(OSError, ValueError):
        return int(path.read_text(encoding="utf-8"))
    return None
