"""Models composed from one block: how a token becomes logits, or a loss.

In: token ids (B, T). Out: logits (B, T, V), or with labels the summed cross-entropy in nats.
Letters as in layers.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.model.layers import (
    MLP,
    Attention,
    KVCache,
    Rotation,
    Sight,
    build_norm,
    causal_blocks,
    causal_mask,
    sinusoid,
)
from pipeline.model.loss import SummedCrossEntropy
from pipeline.seeds import named_seed
from pipeline.untrusted import shown

DRAWN_AT_ONCE = 1 << 16  # initial values: a stream costs about 10 us to start, as much as some thousand values
_DRAWERS = 8  # threads that draw them: the copies to their place would keep no more busy
FLEX_WIDTH = 16  # the narrowest head that FlexAttention takes


class Block(nn.Module):
    """Attention mixes positions, then an MLP works on each; both add to the residual stream.

    pre-norm (GPT-2):               x + f(norm(x))
    post-norm (arXiv:1706.03762):   norm(x + f(x))
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.attention_norm = build_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = build_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, sight: Sight) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if self.pre_norm:
            x = x + self._attend(self.attention_norm(x), sight)
            x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        else:
            x = self.attention_norm(x + self._attend(x, sight))
            x = self.mlp_norm(x + self.dropout(self.mlp(x)))
        return x

    def _attend(self, x: Tensor, sight: Sight) -> Tensor:
        mixed: Tensor = self.attention(x, sight)
        return F.dropout(mixed, self.dropout.p, self.training)


def windows_of(config: ModelConfig) -> list[int | None]:
    """How far each layer looks back, in tokens; None: as far as the context."""
    return [config.windows[layer % len(config.windows)] for layer in range(config.n_layers)]


class Stack(nn.Module):
    """Blocks one after the other; with pre-norm a last norm brings the stream back to unit scale."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = build_norm(config) if config.pre_norm else nn.Identity()

    def forward(
        self, x: Tensor, *, positions: Tensor, documents: Tensor | None, cache: KVCache | None, visible: int
    ) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        by_blocks = cache is None and self._fits_flex(x)
        sights = self._sights(positions, documents=documents, cache=cache, visible=visible, by_blocks=by_blocks)
        for block, sight in zip(self.blocks, sights, strict=True):
            x = block(x, sight)
        x = self.final_norm(x)
        return x

    def _fits_flex(self, x: Tensor) -> bool:
        """Whether FlexAttention is for the stream (B, T, C): on CUDA, without dropout, not in float64.

        In whole contexts alone: each length is compiled, and past `GRAPHS` of them torch refuses. Decoding without a
        cache reads a new length at every token. Below a block of 128 torch takes a kernel that knows only powers of two
        for the number of heads that share keys.
        """
        config, time = self.config, x.shape[1]
        dropout = self.training and config.dropout > 0
        shared = config.n_heads // config.kv_heads
        heads = config.head_dim >= FLEX_WIDTH and (time >= 128 or shared & (shared - 1) == 0)
        whole = time == config.context_length
        return x.device.type == "cuda" and x.dtype != torch.float64 and not dropout and heads and whole

    def _sights(
        self, positions: Tensor, *, documents: Tensor | None, cache: KVCache | None, visible: int, by_blocks: bool
    ) -> list[Sight]:
        """One for each layer; what layers have in common is computed once."""
        config = self.config
        rotation = None
        if config.position == "rotary":
            rotation = Rotation.of(positions, head_dim=config.head_dim, theta=config.rope_theta)
        keys = torch.arange(visible, device=positions.device)  # (K,)
        # Positions of packed rows begin again with each document; what is earlier is told by the place in the row.
        places = keys[None] if cache is None else positions  # (B or 1, T)
        masks: dict[int | None, Tensor | BlockMask | None] = {}
        for window in set(config.windows):
            plain = cache is None and documents is None and (window is None or window >= visible)
            if plain:
                masks[window] = None
            elif by_blocks:
                masks[window] = causal_blocks(time=visible, window=window, documents=documents, device=positions.device)
            else:
                masks[window] = causal_mask(places, keys, window=window, documents=documents)
        caches = [cache.layer(layer) if cache is not None else None for layer in range(config.n_layers)]
        return [
            Sight(positions, rotation, mask=masks[window], cache=part, visible=visible)
            for window, part in zip(windows_of(config), caches, strict=True)
        ]


class Embedding(nn.Module):
    """Token vectors, with position vectors added where positions are learned or sinusoidal."""

    def __init__(self, config: ModelConfig, *, rows: int) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(rows, config.d_model)
        self.positions: nn.Embedding | None = None
        match config.position:
            case "learned":
                self.positions = nn.Embedding(config.context_length, config.d_model)
            case "sinusoidal" | "rotary" | "none":
                pass  # added in `forward`, applied in attention, or not there at all
            case _:
                assert_never(config.position)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """(B, T) ids and positions -> (B, T, C)."""
        x: Tensor = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions(positions)
        elif self.config.position == "sinusoidal":
            # Scaled up, as in the original, so that the tokens are not drowned by a signal of unit size.
            x = x * math.sqrt(self.config.d_model) + sinusoid(positions, self.config.d_model)
        x = self.dropout(x)
        return x


class Decoder(nn.Module):
    """GPT: each token is predicted from those before it (Radford et al. 2019).

    `n_tokens` is the tokenizer's size. The embedding may have more rows (a multiple of 64 is faster);
    the surplus is cut off the logits, so it is neither trained nor sampled.
    """

    def __init__(self, config: ModelConfig, *, n_tokens: int) -> None:
        super().__init__()
        self.config = config
        self.n_tokens = n_tokens
        rows = config.embedding_rows(n_tokens)
        self.embedding = Embedding(config, rows=rows)
        self.stack = Stack(config)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, rows, bias=False)

    def forward(
        self,
        tokens: Tensor,
        *,
        labels: Tensor | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        visible: int | None = None,
        last: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V), or the summed loss in nats () when `labels` (B, T) are given.

        tokens: (B, T) ids. labels: next ids, -100 where there is nothing to predict. documents: (B, T) numbers;
        attention stays within equal ones. positions: (B or 1, T), default 0..T-1; they may begin again within a row.
        With a cache, keys at positions 0..visible-1 are looked at; default T. last: (B,) one index into T per row, the
        only position whose logits are wanted, which are then (B, 1, V): the head costs as much as several blocks.
        """
        rows, time = tokens.shape
        if positions is None:
            positions = torch.arange(time, device=tokens.device)[None]  # (1, T), the same for all rows
        x = self.embedding(tokens, positions)  # (B, T, C)
        x = self.stack(x, positions=positions, documents=documents, cache=cache, visible=visible or time)
        if last is not None:
            x = x[torch.arange(rows, device=x.device), last].unsqueeze(1)  # (B, T, C) -> (B, 1, C)
        return self.logits(x) if labels is None else self.nats(x, labels)

    def logits(self, x: Tensor) -> Tensor:
        """What the stream says of the next token: (B, T, C) -> (B, T, V)."""
        return self._capped(self._scores(x)[..., : self.n_tokens])  # (B, T, rows) -> (B, T, V)

    def nats(self, x: Tensor, labels: Tensor) -> Tensor:
        """The summed cross-entropy of labels (B, T) given the stream (B, T, C)."""
        if x.device.type == "cuda":
            logits = self._capped(self._scores(x)).flatten(0, 1)  # (B, T, rows) -> (B T, rows)
            loss: Tensor = SummedCrossEntropy.apply(logits, labels.flatten(), self.n_tokens)  # type: ignore[no-untyped-call]
            return loss
        # a bf16 log-sum-exp over a large vocabulary would cost the loss its third digit
        logits = _exact(self.logits(x)).flatten(0, 1)  # (B, T, V) -> (B T, V)
        return F.cross_entropy(logits, labels.flatten(), reduction="sum")

    def _scores(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, rows of the embedding)."""
        weight = self.embedding.tokens.weight if self.head is None else self.head.weight
        return F.linear(x, weight)

    def _capped(self, logits: Tensor) -> Tensor:
        cap = self.config.logit_soft_cap
        return logits if cap is None else cap * torch.tanh(_exact(logits) / cap)


def _exact(x: Tensor) -> Tensor:
    """In float32 at least: float64 stays what it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def build_model(config: ModelConfig, *, n_tokens: int) -> Decoder:
    """The model that `config` describes, with uninitialised weights; see `initialise`."""
    families = {"decoder": Decoder}
    return families[config.family](config, n_tokens=n_tokens)


def build_without_memory(config: ModelConfig, *, n_tokens: int) -> Decoder:
    """The model on the meta device: its shapes can be compared with stored ones before there is memory for it."""
    with torch.device("meta"):
        return build_model(config, n_tokens=n_tokens)


def give_memory(model: Decoder, device: torch.device) -> Decoder:
    """Memory for a model that has none; what is in it is left over from others until every parameter is read."""
    assert not [*model.buffers()], "buffers are read from nowhere"
    return model.to_empty(device=device)


def check_size(config: ModelConfig, *, n_tokens: int, tensors: int, where: str) -> None:
    """Raise `UserError` for settings too large even to be compared, shape by shape, with `tensors` stored ones.

    Each layer has several tensors, and a million layers without memory would still take minutes to build; numbers of
    elements beyond 64 bits cannot be written down as a shape.
    """
    d = config.d_model
    elements = d * (config.embedding_rows(n_tokens) + config.context_length + 2 * config.n_layers * (d + config.hidden))
    if config.n_layers > tensors or elements >= 2**60:
        raise UserError(
            f"{where} holds {tensors:,} tensors, which cannot be {config.n_layers:,} layers of width {shown(d)} for a "
            f"vocabulary of {shown(n_tokens)}: settings and tensors belong to different models"
        )


Held = Callable[[Tensor], tuple[Tensor, range]]
"""Of a parameter: the values that are here, to be written to, and which of its rows they are."""


def all_rows(parameter: Tensor) -> tuple[Tensor, range]:
    """`Held` of a model that is whole."""
    return parameter, range(len(parameter))


@torch.no_grad()
def initialise(model: Decoder, *, seed: int, held: Held = all_rows) -> None:
    """Give every parameter its initial value, drawn from streams named after the parameter and a block of its rows.

    | parameter                               | value                                |
    |-----------------------------------------|--------------------------------------|
    | norm weights                            | 1                                    |
    | biases                                  | 0                                    |
    | attention.out, mlp.down (they write     | N(0, init_std / sqrt(2 n_layers))    |
    | into the residual stream, 2 per block)  | so that its variance does not grow   |
    | embeddings, head, all other matrices    | N(0, init_std)                       |

    (Radford et al. 2019, section 2.3.) A row's values depend on seed, name, number of columns and place alone. So every
    layout of a model over devices starts from the same weights, and a device draws only the rows that it holds, but for
    the rest of the first and last block.
    """
    config = model.config
    with ThreadPoolExecutor(min(torch.get_num_threads(), _DRAWERS)) as pool:
        for name, parameter in model.named_parameters():
            values, rows = held(parameter)
            if parameter.dim() == 1:
                values.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            into_stream = name.endswith(("attention.out.weight", "mlp.down.weight"))
            std = config.init_std / math.sqrt(2 * config.n_layers) if into_stream else config.init_std
            for part, drawn in _normal(rows, columns=parameter.shape[1], name=("init", name), seed=seed, pool=pool):
                values[part.start - rows.start : part.stop - rows.start] = (drawn * std).to(values)


def _normal(
    rows: range, *, columns: int, name: tuple[str, str], seed: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[range, Tensor]]:
    """Standard normal values (n, columns) of `rows`, in pieces; always drawn in float32 and in whole blocks."""
    block = max(DRAWN_AT_ONCE // columns, 1)

    def draw(first: int) -> tuple[range, Tensor]:
        stream = torch.Generator().manual_seed(named_seed(seed, *name, first // block))
        part = range(max(first, rows.start), min(first + block, rows.stop))
        return part, torch.randn(block, columns, generator=stream)[part.start - first : part.stop - first]

    return pool.map(draw, range(rows.start // block * block, rows.stop, block))


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers; a tied head counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(model: Decoder, *, context_length: int) -> int:
    """Floating-point operations of forward and backward per token (PaLM's accounting, arXiv:2204.02311, app. B).

    6 per weight of every matrix product (2 forward, 4 backward), the head's included, embeddings' look-ups not;
    and 12 C K per layer for q k^T and weights x v over K keys, K = the context or the layer's window. The causal
    half is not taken off, which is the convention of published MFU figures.
    """
    config = model.config
    head = config.d_model * model.n_tokens
    matrices = sum(p.numel() for p in _matrices(model.stack))
    keys = sum(min(window or context_length, context_length) for window in windows_of(config))
    return 6 * (matrices + head) + 12 * config.d_model * keys


def _matrices(module: nn.Module) -> Iterator[Tensor]:
    return (parameter for parameter in module.parameters() if parameter.dim() == 2)
