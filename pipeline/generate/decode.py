"""Decoding: prompts become longer, one token per row and step.

In: a model and prompts as token ids. Out: `Token` events as they are made, of all rows of the batch in turn.
Letters: B rows alive, T time, V vocabulary; n tokens a row has so far, C the model's context length.

The model looks at a window of each row that starts at `window_start(n)` and ends with its newest token. With the
cache, the keys and values of the window are kept and each step feeds one token per row; without it, each step feeds
every window whole. Both see the same tokens at the same positions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.generate.arguments import Options as Options  # part of this module to all others
from pipeline.generate.logits import draw, heat, keep_min_p, keep_top_k, keep_top_p, penalise_repetition
from pipeline.model.layers import KVCache
from pipeline.model.transformer import Decoder
from pipeline.seeds import named_seed

KEYS_AT_ONCE = 128  # visible keys on CUDA are a multiple of this: a handful of graphs, and aligned masks
Finish = Literal["eos", "stop", "length"]
Until = Callable[[int, int, int], bool]


@dataclass(frozen=True)
class Token:
    """One event of row (prompt, sample): a new token, the end of the row, or both."""

    prompt: int
    sample: int
    id: int | None
    """None when the row ended with "eos": the EOS token is no part of the output."""
    finish: Finish | None


@dataclass
class _Row:
    prompt: int
    sample: int
    tokens: list[int]
    limit: int  # length of `tokens` at which the row ends
    stream: torch.Generator
    cached_from: int | None = None  # window start of what the cache holds of this row
    seen: Tensor | None = field(default=None, repr=False)  # (V,), only with a repetition penalty


def window_start(n: int, *, context_length: int) -> int:
    """Index of the first of `n` tokens that the model sees when it predicts token `n`.

    0 while the tokens fit. When the window is full it starts again with its last C // 2 tokens, so that a row is
    recomputed once per C - C // 2 + 1 tokens and not for each.
    """
    kept = max(context_length // 2, 1)
    stride = context_length + 1 - kept
    return max(0, -(-(n - context_length) // stride)) * stride


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    options: Options,
    eos_ids: Collection[int] = (),
    until: Until | None = None,
) -> Iterator[Token]:
    """Continue each of `prompts` (token ids, lengths may differ) `num_samples` times, yielding tokens as they come.

    A row ends with "eos" at a token of `eos_ids`, with "stop" when `until(prompt, sample, id)`, asked after each token,
    is true, and with "length" at `max_new_tokens`. Rows that ended leave the
    batch. Rows are independent of each other up to the rounding of matrix products of other sizes. The model must be
    in evaluation mode; cast it with `to_bf16` for bf16. An empty prompt or an id out of range is a `UserError`.
    """
    assert not model.training, "call model.eval() before generating: dropout would change the text"
    _check_prompts(prompts, n_tokens=model.n_tokens)
    pairs = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(options.num_samples)]
    rows = (_new_row(prompts[prompt], prompt, sample, model=model, options=options) for prompt, sample in pairs)
    batches = (list(islice(rows, options.batch_rows)) for _ in range(0, len(pairs), options.batch_rows))
    return chain.from_iterable(
        _generate_batch(model, batch, options=options, eos_ids=frozenset(eos_ids), until=until) for batch in batches
    )


def to_bf16(model: Decoder) -> Decoder:
    """Cast the model's matrices to bfloat16 in place, half the bytes to read per token; norms stay float32."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.to(torch.bfloat16)
    return model


def _check_prompts(prompts: Sequence[Sequence[int]], *, n_tokens: int) -> None:
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {number} has no tokens: start from the EOS token instead")
        if min(prompt) < 0 or max(prompt) >= n_tokens:
            wrong = next(token for token in prompt if not 0 <= token < n_tokens)
            raise UserError(f"prompt {number} holds token {wrong}, but the model knows tokens 0 to {n_tokens - 1}")


def _new_row(tokens: Sequence[int], prompt: int, sample: int, *, model: Decoder, options: Options) -> _Row:
    stream = torch.Generator().manual_seed(named_seed(options.seed, "sample", prompt, sample))
    row = _Row(prompt, sample, list(tokens), limit=len(tokens) + options.max_new_tokens, stream=stream)
    if options.repetition_penalty != 1:
        device = model.embedding.tokens.weight.device
        row.seen = torch.zeros(model.n_tokens, dtype=torch.bool, device=device)
        row.seen[row.tokens] = True
    return row


def _generate_batch(
    model: Decoder, rows: list[_Row], *, options: Options, eos_ids: frozenset[int], until: Until | None
) -> Iterator[Token]:
    reader = _Reader(model, rows, use_cache=options.cache)
    while rows:
        chosen = _choose(reader.logits(rows), rows, options=options)
        events = [_append(row, token, eos_ids=eos_ids, until=until) for row, token in zip(rows, chosen, strict=True)]
        yield from events
        for index in reversed(range(len(rows))):
            if events[index].finish is not None:
                reader.drop(index, rows)


def _append(row: _Row, token: int, *, eos_ids: frozenset[int], until: Until | None) -> Token:
    if token in eos_ids:
        return Token(row.prompt, row.sample, id=None, finish="eos")
    row.tokens.append(token)
    if row.seen is not None:
        row.seen[token] = True
    finish: Finish | None = "length" if len(row.tokens) == row.limit else None
    if until is not None and until(row.prompt, row.sample, token):
        finish = "stop"
    return Token(row.prompt, row.sample, id=token, finish=finish)


@torch.inference_mode()
def _choose(logits: Tensor, rows: Sequence[_Row], *, options: Options) -> list[int]:
    """The next token of each row, from float32 logits (B, V)."""
    if bool(logits.isnan().any()):
        raise UserError("the model's logits are not numbers (NaN): its weights are damaged, or its training diverged")
    seen = [row.seen for row in rows if row.seen is not None]
    if seen:
        logits = penalise_repetition(logits, seen=torch.stack(seen), penalty=options.repetition_penalty)
    if options.temperature == 0:
        return [int(token) for token in logits.argmax(dim=-1).tolist()]
    logits = heat(logits, temperature=options.temperature)
    if options.top_k is not None:
        logits = keep_top_k(logits, k=options.top_k)
    if options.top_p < 1:
        logits = keep_top_p(logits, p=options.top_p)
    if options.min_p > 0:
        logits = keep_min_p(logits, p=options.min_p)
    uniforms = torch.stack([torch.rand((), generator=row.stream, dtype=torch.float64) for row in rows])  # (B,)
    return [int(token) for token in draw(logits, uniforms=uniforms.to(logits.device)).tolist()]


class FixedStep:
    """The model on one token per row, in tensors that stay where they are, so that CUDA can replay it as a graph.

    A step of a small model is some three hundred kernels of a few microseconds each: launched one by one they take ten
    times as long as replayed. There is one graph for each of a handful of numbers of visible keys. All rows of `cache`
    are computed every time, also those that nobody asks for any more; what those hold is never looked at.
    """

    def __init__(self, model: Decoder, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        rows, self.capacity = cache.keys.shape[1], cache.keys.shape[3]
        self.tokens = torch.zeros((rows, 1), dtype=torch.int64, device=cache.keys.device)
        self.positions = torch.zeros_like(self.tokens)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def logits(self, tokens: Sequence[int], places: Sequence[int]) -> Tensor:
        """For the first rows of the cache, of which these are the newest tokens and their positions: (B, V)."""
        count = len(tokens)
        self.tokens[:count, 0] = torch.tensor(tokens, device=self.tokens.device)
        self.positions[:count, 0] = torch.tensor(places, device=self.tokens.device)
        visible = min(-(-(max(places) + 1) // KEYS_AT_ONCE) * KEYS_AT_ONCE, self.capacity)
        if self.tokens.device.type != "cuda":
            return self._run(visible)[:count, 0]
        if visible not in self._graphs:
            self._graphs[visible] = self._captured(visible)
        graph, logits = self._graphs[visible]
        graph.replay()
        return logits[:count, 0]

    def _run(self, visible: int) -> Tensor:
        with decoding_precision(self.model):
            logits: Tensor = self.model(self.tokens, positions=self.positions, cache=self.cache, visible=visible)
        return logits

    def _captured(self, visible: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        current = torch.cuda.current_stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            self._run(visible)  # libraries set themselves up at their first call, which may not be captured
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._run(visible)
        return graph, logits


def decoding_precision(model: Decoder) -> torch.autocast:
    """Norms and positions of a bf16 model compute in float32; autocast joins them to its matrices."""
    weight = model.embedding.tokens.weight
    bf16 = weight.dtype == torch.bfloat16
    return torch.autocast(weight.device.type, dtype=torch.bfloat16, enabled=bf16, cache_enabled=False)


class _Reader:
    """Runs the model over the windows of rows; owns the cache, whose row i belongs to `rows[i]`."""

    def __init__(self, model: Decoder, rows: Sequence[_Row], *, use_cache: bool) -> None:
        self.model = model
        weight = model.embedding.tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.context = model.config.context_length
        self.cache: KVCache | None = None
        self.step: FixedStep | None = None
        if use_cache:
            self.cache = self._new_cache(rows=len(rows), capacity=min(self.context, max(row.limit for row in rows)))
            if self.device.type == "cuda":
                self.step = FixedStep(model, self.cache)

    @torch.inference_mode()
    def logits(self, rows: Sequence[_Row]) -> Tensor:
        """What each row predicts next: (B, V) in float32."""
        starts = [window_start(len(row.tokens), context_length=self.context) for row in rows]
        if self.cache is None:
            windows = [row.tokens[start:] for row, start in zip(rows, starts, strict=True)]
            return self._read(windows, cache=None)
        stale = [index for index, row in enumerate(rows) if row.cached_from != starts[index]]
        self._prefill([rows[index].tokens[starts[index] : -1] for index in stale], into=stale)
        for index in stale:
            rows[index].cached_from = starts[index]
        newest = [row.tokens[-1] for row in rows]
        places = [len(row.tokens) - 1 - start for row, start in zip(rows, starts, strict=True)]
        if self.step is not None:
            return self.step.logits(newest, places).float()
        tokens, positions = (torch.tensor(numbers, device=self.device)[:, None] for numbers in (newest, places))
        with decoding_precision(self.model):
            logits: Tensor = self.model(tokens, positions=positions, cache=self.cache, visible=max(places) + 1)
        return logits[:, 0].float()

    def drop(self, index: int, rows: list[_Row]) -> None:
        """Take a row out of the batch; the last one moves to its place, so only one row is copied."""
        last = rows.pop()
        if index < len(rows):
            rows[index] = last
        if self.cache is not None:
            for name in ("keys", "values"):
                store: Tensor = getattr(self.cache, name)  # (L, B, G, S, D)
                store[:, index] = store[:, len(rows)].clone()
                if self.step is None:
                    setattr(self.cache, name, store[:, : len(rows)])

    def _prefill(self, windows: list[list[int]], *, into: list[int]) -> None:
        """Put the keys and values of `windows` at the start of the cache's rows `into`; equal windows are run once."""
        assert self.cache is not None, "only a reader with a cache is filled"
        longest = max(map(len, windows), default=0)
        if longest == 0:
            return
        distinct = sorted({tuple(window) for window in windows})
        part = self._new_cache(rows=len(distinct), capacity=longest)
        self._read(distinct, cache=part)
        copies = [distinct.index(tuple(window)) for window in windows]
        self.cache.keys[:, into, :, :longest] = part.keys[:, copies]  # (L, rows, G, longest, D)
        self.cache.values[:, into, :, :longest] = part.values[:, copies]

    def _read(self, windows: Sequence[Sequence[int]], *, cache: KVCache | None) -> Tensor:
        """Run windows of unequal length, padded on the right: (B, V) float32 logits after each one's last token."""
        longest = max(map(len, windows))
        padded = torch.tensor([[*window, *[0] * (longest - len(window))] for window in windows], device=self.device)
        last = torch.tensor([max(len(window) - 1, 0) for window in windows], device=self.device)
        with decoding_precision(self.model):
            logits: Tensor = self.model(padded, cache=cache, last=last)  # (B, 1, V)
        return logits[:, 0].float()

    def _new_cache(self, *, rows: int, capacity: int) -> KVCache:
        return KVCache(self.model.config, rows=rows, capacity=capacity, dtype=self.dtype, device=self.device)
