"""The loss of a large vocabulary on CUDA.

In: logits (N, rows of the embedding) and labels (N,). Out: the summed cross-entropy in nats.

Logits are the largest tensor of a step: 2 GB in bf16 for 20,480 tokens of GPT-2. Compiled, this reads them whole rows
at a time and keeps nothing else of their size. What autograd makes of `F.cross_entropy` does the same bytes in more
instructions, and instructions are what bounds it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override


class SummedCrossEntropy(torch.autograd.Function):
    """sum over n of log(sum over v of exp(z[n, v])) - z[n, label[n]], over the first `n_tokens` columns.

    labels: -100 where there is nothing to predict. Apply as `SummedCrossEntropy.apply(logits, labels, n_tokens)`.
    """

    @staticmethod
    @override
    def forward(ctx: Any, logits: Tensor, labels: Tensor, n_tokens: int) -> Tensor:
        """(N, rows), (N,) -> () in float32 at least."""
        z = _masked(logits, n_tokens)  # (N, rows)
        largest = z.amax(dim=-1, keepdim=True)
        normaliser = (largest + (z - largest).exp().sum(dim=-1, keepdim=True).log()).squeeze(-1)  # (N,)
        counted = labels >= 0
        labels = labels.to(torch.int32)
        picked = logits.gather(-1, labels.clamp(min=0).long()[:, None]).squeeze(-1)  # (N,)
        ctx.save_for_backward(logits, labels, normaliser)
        ctx.n_tokens = n_tokens
        return torch.where(counted, normaliser - picked, 0.0).sum()

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """d/dz[n, v] = softmax(z[n])[v] - (v == label[n]), times the gradient of the sum."""
        logits, labels, normaliser = ctx.saved_tensors
        weight = torch.where(labels >= 0, gradients[0], 0.0)[:, None]
        z = _masked(logits, ctx.n_tokens)
        probability = (z - normaliser[:, None]).exp()
        columns = torch.arange(logits.shape[-1], device=logits.device, dtype=labels.dtype)
        gradient = torch.where(columns == labels[:, None], probability - 1, probability) * weight
        return gradient.to(logits.dtype), None, None


def _masked(logits: Tensor, n_tokens: int) -> Tensor:
    """In float32 at least, and -inf in the columns that are no tokens."""
    columns = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(columns < n_tokens, logits.to(torch.promote_types(logits.dtype, torch.float32)), -math.inf)
