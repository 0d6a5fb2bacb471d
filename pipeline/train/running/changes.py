"""Whether a run may go on from a checkpoint: what makes it another run, what must be allowed, what is free.

In: the settings and the data now, and those of the checkpoint. Out: nothing, or an error that names every difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.config import Config, resolved
from pipeline.config_data import Origin
from pipeline.data.loading.blend import Phase
from pipeline.data.loading.sources import TrainingData
from pipeline.errors import UserError
from pipeline.train.saving.checkpoint import read_config, read_state
from pipeline.train.saving.storage import Location

# Sections whose change makes it another run; what may change freely is the rest of the run's surroundings.
FIXED = ("seed", "data", "model", "objective")
FREE = ("run_dir", "parallel", "checkpoint", "eval", "log")
FREE_KEYS = (
    *("data.max_epochs", "train.steps", "train.tokens", "train.device", "train.precision", "train.compile"),
    *("train.activation_checkpointing", "train.hang_minutes", "train.max_minutes"),
    # what to do about a bad step is often decided when there was one; the checkpoint tells what was done
    *("train.on_nonfinite", "train.max_skips", "train.on_spike", "train.spike_deviations", "train.max_rollbacks"),
)
# A dataset is known by its digest, which covers all that is said of it, and may be moved; see `_data_changes`.
BY_DIGEST = ("path", "sources", *Origin.model_fields)


def refuse_another_run(
    checkpoint: Location, config: Config, data: TrainingData, *, precision: str, say: Callable[[str], None]
) -> None:
    """Raise unless a run of these settings may go on from `checkpoint`; `say` tells what changed and is allowed."""
    state = read_state(checkpoint)
    was, now = state.tokenizer_fingerprint, data.tokenizer_fingerprint
    if was != now:
        raise UserError(
            f"the tokenizer of {data.where} is not the one that {checkpoint} was trained with: "
            f"checkpoint {was[:16]}, data {now[:16]}; restore the data or choose another --run-dir"
        )
    if state.tokenizer_eos_id != data.eos_id:
        raise UserError(
            f"documents of {data.where} end with id {data.eos_id}, {checkpoint} was trained on ones that "
            f"end with {state.tokenizer_eos_id}; restore the data (or its eos) or choose another --run-dir"
        )
    changes = changed_settings(read_config(checkpoint), config, n_tokens=state.n_tokens)
    changes |= _data_changes(state.phases[-1], checkpoint, config, data)
    if state.precision != precision:  # the resolved one: "auto" may mean another on this machine
        changes["train.precision"] = f"train.precision: {state.precision} -> {precision}"
    another_run = [line for key, line in changes.items() if key.split(".")[0] in FIXED and key != "data.sources"]
    if another_run:
        raise UserError(
            f"{checkpoint} belongs to another run; choose another --run-dir or restore these settings:\n  "
            + "\n  ".join(another_run)
        )
    if changes and not config.checkpoint.allow_changes:
        raise UserError(
            f"settings differ from those of {checkpoint}; restore them, begin another run with --run-dir NAME, or go "
            "on here with the new ones by --checkpoint.allow-changes true (a schedule without a horizon of its own "
            "ends with train.steps):\n  " + "\n  ".join(changes.values())
        )
    lengths = (config.train.tokens, config.optim.warmup_tokens, config.optim.horizon_tokens)
    sizes = [changes[key] for key in ("train.batch_tokens", "train.batch_ramp") if key in changes]
    if sizes and any(lengths):
        raise UserError(
            f"{'; '.join(sizes)}: lengths given in tokens are counted in steps of one course of batch sizes; "
            "give train.steps, optim.warmup_steps and optim.horizon_steps instead, or begin another run with --run-dir "
            "NAME"
        )
    for line in changes.values():
        say(f"changed on resuming: {line}")


def _data_changes(before: Phase, checkpoint: Location, config: Config, data: TrainingData) -> dict[str, str]:
    """Other weights, and with `checkpoint.allow_changes` other datasets."""
    now = Phase(row=0, sources=data.described())
    if before.shares() == now.shares():
        return {}
    missing = {one.digest: f"{one.name} {one.digest[:16]}" for one in before.sources}
    added = {one.digest: f"{one.name} {one.digest[:16]}" for one in now.sources}
    if missing.keys() != added.keys() and not config.checkpoint.allow_changes:
        raise UserError(
            f"the data of {data.where} is not the one that {checkpoint} was trained with: "
            f"checkpoint {', '.join(missing.values())}; now {', '.join(added.values())}; restore it, choose "
            "another --run-dir, or go on with the new data by --checkpoint.allow-changes true"
        )
    return {"data.sources": f"data.sources: {before.describe()} -> {now.describe()}"}


def changed_settings(old: Config, new: Config, *, n_tokens: int) -> dict[str, str]:
    """Settings that bear on the result and differ: {key: "key: old -> new"}.

    What is compared is what they mean: lengths in steps, sizes with their defaults filled in.
    """
    before, after = _meaning(old, n_tokens), _meaning(new, n_tokens)
    changes = {}
    for key in sorted(before):
        free = key.split(".")[0] in FREE or key in FREE_KEYS
        if key == "train.micro_batch":  # its masks are drawn per micro-batch; without them it changes rounding only
            free = new.model.dropout == 0
        if before[key] != after[key] and not free:
            changes[key] = f"{key}: {before[key]} -> {after[key]}"
    return changes


def _meaning(config: Config, n_tokens: int) -> dict[str, Any]:
    flat: dict[str, Any] = {"seed": config.seed}
    for section, keys in resolved(config).items():
        if isinstance(keys, dict):
            flat.update({f"{section}.{key}": value for key, value in keys.items()})
    flat.update(
        {
            "optim.warmup_steps": config.warmup,
            "optim.horizon_steps": config.horizon if config.optim.has_horizon else None,
        }
    )
    flat.update({"optim.warmup_tokens": None, "optim.horizon_tokens": None})
    model = config.model
    flat.update({"model.n_kv_heads": model.kv_heads, "model.d_ff": model.hidden})
    flat["model.vocab_size"] = model.embedding_rows(n_tokens)
    flat.update({f"data.{key}": None for key in BY_DIGEST})
    stages = [f"{stage.steps} steps of {stage.batch_tokens}" for stage in config.train.batch_ramp]
    flat["train.batch_ramp"] = ", ".join(stages) or None
    return flat
