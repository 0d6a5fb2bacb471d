"""What a run would take, told before it is begun: `pretrain.py --dry-run`.

In: everything the run consists of, ready to train. Out: lines on the console; nothing is written. Time is measured, on
one micro-batch forward and backward with the real model and real rows; all else is counted.
"""

from __future__ import annotations

import time

import torch

from pipeline.config import Config
from pipeline.data.loading.loader import Loader
from pipeline.errors import duration, sized
from pipeline.train.memory import bytes_needed, device_memory, model_sizes
from pipeline.train.parallel import Parallel, shards_of
from pipeline.train.runtime import Runtime
from pipeline.train.state import TrainState

TIMED = 2  # passes; the one before them compiles and warms caches


def rehearse(config: Config, state: TrainState, *, parallel: Parallel, loader: Loader, runtime: Runtime) -> None:
    """Say memory and time; what is said of every run (`announce`) comes before."""
    runtime.say(_memory(config, parallel, runtime))
    seconds = _seconds(config, parallel, loader, runtime)
    passes = sum(loader.accumulation(rows) * steps for steps, rows in _stages(config, after=state.step))
    rows = loader.accumulation(config.ramp_of_rows.full)
    runtime.say(
        f"time: a micro-batch takes {seconds:.3f} s forward and backward, a step {seconds * rows:.2f} s, the "
        f"{config.total_steps - state.step:,} steps {duration(seconds * passes)}; evaluations, checkpoints and the "
        "exchange between ranks come on top"
    )
    runtime.say("nothing was written")


def _memory(config: Config, parallel: Parallel, runtime: Runtime) -> str:
    parameters, largest = model_sizes(config.model, n_tokens=parallel.model.n_tokens)
    shards = shards_of(parallel.strategy, config.parallel, runtime=runtime)
    need = bytes_needed(
        config,
        parameters=parameters,
        largest=largest,
        n_tokens=parallel.model.n_tokens,
        precision=runtime.precision,
        shards=shards,
        ranks=runtime.world_size,
    )
    there = device_memory(runtime)
    of = "" if there is None else f" of {sized(there)}"
    return f"memory: about {sized(need)}{of} per rank (an estimate)"


def _seconds(config: Config, parallel: Parallel, loader: Loader, runtime: Runtime) -> float:
    """Of one micro-batch; neither gradients nor a state of random numbers are left behind."""
    rows = min(loader.micro_batch * runtime.world_size, config.ramp_of_rows.full)
    part = loader.batch(0, rows).micro_batches[0].to(runtime.device)
    began = 0.0
    with torch.random.fork_rng(devices=[runtime.device] if runtime.device.type == "cuda" else []):
        for number in range(1 + TIMED):
            if number == 1:
                _wait(runtime)
                began = time.perf_counter()
            with parallel.sync(last=True):
                with runtime.autocast():
                    loss = parallel.forward(**part.inputs, labels=part.labels)
                torch.autograd.backward(loss)
        _wait(runtime)
    parallel.clear_gradients()
    return (time.perf_counter() - began) / TIMED


def _wait(runtime: Runtime) -> None:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize(runtime.device)


def _stages(config: Config, *, after: int) -> list[tuple[int, int]]:
    """Steps left after step `after`, as (steps, rows of each)."""
    first, found = 1, []
    ramp = config.ramp_of_rows
    for steps, rows in (*ramp.stages, (config.total_steps, ramp.full)):
        last = min(first + steps - 1, config.total_steps)
        found.append((max(last - max(first, after + 1) + 1, 0), rows))
        first = last + 1
    return found
