"""What a run says before it starts: sizes, the batch as an equation, the data, the learning rate's course.

In: everything the run consists of. Out: lines on the console, among them warnings of what would be read too often.
"""

from __future__ import annotations

from pipeline.config import Config
from pipeline.data.loading.blend import Blend
from pipeline.data.loading.loader import Loader
from pipeline.data.loading.rows import Concat, Plan
from pipeline.data.loading.sources import TrainingData
from pipeline.errors import UserError, sized
from pipeline.model.transformer import count_parameters
from pipeline.train.optim import learning_rate
from pipeline.train.parallel import Parallel
from pipeline.train.runtime import Runtime
from pipeline.train.saving.store import DiskNeeds
from pipeline.train.state import TrainState


def announce(
    config: Config,
    state: TrainState,
    *,
    parallel: Parallel,
    loader: Loader,
    data: TrainingData,
    blend: Blend,
    needs: DiskNeeds,
    runtime: Runtime,
) -> None:
    """Say what is about to happen. Errors: no room for the checkpoints."""
    last = config.total_steps
    rates = ", ".join(
        f"{learning_rate(s, config):.2e} at {s}" for s in sorted({state.step + 1, config.warmup or 1, last})
    )
    runtime.say(f"{count_parameters(parallel.model):,} parameters; {runtime.describe()}")
    runtime.say(f"strategy: {parallel.strategy} ({parallel.why})")
    runtime.say(_batch(config, loader, runtime))
    rows = max(sum(state.rows_of(last)), state.rows)
    runtime.say(f"{last:,} steps = {rows * config.model.context_length:,} tokens; learning rate {rates}")
    for line in _datasets(config, data, blend, rows=rows):
        runtime.say(line)
    runtime.say(_disk(config, needs))


def _batch(config: Config, loader: Loader, runtime: Runtime) -> str:
    rows, context = config.ramp_of_rows.full, config.model.context_length
    accumulation = loader.accumulation(rows)
    low, uneven = divmod(rows, runtime.world_size * accumulation)
    micro = f"{low} to {low + 1}" if uneven else str(low)
    stages = [f"{steps:,} steps of {tokens:,}" for steps, tokens in config.ramp.stages]
    first = f"batch: first {', '.join(stages)} tokens, then " if stages else "batch: "
    return (
        f"{first}{runtime.world_size} ranks x {accumulation} accumulated x {micro} sequences x {context} tokens "
        f"= {config.train.batch_tokens:,} tokens ({rows} sequences)"
    )


def _disk(config: Config, needs: DiskNeeds) -> str:
    """What the checkpoints take. Errors: more than there is."""
    free = "" if needs.free is None else f", {sized(needs.free)} are free"
    text = f"checkpoints: {sized(needs.checkpoint)} each, at most {needs.at_once} at once; "
    text += f"{sized(needs.needed)} more needed{free}"
    if not needs.fits:
        folder = config.checkpoint.folder or config.run_dir
        raise UserError(f"{text}\n  make room at {folder}, or lower checkpoint.keep or raise checkpoint.keep_every")
    return text


def _datasets(config: Config, data: TrainingData, blend: Blend, *, rows: int) -> list[str]:
    """Of each dataset its share, what the whole run of `rows` rows takes of it, and what there is to know."""
    shares, taken = blend.phases[-1].shares(), blend.taken(rows)
    lines, often = [], config.data.max_epochs
    for source in data.sources:
        digest = source.dataset.data_digest
        epochs = taken[digest] / source.plan.rows
        lines.append(
            f"data: {float(shares[digest]):.2%} {source.name}, {round(epochs * source.plan.targets):,} tokens = "
            f"{epochs:.2f} epochs of {source.plan.targets:,}; {_layout(source.plan)}"
        )
        lines += [f"note: {note}" for note in source.dataset.notes]
        if source.validation is None:
            lines.append(f"note: {source.name} has no validation split, nothing of it will be evaluated")
        if often is not None and epochs > often:
            lines.append(
                f"warning: {source.name} will be read {epochs:.1f} times, more than data.max_epochs ({often:g}): lower "
                "its weight or the length of training, or raise data.max_epochs"
            )
    return lines


def _layout(plan: Plan) -> str:
    if isinstance(plan, Concat):
        return f"{plan.rows:,} rows, the last {plan.dropped:,} tokens do not fill one"
    return f"packed into {plan.rows:,} rows, {plan.targets / (plan.rows * plan.context_length):.2%} full"
