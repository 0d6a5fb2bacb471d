"""What a checkpoint costs: how long training stands still for it, how long it takes, and memory beside the model's own.

    python -m benchmarks.checkpoint [--layers N] [--width C] [--saves N] [--ranks N]

Weights and AdamW's moments of GPT-2 124M on a CPU, saved with checkpoint.asynchronous false and true, then read into
another model: by one process, then sharded over some ranks of this machine. Each measurement has processes of its own;
memory is RssAnon of /proc, looked at every 2 ms; of several ranks the longest time and the most memory count. What the
disk takes is measured beside it, as bytes written and forced to disk by one process that does nothing else.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
import torch.distributed as dist
from rich.console import Console

from pipeline.config import Config, ModelConfig
from pipeline.model.transformer import Decoder
from pipeline.ramp import Ramp
from pipeline.train.parallel import parallelise
from pipeline.train.runtime import Runtime
from pipeline.train.saving.checkpoint import list_checkpoints, load_model, optimizer_tensors, restore
from pipeline.train.saving.store import CheckpointStore
from pipeline.train.state import BatchSizes, TrainState

N_TOKENS = 50_257


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
    return int(line.split()[1]) * 1024 / 1e6


@dataclass(frozen=True)
class Place:
    """Which rank of how many a process is, of which model, and where it writes."""

    rank: int
    ranks: int
    model: ModelConfig
    folder: Path

    def make(self, *, asynchronous: bool) -> tuple[CheckpointStore, Decoder, torch.optim.AdamW]:
        """A store, this rank's share of a model, and an optimizer whose moments are there and in memory."""
        config = Config.model_validate(
            {
                "model": self.model.model_dump(),
                "run_dir": str(self.folder),
                "parallel": {"strategy": "fsdp" if self.ranks > 1 else "single"},
                "checkpoint": {"asynchronous": asynchronous, "keep": 1},
            }
        )
        if self.ranks > 1:
            meeting = f"file://{self.folder}/meeting"
            dist.init_process_group("gloo", init_method=meeting, rank=self.rank, world_size=self.ranks)
        runtime = Runtime(
            cast("Any", None), torch.device("cpu"), self.rank, self.ranks, torch.float32, Console(quiet=True),
            local_rank=self.rank, local_world_size=self.ranks,
        )  # fmt: skip
        model = parallelise(config, n_tokens=N_TOKENS, runtime=runtime).model
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        store = CheckpointStore(self.folder / "checkpoints", config, tokenizer_json=b"{}", runtime=runtime)
        return store, model, optimizer


def state_at(step: int) -> TrainState:
    """A state that nothing is trained on."""
    batches = (BatchSizes(after=0, row=0, ramp=Ramp(stages=(), full=1)),)
    return TrainState(
        step=step, rows=step, tokens=step, n_tokens=N_TOKENS, phases=(), batches=batches,
        tokenizer_fingerprint="", tokenizer_eos_id=0, precision="torch.float32",
    )  # fmt: skip


def save(place: Place, saves: int, asynchronous: bool) -> tuple[float, list[float], list[float], float]:
    """MB of the checkpoint; per save seconds in `begin` and until saved; memory."""
    store, model, optimizer = place.make(asynchronous=asynchronous)
    tensors = (*model.state_dict().values(), *optimizer_tensors(model, optimizer).values())
    megabytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6
    stalls, totals, memory = [], [], PeakMemory()
    with memory.watched():
        for step in range(1, saves + 1):
            began = time.perf_counter()
            store.begin(state_at(step), model=model, optimizer=optimizer)
            stalls.append(time.perf_counter() - began)
            store.finish()
            totals.append(time.perf_counter() - began)
    return megabytes, stalls, totals, memory.megabytes


def go_on(place: Place) -> tuple[float, float, float]:
    """Seconds of verifying and of restoring a run, and memory; the moments have their room already."""
    store, model, optimizer = place.make(asynchronous=True)
    memory = PeakMemory()
    with memory.watched():
        began = time.perf_counter()
        found = store.newest()
        verified = time.perf_counter()
        assert found is not None, "it was saved before"
        restore(found, model=model, optimizer=optimizer)
        read = time.perf_counter()
    return verified - began, read - verified, memory.megabytes


def load(place: Place) -> tuple[float, float]:
    """Seconds and memory of loading a model to sample from, weights included."""
    memory = PeakMemory()
    [found] = list_checkpoints(place.folder / "checkpoints")
    with memory.watched():
        began = time.perf_counter()
        load_model(found, device=torch.device("cpu"))
        return time.perf_counter() - began, memory.megabytes


def disk_speed(folder: str, megabytes: float) -> float:
    """MB/s of a plain file, forced to disk."""
    block = os.urandom(1 << 26)
    blocks = int(megabytes * 1e6) // len(block)
    began = time.perf_counter()
    with Path(folder, "plain").open("wb") as file:
        for _ in range(blocks):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return blocks * len(block) / 1e6 / (time.perf_counter() - began)


def on_ranks(function: Callable[..., Any], place: Place, *arguments: Any) -> list[Any]:
    """What it returns on each rank of a place, in fresh processes."""
    context = multiprocessing.get_context("spawn")
    (place.folder / "meeting").unlink(missing_ok=True)
    receivers, processes = [], []
    for rank in range(place.ranks):
        receiver, sender = context.Pipe(duplex=False)
        own = replace(place, rank=rank)
        process = context.Process(target=_send, args=(function, own, arguments, sender))
        process.start()
        sender.close()
        receivers.append(receiver)
        processes.append(process)
    found = [receiver.recv() for receiver in receivers]
    for process in processes:
        process.join()
    return found


def _send(function: Callable[..., Any], place: Place, arguments: tuple[Any, ...], sender: Any) -> None:
    sender.send(function(place, *arguments))
    if dist.is_initialized():
        dist.destroy_process_group()


def measure_saving(place: Place, saves: int) -> float:
    """Print both ways and their ratio; return the MB of a checkpoint."""
    medians = {}
    megabytes = 0.0
    for asynchronous in (False, True):
        found = on_ranks(save, place, saves, asynchronous)
        megabytes = found[0][0]
        stalls = [max(times) for times in zip(*(one[1] for one in found), strict=True)]
        total = statistics.median(max(times) for times in zip(*(one[2] for one in found), strict=True))
        medians[asynchronous] = statistics.median(stalls[1:])
        print(
            f"  {'beside training' if asynchronous else 'at once'}: training waits {stalls[0]:.2f} s the first time, "
            f"then {medians[asynchronous]:.2f} s; saved after {total:.2f} s ({megabytes / total:,.0f} MB/s); "
            f"{max(one[3] for one in found):,.0f} MB of memory per rank above the run's own"
        )
    print(f"  beside training it waits {100 * medians[True] / medians[False]:.1f} % of the time that it takes at once")
    return megabytes


def main() -> None:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--saves", type=int, default=6)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    given = parser.parse_args()
    model = ModelConfig(n_layers=given.layers, n_heads=max(given.width // 64, 1), d_model=given.width)
    for ranks in sorted({1, given.ranks}):
        with TemporaryDirectory(dir=given.folder) as folder:
            place = Place(0, ranks, model, Path(folder))
            print(f"{ranks} {'ranks, sharded' if ranks > 1 else 'process'}, torch {torch.__version__}:")
            megabytes = measure_saving(place, given.saves)
            print(
                f"  a checkpoint: {megabytes:,.0f} MB; a plain file of that: {disk_speed(folder, megabytes):,.0f} MB/s"
            )
            verified, read, memory = (max(one) for one in zip(*on_ranks(go_on, place), strict=True))
            print(
                f"  going on: verified in {verified:.2f} s, read in {read:.2f} s; {memory:,.0f} MB above the run's own"
            )
            [(seconds, memory)] = on_ranks(load, replace(place, ranks=1))
            print(f"  to sample, in one process: {seconds:.2f} s; {memory:,.0f} MB, weights {megabytes / 3:,.0f} MB")


if __name__ == "__main__":
    main()
