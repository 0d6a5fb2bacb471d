"""Training speed beside transformers' GPT-2 in the same loop, on this machine, in one run.

    python -m benchmarks.train_step [--rounds 3]

6 layers, 6 heads, d 384, context 256, 65 characters, batch 16: the shape at which several trainers' CPU figures are
published. Both models take turns, so that a drift of the machine's speed meets both. Prints tokens per second
(median of the rounds) and the ratio.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
import transformers
from torch import Tensor

from pipeline.config import Config
from pipeline.model.transformer import build_model, flops_per_token, initialise
from pipeline.train.optim import build_optimizer

ROWS, CONTEXT, VOCABULARY, STEPS = 16, 256, 65, 8
SHAPE = {"n_layers": 6, "n_heads": 6, "d_model": 384, "context_length": CONTEXT}


def main() -> None:
    """Time both models in float32 and in bf16 autocast."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    config = Config.model_validate({"model": SHAPE, "train": {"steps": 10, "batch_tokens": ROWS * CONTEXT}})
    ours = build_model(config.model, n_tokens=VOCABULARY)
    initialise(ours, seed=1)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=384, n_layer=6, n_head=6,
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        )
    )  # fmt: skip
    tokens = torch.randint(0, VOCABULARY, (ROWS, CONTEXT), generator=torch.Generator().manual_seed(1))
    losses: dict[str, Callable[[], Tensor]] = {
        "this project": lambda: ours(tokens, labels=tokens) / tokens.numel(),
        "transformers": lambda: theirs(tokens, labels=tokens).loss,
    }
    optimizers = {
        "this project": build_optimizer(ours, config.optim),
        "transformers": torch.optim.AdamW(theirs.parameters(), lr=6e-4, fused=True),
    }
    flops = flops_per_token(ours, context_length=CONTEXT)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {flops / 1e6:.0f} MFLOP per token")
    for precision in (torch.float32, torch.bfloat16):
        rates: dict[str, list[float]] = {name: [] for name in losses}
        for _ in range(rounds):
            for name, loss in losses.items():
                rates[name].append(tokens_per_second(loss, optimizers[name], precision))
        middle = {name: median(found) for name, found in rates.items()}
        shown = ", ".join(f"{name} {rate:,.0f} tokens/s" for name, rate in middle.items())
        print(f"{precision}: {shown}, ratio {middle['this project'] / middle['transformers']:.2f}")


def tokens_per_second(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, precision: torch.dtype) -> float:
    """Median rate over a few updates, after one to warm up."""
    seconds = []
    for _ in range(STEPS + 1):
        began = perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            value = loss()
        torch.autograd.backward(value)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(perf_counter() - began)
    return ROWS * CONTEXT / median(seconds[1:])


if __name__ == "__main__":
    main()
