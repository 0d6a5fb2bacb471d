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
from pipeline.data.loading.blend import Phase
from pipeline.data.loading.sources import TrainingData
from pipeline.errors import UserError
from pipeline.files import write_durably
from pipeline.locks import locked
from pipeline.model.transformer import Decoder
from pipeline.train.changes import refuse_another_run
from pipeline.train.checkpoint import CheckpointStore, restore
from pipeline.train.curves import draw_curves
from pipeline.train.metrics import ConsoleLine, Meter, Record, read_record
from pipeline.train.runtime import Runtime, Trackers, environment
from pipeline.train.state import BatchSizes, TrainState
from pipeline.train.step import Evaluation, StepResult

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
            precision = str(self.runtime.precision)
            refuse_another_run(newest, self.config, self.data, precision=precision, say=self.runtime.say)
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
