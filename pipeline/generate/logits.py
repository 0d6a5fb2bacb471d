"""From logits to the next token: pure functions, one concept of sampling each.

In: logits (B, V) in float32. Out: logits of the same shape with the excluded tokens at -inf, or token ids (B,).
Letters: B rows, V vocabulary. Rows never influence each other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def penalise_repetition(logits: Tensor, *, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens marked in `seen` (B, V) less likely (CTRL, arXiv:1909.05858, section 4.1).

    A positive logit is divided by `penalty` and a negative one multiplied, so that both go down when it is above 1.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def heat(logits: Tensor, *, temperature: float) -> Tensor:
    """Shift each row so that its maximum is 0, which no temperature overflows, and divide it by `temperature` > 0."""
    shifted = logits.double() - logits.amax(dim=-1, keepdim=True)
    return (shifted / temperature).float()


def keep_top_k(logits: Tensor, *, k: int) -> Tensor:
    """Keep the `k` most likely tokens (arXiv:1805.04833), and those as likely as the last of them."""
    k = min(k, logits.shape[-1])
    least = logits.topk(k, dim=-1).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < least, -math.inf)


def keep_top_p(logits: Tensor, *, p: float) -> Tensor:
    """Keep the smallest set of most likely tokens that holds probability `p` (nucleus, arXiv:1904.09751)."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)  # (B, V)
    probabilities = ordered.double().softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # what the tokens ahead of this one hold
    drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(drop, -math.inf)


def keep_min_p(logits: Tensor, *, p: float) -> Tensor:
    """Keep the tokens at least `p` times as likely as the most likely one (arXiv:2407.01082); `p` > 0."""
    least = logits.amax(dim=-1, keepdim=True) + math.log(p)  # (B, 1)
    return logits.masked_fill(logits < least, -math.inf)


def draw(logits: Tensor, *, uniforms: Tensor) -> Tensor:
    """The token at which the cumulated softmax (B, V) passes `uniforms` (B,), float64 in [0, 1); gives ids (B,).

    One number per token decides it, so a row's choice depends on that number and its own logits only. A token of
    probability 0 is never drawn.
    """
    cumulated = logits.double().softmax(dim=-1).cumsum(dim=-1)
    cumulated = cumulated / cumulated[:, -1:]  # the last is exactly 1, above every uniform number
    return torch.searchsorted(cumulated, uniforms[:, None], right=True).squeeze(1)
