"""Small corpora, datasets and runs for the tests; and a way to start the scripts quickly."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import random
import sys
from pathlib import Path
from typing import Any

import matplotlib.backends.backend_agg  # noqa: F401 - imported by draw_curves, here once for all forks
import torch
import torch._dynamo  # imported by the first optimizer, likewise
import yaml
from rich.console import Console

import pretrain
from pipeline.data.preparing.prepare import prepare
from pipeline.data.preparing.request import Request
from pipeline.errors import run_command

WORDS = ("the", "a", "of", "to", "and", "in", "that", "it", "is", "was", "he", "for", "on", "are", "as", "with", "his")

# Scripts run in processes forked from one that has imported them already: a start takes a tenth of a second.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.support"])


def write_corpus(path: Path, *, documents: int = 160, seed: int = 1) -> Path:
    """JSON lines of random words: compressible, so that a model has something to learn."""
    generator = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(documents):
            text = " ".join(generator.choices(WORDS, k=generator.randint(20, 120))) + ".\n"
            file.write(json.dumps({"text": text}) + "\n")
    return path


def make_dataset(
    folder: Path, *, documents: int = 160, seed: int = 1, tokenizer: str = "bytes", val: float = 0.2
) -> Path:
    """A dataset of random words in `folder`, made of `<folder>.jsonl` beside it."""
    corpus = write_corpus(folder.with_suffix(".jsonl"), documents=documents, seed=seed)
    request = Request(inputs=(str(corpus),), output=folder, tokenizer=tokenizer, val_fraction=val)
    prepare(request, console=Console(quiet=True))
    return folder


def tiny_settings(dataset: Path, run_dir: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run of seconds on one core: 2 layers, 32 channels, 12 steps; `sections` override single keys."""
    settings: dict[str, Any] = {
        "run_dir": str(run_dir),
        "data": {"path": str(dataset)},
        "model": {"n_layers": 2, "n_heads": 2, "d_model": 32, "context_length": 32},
        "optim": {"lr": 3e-3, "warmup_steps": 2, "min_lr": 1e-4},
        "train": {"steps": 12, "batch_tokens": 256, "micro_batch": 8, "precision": "fp32", "device": "cpu"},
        "checkpoint": {"every": 4},
        "eval": {"every": 5, "tokens": 512},
        "log": {"every": 1},
    }
    for section, keys in sections.items():
        settings[section] = {**settings.get(section, {}), **keys}
    return settings


def write_config(path: Path, settings: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def run_pretrain(config: Path, *flags: str) -> tuple[int, str]:
    """Run pretrain.py in a fresh process; return its exit code and what it printed."""
    receiver, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_pretrain, args=([str(config), *flags], sender))
    process.start()
    sender.close()
    printed = receiver.recv() if receiver.poll(240) else ""
    process.join(60)
    return process.exitcode if process.exitcode is not None else -1, printed


def start_pretrain(config: Path, output: Path) -> Any:
    """Start pretrain.py in a fresh process that prints into `output`; the caller ends it."""
    process = FORKS.Process(target=_pretrain_into, args=([str(config)], str(output)))
    process.start()
    return process


def _pretrain(arguments: list[str], sender: Any) -> None:
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            _main(arguments)
    finally:
        sender.send(printed.getvalue())


def _pretrain_into(arguments: list[str], output: str) -> None:
    with Path(output).open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        _main(arguments)


def _main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    sys.argv = ["pretrain.py", *arguments]
    run_command(pretrain.main)


def record(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    clock = {"tokens_per_second", "step_seconds", "data_wait_seconds", "mfu"}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]
