"""GPT-2 in plain PyTorch, as a user would write it in an afternoon: the baseline of the training benchmarks.

In: the sizes of a GPT-2. Out: a module whose forward pass returns the mean loss, and the speed of a loop around it:
bf16 autocast, fused AdamW, gradient accumulation, clipping, one compiled graph of the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """Sizes of a GPT-2; `vocabulary` is padded to a multiple of 64 by the caller if that is wanted."""

    layers: int
    heads: int
    width: int
    context: int
    vocabulary: int


class Layer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.norm1 = nn.LayerNorm(sizes.width)
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width)
        self.out = nn.Linear(sizes.width, sizes.width)
        self.norm2 = nn.LayerNorm(sizes.width)
        self.up = nn.Linear(sizes.width, 4 * sizes.width)
        self.down = nn.Linear(4 * sizes.width, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        batch, time, width = x.shape
        q, k, v = (
            part.view(batch, time, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).split(width, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        hidden: Tensor = self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return x + hidden


class PlainGPT(nn.Module):
    """GPT-2 with tied embeddings."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.tokens = nn.Embedding(sizes.vocabulary, sizes.width)
        self.positions = nn.Embedding(sizes.context, sizes.width)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats per token; tokens and targets (B, T)."""
        x: Tensor = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(self.norm(x), self.tokens.weight)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def step_seconds(
    sizes: Sizes, *, micro_batch: int, accumulation: int, steps: int, device: torch.device, compiled: bool
) -> list[float]:
    """Wall seconds of each of `steps` updates, the first with its compilation; one wait for the device in each."""
    torch.manual_seed(1)
    model = PlainGPT(sizes).to(device)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
    loss_of = torch.compile(model) if compiled else model
    rows = torch.randint(0, sizes.vocabulary, (accumulation * micro_batch, sizes.context + 1))
    if device.type == "cuda":
        rows = rows.pin_memory()
    seconds = []
    for _ in range(steps):
        began = perf_counter()
        losses = []
        for part in torch.split(rows, micro_batch):
            part = part.to(device, non_blocking=True)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss: Tensor = loss_of(part[:, :-1], part[:, 1:]) / accumulation
            torch.autograd.backward(loss)
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).sum().item()  # what a loop logs, and the wait for the device
        seconds.append(perf_counter() - began)
    return seconds
