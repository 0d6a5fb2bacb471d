"""Small corpora, datasets and runs for the tests; and a way to start the scripts quickly."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.backends.backend_agg  # noqa: F401 - imported by draw_curves, here once for all forks
import psutil
import torch
import torch._dynamo  # imported by the first optimizer, likewise
import yaml
from rich.console import Console
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import pretrain
from pipeline.data.preparing.prepare import prepare
from pipeline.data.preparing.request import Request
from pipeline.train.processes.job import Job, run_job

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


def run_pretrain(config: Path, *flags: str, before: Callable[[], None] | None = None) -> tuple[int, str]:
    """Run pretrain.py in a fresh process, which calls `before` first; return its exit code and what it printed."""
    receiver, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_pretrain, args=([str(config), *flags], sender, before))
    process.start()
    sender.close()
    printed = receiver.recv() if receiver.poll(240) else ""
    process.join(60)
    return process.exitcode if process.exitcode is not None else -1, printed


def start_pretrain(config: Path, output: Path, *, before: Callable[[], None] | None = None) -> Any:
    """Start pretrain.py in a fresh process that prints into `output`; the caller ends it. before: as `run_pretrain`."""
    process = FORKS.Process(target=_pretrain_into, args=([str(config)], str(output), before))
    process.start()
    return process


def run_ranks(ranks: int, *arguments: str, output: Path, **launch: Any) -> tuple[int, str]:
    """As `start_ranks`, to its end: the agent's exit code and what was printed."""
    process = start_ranks(ranks, *arguments, output=output, **launch)
    process.join(240)
    if process.is_alive():
        end_tree(process.pid)
    process.join()
    return process.exitcode if process.exitcode is not None else -1, output.read_text()


def start_ranks(
    ranks: int,
    *arguments: str,
    output: Path,
    max_restarts: int = 0,
    before: Callable[[], None] | None = None,
    main: Callable[[Job], None] = pretrain.main,
) -> Any:
    """Start torchrun's agent in a fresh process; it and its ranks print into `output`. The caller ends it.

    The agent is torchrun's own, but its ranks are forked instead of started anew, which takes a second and not ten.
    before: called in each rank before anything else, to put faults in place. main: what each rank runs.
    """
    process = FORKS.Process(target=_agent, args=(ranks, list(arguments), str(output), max_restarts, before, main))
    process.start()
    return process


def end_tree(pid: int) -> None:
    """Kill a process and all that it started."""
    try:
        root = psutil.Process(pid)
        family = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _agent(
    ranks: int,
    arguments: list[str],
    output: str,
    max_restarts: int,
    before: Callable[[], None] | None,
    main: Callable[[Job], None],
) -> None:
    _print_into(output)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id="test", start_method="fork", max_restarts=max_restarts, monitor_interval=0.1,
    )  # fmt: skip
    elastic_launch(config, _rank)(arguments, before, main)


def _rank(arguments: list[str], before: Callable[[], None] | None, main: Callable[[Job], None]) -> None:
    agent = os.getppid()
    if before is not None:
        before()
    run_main(arguments, main)
    threading.Thread(target=_end_with, args=(agent,), daemon=True).start()


def _end_with(agent: int) -> None:
    """A forked rank waits for its agent after its work is done: for ever, if that was killed meanwhile."""
    while os.getppid() == agent:
        time.sleep(0.1)
    os._exit(1)


def _print_into(output: str) -> None:
    with Path(output).open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _pretrain(arguments: list[str], sender: Any, before: Callable[[], None] | None) -> None:
    if before is not None:
        before()
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            run_main(arguments)
    finally:
        sender.send(printed.getvalue())


def _pretrain_into(arguments: list[str], output: str, before: Callable[[], None] | None = None) -> None:
    _print_into(output)
    if before is not None:
        before()
    run_main(arguments)


def run_main(arguments: list[str], main: Callable[[Job], None] = pretrain.main) -> None:
    """Be pretrain.py, in a process of its own."""
    torch.set_num_threads(1)
    sys.argv = ["pretrain.py", *arguments]
    run_job(main)


def record(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    clock = {"tokens_per_second", "step_seconds", "data_wait_seconds", "mfu"}
    clock |= {"time", "elapsed_seconds", "peak_memory_bytes"}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]
