"""Generation speed with and without the cache, beside transformers, on this machine, in one run.

    python -m benchmarks.generate [--new-tokens 128]

GPT-2 124M's shape with random weights, batch 1, greedy, float32 and bf16. Without the cache only a few tokens are
timed at the end of the same length, since each costs a whole pass.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers

from pipeline.config import ModelConfig
from pipeline.data.tokenizer import load_tokenizer
from pipeline.generate.decode import Options, generate, to_bf16
from pipeline.model.hf import save_hf
from pipeline.model.transformer import Decoder, build_model, initialise

VOCABULARY, PROMPT, UNCACHED = 50_257, 16, 4


def main() -> None:
    """Time our decoder and transformers' on the same exported weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, default=128)
    new = parser.parse_args().new_tokens
    model = build_model(ModelConfig(mlp="gelu_tanh"), n_tokens=VOCABULARY)
    initialise(model, seed=1)
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        files = load_tokenizer("bytes").exported(context_length=model.config.context_length)
        save_hf(model, Path(folder) / "hf", tokenizer_files=files, eos_id=256)
        theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "hf", dtype=torch.float32)
        theirs.train(False)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {PROMPT} + {new} tokens")
    for precision in ("float32", "bfloat16"):
        if precision == "bfloat16":
            to_bf16(model)
            theirs = theirs.to(torch.bfloat16)
        prompt = torch.randint(0, VOCABULARY, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
        cached = ours(model, prompt, new, cache=True)
        uncached = ours(model, prompt + prompt * (new // PROMPT), UNCACHED, cache=False)
        began = perf_counter()
        theirs.generate(torch.tensor([prompt]), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        other = new / (perf_counter() - began)
        print(
            f"{precision}: cache {cached:.1f} tokens/s, transformers {other:.1f} (ratio {cached / other:.2f}), "
            f"no cache at that length {uncached:.2f} (ratio {cached / uncached:.1f})"
        )


def ours(model: Decoder, prompt: list[int], new: int, *, cache: bool) -> float:
    """Tokens per second of our decoder."""
    options = Options(max_new_tokens=new, temperature=0, cache=cache)
    began = perf_counter()
    made = sum(token.id is not None for token in generate(model, [prompt], options=options))
    return made / (perf_counter() - began)


if __name__ == "__main__":
    main()
