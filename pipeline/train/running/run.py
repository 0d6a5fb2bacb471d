"""The folder of a run: what it is, what happened, and where it goes on.

    runs/NAME/config.yaml  environment.json  metrics.jsonl  curves.png  checkpoints/

In: the configuration and the data. Out: a `Run` that resumes from the newest intact checkpoint when the
same command is given again, and refuses when data or model are not what they were.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch
import yaml

from pipeline.config import Config, resolved
from pipeline.data.loading.blend import Phase
from pipeline.data.loading.sources import TrainingData, ValidationSet
from pipeline.errors import EXIT_STOPPED, StoppedEarly, UserError, counted
from pipeline.files import write_durably
from pipeline.locks import locked
from pipeline.model.transformer import Decoder
from pipeline.status import NAME as STATUS
from pipeline.status import Status, write_status
from pipeline.train.parallel import Parallel
from pipeline.train.reporting.curves import draw_curves
from pipeline.train.reporting.metrics import ConsoleLine, Meter, Record, read_record
from pipeline.train.reporting.trackers import Trackers
from pipeline.train.running.changes import refuse_another_run
from pipeline.train.runtime import Runtime, environment
from pipeline.train.saving.checkpoint import checkpoint_folder, newest_intact, read_state, restore
from pipeline.train.saving.store import CheckpointStore
from pipeline.train.spikes import is_spike
from pipeline.train.state import BatchSizes, TrainState
from pipeline.train.step import Evaluation, StepResult, Trainer, evaluate

PATIENCE = 30.0  # seconds to wait for the lock: ranks of a start that was killed end by themselves within that
DRAW_SECONDS = 60.0  # curves.png is drawn with a checkpoint at most this often: a picture costs a third of a second


class Run:
    """Record, checkpoints and trackers of one run folder."""

    def __init__(self, config: Config, data: TrainingData, *, runtime: Runtime) -> None:
        self.config = config
        self.data = data
        self.runtime = runtime
        self.folder = Path(config.run_dir)
        tokenizer = data.tokenizer_json
        self.store = CheckpointStore(checkpoint_folder(config), config, tokenizer_json=tokenizer, runtime=runtime)
        self.record = Record(self.folder / "metrics.jsonl")
        self.console = ConsoleLine(runtime.console, total_steps=config.total_steps, ramp=config.ramp)
        self.trackers: Trackers | None = None
        self._held = ExitStack()
        self._drawn = time.perf_counter()
        self._step = 0

    def resume(self, model: Decoder, optimizer: torch.optim.Optimizer) -> TrainState:
        """Fill model and optimizer from the newest intact checkpoint, or leave them and start at step 0.

        Errors: data, tokenizer, model or seed differ from the checkpoint's; other training settings differ and
        `checkpoint.allow_changes` is not set.
        """
        if self.runtime.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = locked(self.folder, ask_of_other_hosts=False, patience=PATIENCE, say=self.runtime.say)
            self._held.enter_context(lock)
        self.store.clean()
        self.runtime.barrier()
        newest = self.store.newest()
        if newest is None:
            state = self._first_state(model)
        else:
            precision = str(self.runtime.precision)
            refuse_another_run(newest, self.config, self.data, precision=precision, say=self.runtime.say)
            state = restore(newest, model=model, optimizer=optimizer)
            state = state.continued(self.data.described(), self.config.ramp_of_rows, precision=precision)
            self.runtime.say(f"resuming from {newest}")
        if state.step >= self.config.total_steps:
            self.runtime.say(
                f"already at step {state.step} of {self.config.total_steps}; raise train.steps to go further"
            )
        elif self.runtime.is_main:
            self._open(state)
            self._tell("running", state.step, exit_code=None, message=f"started from step {state.step}")
            self.runtime.pulse.on_end = self._failed
        self.runtime.barrier()
        return state

    def look(self, model: Decoder) -> TrainState:
        """Where the run stands, without touching anything."""
        newest = newest_intact(checkpoint_folder(self.config), warn=self.runtime.say)
        return self._first_state(model) if newest is None else read_state(newest)

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
                "warning: the checkpoints of an earlier run are gone: starting over from step 1; its record is "
                f"{self.record.set_aside()}"
            )
        self.record.cut_after(state.step, evaluated=state.evaluated)
        self.trackers = Trackers(self.runtime, self.config, run_id=history["run_id"], settings=settings)

    def spiked(self, before: TrainState, result: StepResult) -> bool:
        """Whether the loss jumped and the run is to go back from it."""
        train = self.config.train
        if train.on_spike == "ignore" or result.skipped:
            return False
        return is_spike(result.loss, before.recent_losses, deviations=train.spike_deviations)

    def roll_back(self, state: TrainState, trainer: Trainer) -> TrainState:
        """Weights and moments of an earlier checkpoint, and a state that goes on with the rows after `state`'s.

        The newest of those that `checkpoint.every` asked for: one that a stop has left between them would make the
        record another than that of a run without the stop. Errors: no checkpoint to go back to, or more jumps than
        `train.max_rollbacks`.
        """
        jump = f"step {state.step}: the loss jumped to {state.recent_losses[-1]:.4f}"
        if len(state.rollbacks) >= self.config.train.max_rollbacks:
            raise UserError(
                f"{jump} after {counted(len(state.rollbacks), 'rollback')}, and train.max_rollbacks allows no more; "
                "lower optim.lr or optim.clip_norm, or raise it"
            )
        self.store.finish()
        origin = self.store.newest(scheduled=True)
        if origin is None:
            raise UserError(f"{jump} and there is no checkpoint to go back to; lower checkpoint.every or ignore spikes")
        with self.runtime.pulse.unhurried(f"going back to {origin.name}"):
            earlier = restore(origin, model=trainer.parallel.model, optimizer=trainer.optimizer)
            self.store.forget_after(earlier.step)
        trainer.load_loss_scale(earlier.loss_scale)
        trainer.skipped = len(earlier.skipped)
        if self.runtime.is_main:
            self.record.cut_after(earlier.step, evaluated=earlier.evaluated)
        rows = state.rows - earlier.rows
        self.runtime.say(f"{jump}; back to {origin}, leaving out the {rows} rows from row {earlier.rows} on")
        return state.rolled_back(earlier)

    def evaluate(self, state: TrainState, parallel: Parallel, validation: Sequence[ValidationSet]) -> TrainState:
        """Evaluate and record it; the state tells whether a signal cut it short, but for the last step's."""
        if not validation:
            return state.model_copy(update={"evaluated": True})  # nothing is due
        stop = self.runtime.job.stop if state.step < self.config.total_steps else _never
        found = evaluate(parallel, validation, runtime=self.runtime, tokens=self.config.eval.tokens, stop=stop)
        if found is not None:
            self._log(evaluation_line(state, found))
        return state.model_copy(update={"evaluated": found is not None})

    def log_step(self, state: TrainState, result: StepResult, *, meter: Meter) -> None:
        """Record a training step: at `log.every`, at the end, and each that was skipped."""
        line: dict[str, Any] = {"step": state.step, "tokens": state.tokens, "lr": result.lr}
        if result.skipped:
            line["skipped"] = True  # loss or norm was not finite, which JSON has no word for
        else:
            line.update({"loss": result.loss, "grad_norm": result.grad_norm})
        self._log({**line, **meter.take()})

    def _log(self, line: dict[str, Any]) -> None:
        if self.runtime.is_main:
            self.record.write(line)
            self.console.show(line)
            numbers = {key: value for key, value in line.items() if key != "step"}
            if self.trackers is not None:
                self.trackers.log(numbers, step=line["step"])

    def save(self, state: TrainState, trainer: Trainer) -> None:
        """Begin a checkpoint and bring curves.png up to date."""
        began = time.perf_counter()
        state = state.model_copy(update={"loss_scale": trainer.loss_scale()})
        if self.runtime.is_main:
            self.record.sync()
        with self.runtime.pulse.unhurried(f"saving step {state.step}"):
            self.store.begin(state, model=trainer.parallel.model, optimizer=trainer.optimizer)
        self._tell("running", state.step, exit_code=None, message=f"checkpoint of step {state.step} begun")
        if self.runtime.is_main and (state.step == self.config.total_steps or began > self._drawn + DRAW_SECONDS):
            self._draw()
            self._drawn = time.perf_counter()

    def stopped(self, state: TrainState) -> StoppedEarly:
        """Wait for the checkpoint, let go of everything; what to raise."""
        launch = self.runtime.job.launch
        self._close()
        again = f": {launch.launcher} {shlex.join(sys.argv)}"
        if launch.endings:  # a script of launch/ was given
            again = ""
        message = f"stopped after step {state.step}, everything is saved; go on with the same command{again}"
        self._tell("stopped", state.step, exit_code=EXIT_STOPPED, message=message)
        return StoppedEarly(message)

    def finish(self, state: TrainState) -> None:
        """The run is at its end: wait for its last checkpoint, and let go of everything."""
        self._close()
        message = f"done: {state.step} steps, {state.tokens:,} tokens; next: python sample.py {self.config.run_dir}"
        self._tell("finished", state.step, exit_code=0, message=message)
        self.runtime.say(message)

    def _close(self) -> None:
        with self.runtime.pulse.unhurried("waiting for the last checkpoint"):
            self.store.finish()
        if self.trackers is not None:
            self.trackers.finish()
        self._held.close()
        self.runtime.pulse.on_end = None

    def _tell(
        self,
        status: Literal["running", "stopped", "finished", "failed"],
        step: int,
        *,
        exit_code: int | None,
        message: str,
    ) -> None:
        """Bring status.json up to date. It only tells of the run: that it cannot be written changes nothing else."""
        if not self.runtime.is_main:
            return
        self._step = step
        try:
            write_status(self.folder, Status(status=status, step=step, exit_code=exit_code, message=message))
        except OSError as error:
            reason = error.strerror or error
            self.runtime.say(f"warning: {self.folder / STATUS} was not written ({reason}); it should say: {status}")

    def _failed(self, exit_code: int, message: str) -> None:
        """What the process calls before it ends for another reason than its end or a stop that was saved."""
        status: Literal["stopped", "failed"] = "stopped" if exit_code == EXIT_STOPPED else "failed"
        self._tell(status, self._step, exit_code=exit_code, message=message)

    def _draw(self) -> None:
        try:
            draw_curves(read_record(self.record.path), self.folder / "curves.png", title=self.folder.name)
        except Exception as error:  # a picture must never stop a run: matplotlib may be missing or a font broken
            self.runtime.say(f"warning: curves.png was not drawn: {error}")


def evaluation_line(state: TrainState, found: Evaluation) -> dict[str, Any]:
    """An evaluation as the record has it; of a blend also the loss on each dataset."""
    line: dict[str, Any] = {"step": state.step, "tokens": state.tokens, "val_loss": found.loss}
    if len(state.phases[-1].sources) > 1:
        line.update({f"val_loss/{name}": loss for name, loss in found.sources.items()})
    return {**line, "val_bits_per_byte": found.bits_per_byte, "val_targets": found.targets}


def _never() -> bool:
    return False


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
