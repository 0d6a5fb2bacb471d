"""Train a model from scratch, or go on where the same command stopped.

    python pretrain.py configs/quickstart.yaml [--section.key VALUE ...]
    torchrun --nproc_per_node=8 pretrain.py configs/gpt_124m.yaml
    python pretrain.py configs/gpt_124m.yaml --dry-run       what it would take: memory, disk, time; writes nothing
    python pretrain.py configs/gpt_124m.yaml --eval-only     the newest checkpoint's validation loss; writes nothing

In: a config and a dataset folder of data_prep.py. Out: a run folder with checkpoints, metrics.jsonl and
curves.png. Exit code 0: done; 2: a mistake to mend, told in one message; 75: stopped by a signal or by
train.max_minutes, saved; 124: ended by its watch, no progress or another rank failed. Under torchrun a stopped rank
exits with 0; `python -m pipeline.status RUN` tells what became of a run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from pipeline.cli import answer_at_once, read_command
from pipeline.errors import UserError, run_command
from pipeline.train.processes.early import stop_while_importing
from pipeline.train.processes.launched import prepare_allocator

if __name__ == "__main__":
    stop_while_importing()  # the rest may take a minute
    run_command(answer_at_once)
    prepare_allocator()

from pipeline.config import Config
from pipeline.data.loading.loader import Loader, Prefetcher
from pipeline.data.loading.sources import TrainingData, ValidationSet, open_sources
from pipeline.train.meeting import meet
from pipeline.train.micro_batch import with_micro_batch
from pipeline.train.optim import build_optimizer, learning_rate
from pipeline.train.parallel import Parallel, parallelise
from pipeline.train.processes.job import Job, run_job
from pipeline.train.reporting.announce import announce
from pipeline.train.reporting.metrics import meter_of
from pipeline.train.running.rehearsal import rehearse
from pipeline.train.running.run import Run, evaluation_line
from pipeline.train.runtime import Runtime
from pipeline.train.saving.checkpoint import resolve_checkpoint, restore_weights
from pipeline.train.state import TrainState
from pipeline.train.step import Trainer, evaluate


def main(job: Job) -> None:
    """Settings and data are judged before any device is touched; then one run, from start to end.

    The ranks find each other before all that, so that whatever one of them meets with ends the others, too.
    """
    job.assemble()
    config, mode = read_command(sys.argv[1:])
    data = open_sources(config)
    meet(job, config, datasets=[source.digest for source in data.described()])
    runtime = Runtime.start(config, job)
    {"train": pretrain, "dry-run": dry_run, "evaluate": evaluate_only}[mode](config, data, runtime)
    runtime.stop()


def pretrain(config: Config, data: TrainingData, runtime: Runtime) -> None:
    """Compose the run in the order of the flow: model, optimizer, state, batches, loop."""
    config, parallel = make_model(config, data, runtime)
    optimizer = build_optimizer(parallel.model, config.optim)
    run = Run(config, data, runtime=runtime)
    state = run.resume(parallel.model, optimizer)
    blend = data.blend(state.phases)
    loader = Loader(blend, config, rank=runtime.rank, world_size=runtime.world_size)
    validation = data.validation(config, rank=runtime.rank, world_size=runtime.world_size)
    trainer = Trainer(
        parallel, optimizer, loader=loader, runtime=runtime, config=config, stop=runtime.job.stop,
        skipped=len(state.skipped),
    )  # fmt: skip
    trainer.load_loss_scale(state.loss_scale)
    needs = run.store.requirements(state, model=parallel.model, optimizer=optimizer)
    if state.step < config.total_steps:
        announce(config, state, parallel=parallel, loader=loader, data=data, blend=blend, needs=needs, runtime=runtime)
        run.store.reserve(model=parallel.model, optimizer=optimizer)
    with run.store.completing():
        while state.step < config.total_steps:  # once, but for spikes that the run goes back from
            schedule, first = state.rows_of, state.step + 1
            with Prefetcher(loader, schedule=schedule, first_step=first, device=runtime.device) as batches:
                state = train(run, state, batches, trainer=trainer, validation=validation)
    run.finish(state)


def train(
    run: Run, state: TrainState, batches: Prefetcher, *, trainer: Trainer, validation: Sequence[ValidationSet]
) -> TrainState:
    """The loop: it says when; the functions it calls say how. Returns early where a spike sends the run back."""
    config, runtime, last = run.config, run.runtime, run.config.total_steps
    meter = meter_of(config, trainer.parallel.model, runtime)
    if not state.evaluated:  # the evaluation in which the run was stopped
        state = run.evaluate(state, trainer.parallel, validation)
        if not state.evaluated:  # cut short again: after another step it would be lost
            raise run.stopped(state)
    for step, batch in zip(range(state.step + 1, last + 1), batches, strict=False):
        result = trainer.step(batch, step=step, lr=learning_rate(step, config))
        before, state = state, state.after(targets=result.targets, loss=result.loss, skipped=result.skipped)
        if run.spiked(before, result):
            return run.roll_back(state, trainer)
        meter.count(tokens=result.targets, seconds=result.seconds, waited=batches.wait_seconds)
        if step % config.log.every == 0 or step == last or result.skipped:
            run.log_step(state, result, meter=meter)
        if step % config.eval.every == 0 or step == last:
            state = run.evaluate(state, trainer.parallel, validation)
        stopping = step < last and (result.stop or not state.evaluated)
        if step % config.checkpoint.every == 0 or step == last or stopping:
            run.save(state, trainer)
        run.poll()
        runtime.after_step(step, seconds=result.seconds)
        if stopping:
            raise run.stopped(state)
    return state


def make_model(config: Config, data: TrainingData, runtime: Runtime) -> tuple[Config, Parallel]:
    """The model for the data's vocabulary, shared out over the ranks, and the settings with the micro-batch it takes.

    Errors: a vocabulary that does not fit.
    """
    rows = config.model.vocab_size
    if rows is not None and rows < data.vocab_size:
        raise UserError(
            f"model.vocab_size is {rows} but {data.where} has a vocabulary of {data.vocab_size} tokens; "
            f"remove model.vocab_size or raise it to at least {data.vocab_size}"
        )
    parallel = parallelise(config, n_tokens=data.vocab_size, runtime=runtime)
    return with_micro_batch(config, parallel, data=data, runtime=runtime), parallel


def dry_run(config: Config, data: TrainingData, runtime: Runtime) -> None:
    """Say what the run would take from where it stands."""
    config, parallel = make_model(config, data, runtime)
    optimizer = build_optimizer(parallel.model, config.optim)
    run = Run(config, data, runtime=runtime)
    state = run.look(parallel.model)
    blend = data.blend(state.phases)
    loader = Loader(blend, config, rank=runtime.rank, world_size=runtime.world_size)
    needs = run.store.requirements(state, model=parallel.model, optimizer=optimizer)
    announce(config, state, parallel=parallel, loader=loader, data=data, blend=blend, needs=needs, runtime=runtime)
    rehearse(config, state, parallel=parallel, loader=loader, runtime=runtime)


def evaluate_only(config: Config, data: TrainingData, runtime: Runtime) -> None:
    """Print the newest checkpoint's losses on the validation splits, as the record of the run has them."""
    config, parallel = make_model(config, data, runtime)
    checkpoint = resolve_checkpoint(config.run_dir)
    state = restore_weights(checkpoint, model=parallel.model)
    if state.tokenizer_fingerprint != data.tokenizer_fingerprint:
        raise UserError(f"{checkpoint} was trained with another tokenizer than that of {data.where}")
    validation = data.validation(config, rank=runtime.rank, world_size=runtime.world_size)
    if not validation:
        raise UserError(f"{data.where} has no validation split; prepare it with --val-fraction or --val-input")
    found = evaluate(parallel, validation, runtime=runtime, tokens=config.eval.tokens)
    if found is not None:
        runtime.say(json.dumps({"checkpoint": str(checkpoint), **evaluation_line(state, found)}))


if __name__ == "__main__":
    run_job(main)
