"""What a checkpoint costs: how long training stands still for it, how long it takes, and memory beside the model's own.

    python -m benchmarks.checkpoint [--layers N] [--width C] [--saves N]

Weights and AdamW's moments of GPT-2 124M on one CPU process, saved with checkpoint.asynchronous true and false, then
read into another model. Each in a process of its own; memory is RssAnon of /proc, looked at every 2 ms. What the disk
takes is measured beside it, as bytes written and forced to disk by one process that does nothing else.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from pipeline.config import Config, ModelConfig
from pipeline.model.transformer import Decoder, build_model
from pipeline.ramp import Ramp
from pipeline.train.checkpoint import list_checkpoints, load_model, optimizer_tensors, restore
from pipeline.train.runtime import Runtime
from pipeline.train.state import BatchSizes, TrainState
from pipeline.train.store import CheckpointStore


class PeakMemory:
    """The highest anonymous memory of this process in a block, in MB above that at its start."""

    def __init__(self) -> None:
        self.megabytes = 0.0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look until the block ends."""
        over = threading.Event()
        start = _anonymous_megabytes()

        def look() -> None:
            while not over.wait(0.002):
                self.megabytes = max(self.megabytes, _anonymous_megabytes() - start)

        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()


def _anonymous_megabytes() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1e3


def make(model: ModelConfig, *, asynchronous: bool, folder: Path) -> tuple[CheckpointStore, Decoder, torch.optim.AdamW]:
    """A store, a model and an optimizer whose moments are there and in memory."""
    config = Config.model_validate(
        {"model": model.model_dump(), "run_dir": str(folder), "checkpoint": {"asynchronous": asynchronous, "keep": 1}}
    )
    runtime = Runtime.start(config)
    quiet = Runtime(runtime.accelerator, runtime.device, 0, 1, runtime.precision, Console(quiet=True))
    decoder = build_model(config.model, n_tokens=50257)
    optimizer = torch.optim.AdamW(decoder.parameters(), fused=True)
    for parameter in decoder.parameters():
        parameter.detach().normal_()
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return CheckpointStore(folder / "checkpoints", config, tokenizer_json=b"{}", runtime=quiet), decoder, optimizer


def state_at(step: int) -> TrainState:
    """A state that nothing is trained on."""
    batches = (BatchSizes(after=0, row=0, ramp=Ramp(stages=(), full=1)),)
    return TrainState(
        step=step, rows=step, tokens=step, n_tokens=50257, phases=(), batches=batches,
        tokenizer_fingerprint="", tokenizer_eos_id=0, precision="torch.float32",
    )  # fmt: skip


def save(model: ModelConfig, folder: str, saves: int, asynchronous: bool, sender: Any) -> None:
    """Seconds in `begin`, seconds until saved, and memory, per save."""
    store, decoder, optimizer = make(model, asynchronous=asynchronous, folder=Path(folder))
    nbytes = sum(t.nbytes for t in (*decoder.state_dict().values(), *optimizer_tensors(decoder, optimizer).values()))
    stalls, totals, memory = [], [], PeakMemory()
    with memory.watched():
        for step in range(1, saves + 1):
            began = time.perf_counter()
            store.begin(state_at(step), model=decoder, optimizer=optimizer)
            stalls.append(time.perf_counter() - began)
            store.finish()
            totals.append(time.perf_counter() - began)
    sender.send((nbytes, stalls, totals, memory.megabytes))


def load(model: ModelConfig, folder: str, kind: str, sender: Any) -> None:
    """Seconds and memory of restoring a run, or of loading a model to sample from."""
    memory = PeakMemory()
    if kind == "run":
        store, decoder, optimizer = make(model, asynchronous=True, folder=Path(folder))
        with memory.watched():
            began = time.perf_counter()
            found = store.newest()
            verified = time.perf_counter()
            assert found is not None, "it was saved before"
            restore(found, model=decoder, optimizer=optimizer)
    else:
        [found] = list_checkpoints(Path(folder) / "checkpoints")
        with memory.watched():
            began = verified = time.perf_counter()
            load_model(found, device=torch.device("cpu"))
    now = time.perf_counter()
    sender.send((verified - began, now - verified, memory.megabytes))


def disk_speed(folder: str, nbytes: int) -> float:
    """MB/s of a plain file, forced to disk."""
    block = os.urandom(1 << 26)
    began = time.perf_counter()
    with Path(folder, "plain").open("wb") as file:
        for _ in range(nbytes // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return nbytes / 1e6 / (time.perf_counter() - began)


def in_own_process(function: Any, *arguments: Any) -> Any:
    """What it sends."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(*arguments, sender))
    process.start()
    sender.close()
    found = receiver.recv()
    process.join()
    return found


def main() -> None:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    arguments = parser.parse_args()
    heads = max(arguments.width // 64, 1)
    model = ModelConfig(n_layers=arguments.layers, n_heads=heads, d_model=arguments.width)
    with TemporaryDirectory(dir=arguments.folder) as folder:
        medians = {}
        for asynchronous in (False, True):
            found = in_own_process(save, model, folder, arguments.saves, asynchronous)
            nbytes, stalls, totals, memory = found
            medians[asynchronous] = statistics.median(stalls[1:])
            print(
                f"{'beside training' if asynchronous else 'at once':16} {nbytes / 1e6:,.0f} MB: training waits "
                f"{stalls[0]:.2f} s the first time, then {medians[asynchronous]:.2f} s; saved after "
                f"{statistics.median(totals):.2f} s ({nbytes / 1e6 / statistics.median(totals):,.0f} MB/s); "
                f"{memory:,.0f} MB of memory above the run's own"
            )
        print(f"training waits {100 * medians[True] / medians[False]:.1f} % of the time beside it")
        verified, seconds, memory = in_own_process(load, model, folder, "run")
        print(f"a run goes on:   verified in {verified:.2f} s, read in {seconds:.2f} s; {memory:,.0f} MB above its own")
        _, seconds, memory = in_own_process(load, model, folder, "model")
        weights = nbytes / 3e6
        print(f"a model to sample from: {seconds:.2f} s; {memory:,.0f} MB, of which {weights:,.0f} MB are its weights")
        print(f"a plain file of that size: {disk_speed(folder, nbytes):,.0f} MB/s")


if __name__ == "__main__":
    main()
