"""The folder of a run: what it is, what happened, and where it goes on.

    runs/NAME/config.yaml  environment.json  metrics.jsonl  curves.png  checkpoints/

In: the configuration and the data. Out: a `Run` that resumes from the newest intact checkpoint when the
same command is given again, and refuses when data or model are not what they were.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import yaml

from pipeline.config import Config, resolved
from pipeline.config_data import Origin
from pipeline.data.loading.blend import Phase
from pipeline.data.loading.sources import TrainingData
from pipeline.errors import UserError
from pipeline.files import write_durably
from pipeline.locks import locked
from pipeline.model.transformer import Decoder
from pipeline.train.checkpoint import CheckpointStore, read_config, read_state, restore
from pipeline.train.curves import draw_curves
from pipeline.train.metrics import ConsoleLine, Meter, Record, read_record
from pipeline.train.runtime import Runtime, Trackers, environment
from pipeline.train.state import BatchSizes, TrainState
from pipeline.train.step import Evaluation, StepResult

# Sections whose change makes it another run; what may change freely is the rest of the run's surroundings.
FIXED = ("seed", "data", "model", "objective")
FREE = ("run_dir", "parallel", "checkpoint", "eval", "log")
FREE_KEYS = ("train.steps", "train.tokens", "train.device", "train.precision", "train.compile", "data.max_epochs")
# A dataset is known by its digest, which covers all that is said of it, and may be moved; see `Run._data_changes`.
BY_DIGEST = ("path", "sources", *Origin.model_fields)

DRAW_SECONDS = 60.0  # curves.png is drawn with a checkpoint at most this often: a picture costs a third of a second


class Run:
    """Record, checkpoints and trackers of one run folder."""

    def __init__(self, config: Config, data: TrainingData, *, runtime: Runtime) -> None:
        self.config = config
        self.data = data
        self.runtime = runtime
        self.folder = Path(config.run_dir)
        tokenizer = data.tokenizer_json
        self.store = CheckpointStore(self.folder / "checkpoints", config, tokenizer_json=tokenizer, runtime=runtime)
        self.record = Record(self.folder / "metrics.jsonl")
        self.console = ConsoleLine(runtime.console, total_steps=config.total_steps, ramp=config.ramp)
        self.trackers: Trackers | None = None
        self._held = ExitStack()
        self._drawn = time.perf_counter()

    def resume(self, model: Decoder, optimizer: torch.optim.Optimizer) -> TrainState:
        """Fill model and optimizer from the newest intact checkpoint, or leave them and start at step 0.

        Errors: data, tokenizer, model or seed differ from the checkpoint's; other training settings differ and
        `checkpoint.allow_changes` is not set.
        """
        if self.runtime.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(locked(self.folder, ask_of_other_hosts=False))
        self.store.clean()
        self.runtime.barrier()
        newest = self.store.newest()
        if newest is None:
            state = self._first_state(model)
        else:
            self._refuse_another_run(newest)
            state = restore(newest, model=model, optimizer=optimizer)
            state = state.continued(self.data.described(), self.config.ramp_of_rows)
            self.runtime.say(f"resuming from {newest}")
        if state.step >= self.config.total_steps:
            self.runtime.say(
                f"already at step {state.step} of {self.config.total_steps}; raise train.steps to go further"
            )
        elif self.runtime.is_main:
            self._open(state)
        self.runtime.barrier()
        return state

    def _first_state(self, model: Decoder) -> TrainState:
        return TrainState(
            step=0,
            rows=0,
            tokens=0,
            n_tokens=model.n_tokens,
            phases=(Phase(row=0, sources=self.data.described()),),
            batches=(BatchSizes(after=0, row=0, ramp=self.config.ramp_of_rows),),
            tokenizer_fingerprint=self.data.tokenizer_fingerprint,
            tokenizer_eos_id=self.data.eos_id,
            precision=str(self.runtime.precision),
        )

    def _refuse_another_run(self, checkpoint: Path) -> None:
        state = read_state(checkpoint)
        was, now = state.tokenizer_fingerprint, self.data.tokenizer_fingerprint
        if was != now:
            raise UserError(
                f"the tokenizer of {self.data.where} is not the one that {checkpoint} was trained with: "
                f"checkpoint {was[:16]}, data {now[:16]}; restore the data or choose another --run-dir"
            )
        if state.tokenizer_eos_id != self.data.eos_id:
            raise UserError(
                f"documents of {self.data.where} end with id {self.data.eos_id}, {checkpoint} was trained on ones that "
                f"end with {state.tokenizer_eos_id}; restore the data (or its eos) or choose another --run-dir"
            )
        changes = changed_settings(read_config(checkpoint), self.config, n_tokens=state.n_tokens)
        changes |= self._data_changes(state.phases[-1], checkpoint)
        precision = str(self.runtime.precision)
        if state.precision != precision:  # the resolved one: "auto" may mean another on this machine
            changes["train.precision"] = f"train.precision: {state.precision} -> {precision}"
        another_run = [line for key, line in changes.items() if key.split(".")[0] in FIXED and key != "data.sources"]
        if another_run:
            raise UserError(
                f"{checkpoint} belongs to another run; choose another --run-dir or restore these settings:\n  "
                + "\n  ".join(another_run)
            )
        if changes and not self.config.checkpoint.allow_changes:
            raise UserError(
                f"settings differ from those of {checkpoint}; restore them, or go on with the new ones by "
                "--checkpoint.allow-changes true (a schedule without a horizon of its own ends with train.steps):\n  "
                + "\n  ".join(changes.values())
            )
        lengths = (self.config.train.tokens, self.config.optim.warmup_tokens, self.config.optim.horizon_tokens)
        sizes = [changes[key] for key in ("train.batch_tokens", "train.batch_ramp") if key in changes]
        if sizes and any(lengths):
            raise UserError(
                f"{'; '.join(sizes)}: lengths given in tokens are counted in steps of one course of batch sizes; "
                "give train.steps, optim.warmup_steps and optim.horizon_steps instead"
            )
        for line in changes.values():
            self.runtime.say(f"changed on resuming: {line}")

    def _data_changes(self, before: Phase, checkpoint: Path) -> dict[str, str]:
        """Other weights, and with `checkpoint.allow_changes` other datasets."""
        now = Phase(row=0, sources=self.data.described())
        if before.shares() == now.shares():
            return {}
        missing = {one.digest: f"{one.name} {one.digest[:16]}" for one in before.sources}
        added = {one.digest: f"{one.name} {one.digest[:16]}" for one in now.sources}
        if missing.keys() != added.keys() and not self.config.checkpoint.allow_changes:
            raise UserError(
                f"the data of {self.data.where} is not the one that {checkpoint} was trained with: "
                f"checkpoint {', '.join(missing.values())}; now {', '.join(added.values())}; restore it, choose "
                "another --run-dir, or go on with the new data by --checkpoint.allow-changes true"
            )
        return {"data.sources": f"data.sources: {before.describe()} -> {now.describe()}"}

    def _open(self, state: TrainState) -> None:
        """Write the folder's description and bring the record back to `state`."""
        settings = resolved(self.config)
        write_durably(self.folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False).encode())
        path = self.folder / "environment.json"
        history = _read_environment(path) or {"run_id": uuid4().hex[:12], "starts": []}
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        history["starts"].append({"from_step": state.step, "started": started, **environment()})
        write_durably(path, json.dumps(history, indent=2).encode() + b"\n")
        lines = read_record(self.record.path) if self.record.path.exists() else []
        if state.step == 0 and any(line["step"] >= self.config.checkpoint.every for line in lines):
            self.runtime.say(
                f"warning: the checkpoints of an earlier run are gone; its record is {self.record.set_aside()}"
            )
        self.record.cut_after(state.step)
        self.trackers = Trackers(self.runtime, self.config, run_id=history["run_id"], settings=settings)

    def log_step(self, state: TrainState, result: StepResult, *, meter: Meter) -> None:
        """Record a training step: at `log.every` and at the end."""
        line = {"step": state.step, "tokens": state.tokens, "loss": result.loss, "lr": result.lr}
        self._log({**line, "grad_norm": result.grad_norm, **meter.take()})

    def log_evaluation(self, state: TrainState, evaluation: Evaluation) -> None:
        """Record an evaluation; of a blend also the loss on each dataset."""
        line = {"step": state.step, "tokens": state.tokens, "val_loss": evaluation.loss}
        if len(self.data.sources) > 1:
            line.update({f"val_loss/{name}": loss for name, loss in evaluation.sources.items()})
        line["val_bits_per_byte"] = evaluation.bits_per_byte
        self._log({**line, "val_targets": evaluation.targets})

    def _log(self, line: dict[str, Any]) -> None:
        if self.runtime.is_main:
            self.record.write(line)
            self.console.show(line)
            numbers = {key: value for key, value in line.items() if key != "step"}
            if self.trackers is not None:
                self.trackers.log(numbers, step=line["step"])

    def save(self, state: TrainState, *, model: Decoder, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint and bring curves.png up to date."""
        began = time.perf_counter()
        if self.runtime.is_main:
            self.record.sync()
        path = self.store.save(state, model=model, optimizer=optimizer)
        self.runtime.say(f"saved {path} in {time.perf_counter() - began:.2f} s")
        if self.runtime.is_main and (state.step == self.config.total_steps or began > self._drawn + DRAW_SECONDS):
            self._draw()
            self._drawn = time.perf_counter()

    def close(self) -> None:
        """Let go of trackers and of the folder."""
        if self.trackers is not None:
            self.trackers.finish()
        self._held.close()

    def _draw(self) -> None:
        try:
            draw_curves(read_record(self.record.path), self.folder / "curves.png", title=self.folder.name)
        except Exception as error:  # a picture must never stop a run: matplotlib may be missing or a font broken
            self.runtime.say(f"warning: curves.png was not drawn: {error}")


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
    shaped = config.optim.schedule not in ("constant", "inverse_sqrt")  # these two know no horizon
    flat.update({"optim.warmup_steps": config.warmup, "optim.horizon_steps": config.horizon if shaped else None})
    flat.update({"optim.warmup_tokens": None, "optim.horizon_tokens": None})
    model = config.model
    flat.update({"model.n_kv_heads": model.kv_heads, "model.d_ff": model.hidden})
    flat["model.vocab_size"] = model.embedding_rows(n_tokens)
    flat.update({f"data.{key}": None for key in BY_DIGEST})
    stages = [f"{stage.steps} steps of {stage.batch_tokens}" for stage in config.train.batch_ramp]
    flat["train.batch_ramp"] = ", ".join(stages) or None
    return flat


def _read_environment(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict) or not {"run_id", "starts"} <= found.keys():
        raise UserError(f"{path} was not written by pretrain.py: it lacks run_id or starts; move it away")
    return found
