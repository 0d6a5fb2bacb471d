"""Train a model from scratch, or go on where the same command stopped.

    python pretrain.py configs/quickstart.yaml [--section.key VALUE ...]
    torchrun --nproc_per_node=8 pretrain.py configs/gpt_124m.yaml

In: a config and a dataset folder of data_prep.py. Out: a run folder with checkpoints, metrics.jsonl and
curves.png. Exit code 0: done; 2: a mistake to mend, told in one message; 75: stopped by a signal, saved.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipeline.cli import load_config
from pipeline.config import Config
from pipeline.data.loading.loader import Loader, Prefetcher
from pipeline.data.loading.sources import TrainingData, ValidationSet, open_sources
from pipeline.errors import StoppedEarly, UserError, run_command
from pipeline.model.transformer import Decoder, build_model, flops_per_token, initialise
from pipeline.train.announce import announce
from pipeline.train.guard import StopSignal
from pipeline.train.metrics import Meter, device_peak_flops
from pipeline.train.optim import build_optimizer, learning_rate
from pipeline.train.parallel import parallelise
from pipeline.train.run import Run
from pipeline.train.runtime import Runtime
from pipeline.train.state import TrainState
from pipeline.train.step import Trainer, evaluate


def main() -> None:
    """Settings and data are judged before any device is touched; then one run, from start to end."""
    config = load_config(sys.argv[1:])
    data = open_sources(config)
    runtime = Runtime.start(config)
    pretrain(config, data, runtime)
    runtime.stop()


def pretrain(config: Config, data: TrainingData, runtime: Runtime) -> None:
    """Compose the run in the order of the flow: model, optimizer, state, batches, loop."""
    model = make_model(config, data, runtime)
    optimizer = build_optimizer(model, config.optim)
    run = Run(config, data, runtime=runtime)
    state = run.resume(model, optimizer)
    blend = data.blend(state.phases)
    loader = Loader(blend, config, rank=runtime.rank, world_size=runtime.world_size)
    validation = data.validation(config, rank=runtime.rank, world_size=runtime.world_size)
    wrapped = parallelise(model, config.parallel, runtime=runtime, compiled=config.train.compile)
    trainer = Trainer(
        wrapped, optimizer, loader=loader, runtime=runtime, clip_norm=config.optim.clip_norm, seed=config.seed
    )
    trainer.load_loss_scale(state.loss_scale)
    announce(config, state, model=model, loader=loader, data=data, blend=blend, runtime=runtime)
    with Prefetcher(loader, schedule=state.rows_of, first_step=state.step + 1, device=runtime.device) as batches:
        train(run, state, batches, model=model, trainer=trainer, validation=validation)
    run.close()


def train(
    run: Run,
    state: TrainState,
    batches: Prefetcher,
    *,
    model: Decoder,
    trainer: Trainer,
    validation: Sequence[ValidationSet],
) -> None:
    """The loop: it says when; the functions it calls say how."""
    config, runtime, last = run.config, run.runtime, run.config.total_steps
    meter = make_meter(config, model, runtime)
    stop = StopSignal()
    for step, batch in zip(range(state.step + 1, last + 1), batches, strict=False):
        result = trainer.step(batch, step=step, lr=learning_rate(step, config))
        state = state.after(targets=result.targets, loss=result.loss)
        meter.count(tokens=result.targets, seconds=result.seconds, waited=batches.wait_seconds)
        if step % config.log.every == 0 or step == last:
            run.log_step(state, result, meter=meter)
        if validation and (step % config.eval.every == 0 or step == last):
            run.log_evaluation(state, evaluate(trainer.model, validation, runtime=runtime, tokens=config.eval.tokens))
        stopping = runtime.any(stop.requested)
        if step % config.checkpoint.every == 0 or step == last or stopping:
            state = state.model_copy(update={"loss_scale": trainer.loss_scale()})
            run.save(state, model=model, optimizer=trainer.optimizer)
        if stopping and step < last:
            run.close()
            raise StoppedEarly(f"stopped after step {step}; run the same command again to go on")
    runtime.say(f"done: {state.step} steps, {state.tokens:,} tokens; next: python sample.py {config.run_dir}")


def make_model(config: Config, data: TrainingData, runtime: Runtime) -> Decoder:
    """The model for the data's vocabulary, initialised on the device. Errors: a vocabulary that does not fit."""
    rows = config.model.vocab_size
    if rows is not None and rows < data.vocab_size:
        raise UserError(
            f"model.vocab_size is {rows} but {data.where} has a vocabulary of {data.vocab_size} tokens; "
            f"remove model.vocab_size or raise it to at least {data.vocab_size}"
        )
    model = build_model(config.model, n_tokens=data.vocab_size).to(runtime.device)
    initialise(model, seed=config.seed)
    return model


def make_meter(config: Config, model: Decoder, runtime: Runtime) -> Meter:
    """Throughput of all ranks, held against their peak where it is known."""
    peak = device_peak_flops(runtime.device, runtime.precision, override_tflops=config.log.peak_tflops)
    flops = flops_per_token(model, context_length=config.model.context_length)
    return Meter(flops_per_token=flops, peak_flops=None if peak is None else peak * runtime.world_size)


if __name__ == "__main__":
    run_command(main)
