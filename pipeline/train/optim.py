"""The optimizer and its schedule.

In: a model's named parameters; a step. Out: an AdamW with two groups; the learning rate of that step, a pure
function of numbers. There is no scheduler object, so there is nothing of it to save or to restore wrongly.
"""

from __future__ import annotations

import math
from typing import assert_never

import torch
from torch import nn

from pipeline.config import Config, OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101): matrices are decayed, vectors are not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    grouped = {id(p) for p in (*matrices, *vectors)}
    assert grouped == {id(p) for p in model.parameters()}, "every parameter is trained, in exactly one group"
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    kinds = {"adamw": torch.optim.AdamW}
    return kinds[config.kind](groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, config: Config) -> float:
    """Learning rate of update `step` (1 is the first): linear warm-up, then the schedule's shape.

    With w = warm-up, h = horizon, and x = (step - w) / (h - w) clamped to [0, 1]:

    | schedule     | rate after warm-up                                                                    |
    |--------------|---------------------------------------------------------------------------------------|
    | cosine       | min + (lr - min) (1 + cos(pi x)) / 2                         (arXiv:1608.03983)       |
    | linear       | lr + (min - lr) x                                                                     |
    | wsd          | lr, then linear to min over the last `decay_fraction` of h   (arXiv:2404.06395)       |
    | inverse_sqrt | lr sqrt(max(w, 1) / step), at least min                      (arXiv:1706.03762, 5.3)  |
    | constant     | lr                                                                                    |
    """
    optim, warmup, horizon = config.optim, config.warmup, config.horizon
    if step <= warmup:
        return optim.lr * step / warmup
    progress = min((step - warmup) / max(horizon - warmup, 1), 1.0)
    match optim.schedule:
        case "cosine":
            return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return optim.lr + (optim.min_lr - optim.lr) * progress
        case "wsd":
            decay_steps = max(round(horizon * optim.decay_fraction), 1)
            decayed = min(max(step - (horizon - decay_steps), 0) / decay_steps, 1.0)
            return optim.lr + (optim.min_lr - optim.lr) * decayed
        case "inverse_sqrt":
            return max(optim.lr * math.sqrt(max(warmup, 1) / step), optim.min_lr)
        case "constant":
            return optim.lr
    assert_never(optim.schedule)
