"""The parts of a Transformer: norms, positions, attention, MLP.

In and out of each part: hidden states (B, T, C). Letters, here and in transformer.py:
B batch, T time (positions asked about), K key positions (looked at), H query heads, G key/value heads,
D head width, C channels, F hidden width of the MLP, V vocabulary, L layers.

Nothing here knows of ranks, devices, precision or optimizers: those are applied from outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from pipeline.config import ModelConfig

GRAPHS = 64  # of one compiled function: training and evaluation x windows x sizes of micro-batches


class LayerNorm(nn.Module):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias   (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, channels: int, *, eps: float, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        # weights gathered in bf16 meet a float32 stream; they may be wider than it, but not narrower
        wide = torch.promote_types(self.weight.dtype, x.dtype)
        bias = None if self.bias is None else self.bias.to(wide)
        return F.layer_norm(x, self.weight.shape, self.weight.to(wide), bias, self.eps)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight   (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, channels: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def build_norm(config: ModelConfig) -> nn.Module:
    """The norm of the residual stream."""
    match config.norm:
        case "layernorm":
            return LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)
        case "rmsnorm":
            return RMSNorm(config.d_model, eps=config.norm_eps)
    assert_never(config.norm)


def sinusoid(positions: Tensor, channels: int) -> Tensor:
    """Fixed position signal (Vaswani et al. 2017, arXiv:1706.03762, section 3.5).

    PE[t, 2i] = sin(t / 10000^(2i/C)),  PE[t, 2i+1] = cos(t / 10000^(2i/C));  (B, T) -> (B, T, C).
    """
    even = torch.arange(0, channels, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * torch.exp(even * (-math.log(10000.0) / channels))  # (B, T, C/2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)  # (B, T, C/2, 2) -> (B, T, C)


@dataclass(frozen=True)
class Rotation:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): turn pair i of a head by t * theta^(-2i/D).

    Pairs are (i, i + D/2), as in Llama checkpoints. `cos` and `sin`: (B or 1, 1, T, D), the second for heads.
    """

    cos: Tensor
    sin: Tensor

    @staticmethod
    def of(positions: Tensor, *, head_dim: int, theta: float) -> Rotation:
        """Angles for `positions` (B or 1, T), in float32 whatever the model's precision."""
        even = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
        angles = positions[..., None].float() * theta ** (-even / head_dim)  # (B, T, D/2)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)  # (B, 1, T, D)
        return Rotation(cos=angles.cos(), sin=angles.sin())

    def apply(self, x: Tensor) -> Tensor:
        """Rotate queries or keys: (B, heads, T, D) -> the same shape and type."""
        first, second = x.chunk(2, dim=-1)  # two of (B, heads, T, D/2)
        return (x * self.cos + torch.cat((-second, first), dim=-1) * self.sin).to(x.dtype)


@dataclass(frozen=True)
class LayerCache:
    """One layer's part of a `KVCache`. keys, values: (B, G, S, D), S = capacity."""

    keys: Tensor
    values: Tensor

    def extend(self, *, keys: Tensor, values: Tensor, positions: Tensor, visible: int) -> tuple[Tensor, Tensor]:
        """Store (B, G, T, D) at `positions` (B or 1, T); return the first `visible` = K positions, (B, G, K, D)."""
        rows = torch.arange(len(keys), device=keys.device)[:, None]  # (B, 1), pairs with (B or 1, T)
        for store, new in ((self.keys, keys), (self.values, values)):
            store.transpose(1, 2)[rows, positions] = new.transpose(1, 2).to(store.dtype)  # (B, T, G, D)
        return self.keys[:, :, :visible], self.values[:, :, :visible]


class KVCache:
    """Keys and values of the tokens seen so far, so that each new token costs one step, not a whole pass.

    Rows may be of unequal length: a token is stored at its own position, and what lies beyond a row's
    length is never looked at because attention is causal. keys, values: (L, B, G, S, D), S = capacity.
    """

    def __init__(
        self, config: ModelConfig, *, rows: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.n_layers, rows, config.kv_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def layer(self, number: int) -> LayerCache:
        """What layer `number` reads and writes; views, not copies."""
        return LayerCache(keys=self.keys[number], values=self.values[number])


@dataclass(frozen=True)
class Sight:
    """What one layer may look at; made by the stack, so that all layers of one window run the same compiled code.

    mask: a boolean (B or 1, 1, T, K), true where attention is allowed, or blocks for FlexAttention; None means plain
    causal attention, for which kernels need no mask.
    """

    positions: Tensor
    rotation: Rotation | None
    mask: Tensor | BlockMask | None
    cache: LayerCache | None
    visible: int


def causal_mask(positions: Tensor, key_positions: Tensor, *, window: int | None, documents: Tensor | None) -> Tensor:
    """Token t sees key k if k <= t, t - k < window and both lie in one document: (B, T), (K,) -> (B, 1, T, K)."""
    distance = positions[:, :, None] - key_positions  # (B, T, K)
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    if documents is not None:  # (B, T); only without a cache, so K = T and the mask is one of each row
        allowed = allowed & (documents[:, :, None] == documents[:, None, :])
    return allowed.unsqueeze(1)


def causal_blocks(*, time: int, window: int | None, documents: Tensor | None, device: torch.device) -> BlockMask:
    """`causal_mask` of whole rows as blocks of 128 x 128, so that attention skips what is masked (arXiv:2412.05496).

    documents: (B, T), or None for one mask of all rows.
    """

    def allowed(row: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= key
        if window is not None:
            seen = seen & (query - key < window)
        if documents is not None:
            seen = seen & (documents[row, query] == documents[row, key])
        return seen

    rows = None if documents is None else len(documents)
    return create_block_mask(allowed, rows, None, time, time, device=device)


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | BlockMask | None, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(D)) v with a causal or given mask; (B, H, T, D) with k, v (B, G, K, D) -> (B, H, T, D).

    Blocks are for CUDA, where FlexAttention has a backward pass, and without dropout, which it does not know.
    """
    if isinstance(mask, BlockMask):
        assert dropout == 0.0, "FlexAttention has no dropout: such layers get a boolean mask"
        # within a compiled block it becomes part of it; alone it would compute without its kernel
        flex: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
        # a norm may have left queries and keys in float32
        mixed: Tensor = flex(q.to(v.dtype), k.to(v.dtype), v, block_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
        return mixed
    if mask is not None and q.device.type == "cuda":
        return _attend_with_mask_on_cuda(q, k, v, mask=mask, dropout=dropout)
    # Measured on an AVX-512 BF16 CPU: for short sequences in bf16 plain matrix products take a quarter to
    # two thirds of the time of PyTorch's fused kernel, which computes in float32 there.
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= 512:
        return _attend_by_products(q, k, v, mask=mask, dropout=dropout)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, enable_gqa=k.shape[1] != q.shape[1]
    )


@cache
def _compiled_flex_attention() -> Any:
    """For models that are not compiled themselves. Past torch's limit of 8 graphs it would compute all scores."""
    from torch._dynamo import config as dynamo  # takes a second, and only such models need it

    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _attend_with_mask_on_cuda(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor, dropout: float) -> Tensor:
    """Without cuDNN, which makes a new plan for each number of keys: decoding would wait for one at every token.

    No other fused kernel takes both a mask and shared keys: the H / G heads that share them become rows of queries
    where there is one query, else the keys are repeated.
    """
    rows, heads, time, width = q.shape
    shared = k.shape[1]
    if time == 1:
        q = q.reshape(rows, shared, heads // shared, width)  # (B, H, 1, D) -> (B, G, H / G, D)
    elif shared != heads:
        k, v = (x.repeat_interleave(heads // shared, dim=1) for x in (k, v))
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return mixed.reshape(rows, heads, time, width)


def _attend_by_products(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, dropout: float) -> Tensor:
    heads, time = q.shape[1], q.shape[2]
    if k.shape[1] != heads:  # each key/value head serves H / G query heads
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    if mask is None:
        mask = torch.ones(time, k.shape[2], dtype=torch.bool, device=q.device).tril()[None, None]
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -math.inf)
    # (B, 1, T, K) -> (B * H, T, K); with one mask for all rows this stays a view of it
    bias = bias[0] if bias.shape[0] == 1 else bias.expand(-1, heads, -1, -1).flatten(0, 1)
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    weights = F.dropout(scores.softmax(dim=-1), dropout, training=dropout > 0)  # (B * H, T, K)
    return torch.bmm(weights, v.flatten(0, 1)).view_as(q)  # (B * H, T, D) -> (B, H, T, D)


class Attention(nn.Module):
    """Multi-head attention (arXiv:1706.03762), with H / G query heads sharing each key/value head.

    G = H is multi-head, G = 1 multi-query (arXiv:1911.02150), between them grouped-query (arXiv:2305.13245).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        kv_width = config.kv_heads * config.head_dim
        self.query = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.key_value = nn.Linear(config.d_model, 2 * kv_width, bias=config.bias)
        self.out = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        # Normalised queries and keys bound the logits of attention (Henry et al. 2020, arXiv:2010.04245).
        self.query_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, sight: Sight) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        q = self._split_heads(self.query(x))  # (B, H, T, D)
        k, v = (self._split_heads(part) for part in self.key_value(x).chunk(2, dim=-1))  # (B, G, T, D)
        q, k = self.query_norm(q), self.key_norm(k)
        if sight.rotation is not None:
            q, k = sight.rotation.apply(q), sight.rotation.apply(k)
        if sight.cache is not None:
            k, v = sight.cache.extend(keys=k, values=v, positions=sight.positions, visible=sight.visible)
        y = attend(q, k, v, mask=sight.mask, dropout=self.dropout if self.training else 0.0)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, H, D) -> (B, T, C)
        return out

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(
            1, 2
        )  # (B, T, C) -> (B, T, heads, D) -> (B, heads, T, D)


def relu2(x: Tensor) -> Tensor:
    """max(0, x)^2, element by element."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": relu2,
    "swiglu": F.silu,
}


class MLP(nn.Module):
    """Two layers around an activation, position by position.

    gelu: down(GELU(up(x))) (arXiv:1606.08415);  relu2: down(max(0, up(x))^2) (arXiv:2109.08668);
    swiglu: down(SiLU(gate(x)) * up(x)) (arXiv:2002.05202), with a third matrix.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.mlp]
        self.up = nn.Linear(config.d_model, config.hidden, bias=config.bias)
        self.gate = nn.Linear(config.d_model, config.hidden, bias=config.bias) if config.mlp == "swiglu" else None
        self.down = nn.Linear(config.hidden, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C), through (B, T, F)."""
        hidden = self.up(x)
        hidden = self.activation(hidden) if self.gate is None else self.activation(self.gate(x)) * hidden
        out: Tensor = self.down(hidden)
        return out
