"""The folder of a run: what it is, what happened, and where it goes on.

    runs/NAME/config.yaml  environment.json  metrics.jsonl  status.json  curves.png  checkpoints/

In: the configuration and the data. Out: a `Run` that resumes from the newest intact checkpoint when the
same command is given again, and refuses when data or model are not what they were.
"""

from __future__ import annotations

import shlex
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from pipeline.config import Config, resolved
from pipeline.data.loading.blend import Phase
from pipeline.data.loading.sources import TrainingData, ValidationSet
from pipeline.errors import EXIT_STOPPED, StoppedEarly, UserError, counted
from pipeline.files import write_durably
from pipeline.model.transformer import Decoder
from pipeline.status import HEARTBEAT, Status, write_status
from pipeline.status import NAME as STATUS
from pipeline.train.parallel import Parallel
from pipeline.train.reporting.curves import draw_curves
from pipeline.train.reporting.metrics import ConsoleLine, Meter, Record, read_record, seconds_left
from pipeline.train.reporting.trackers import Trackers
from pipeline.train.running.changes import refuse_another_run
from pipeline.train.running.folder import RunFolder
from pipeline.train.runtime import Runtime, environment, peak_memory
from pipeline.train.saving.checkpoint import checkpoint_folder, newest_intact, read_config, read_state, restore
from pipeline.train.saving.storage import Location
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
        self._held = RunFolder(self.folder)
        self._began = self._drawn = time.perf_counter()  # of the run: what earlier starts took is before it
        self._status = Status(status="running", step=0, exit_code=None, message="", total_steps=config.total_steps)
        self._telling = threading.Lock()  # of status.json
        self._closed = threading.Event()

    def resume(self, model: Decoder, optimizer: torch.optim.Optimizer) -> TrainState:
        """Fill model and optimizer from the newest intact checkpoint, or leave them and start at step 0.

        Errors: data, tokenizer, model or seed differ from the checkpoint's; other training settings differ and
        `checkpoint.allow_changes` is not set.
        """
        try:
            return self._resume(model, optimizer)
        except BaseException:  # refused: the folder is as it was, its lock file included
            self._held.release()
            raise

    def _resume(self, model: Decoder, optimizer: torch.optim.Optimizer) -> TrainState:
        if self.runtime.is_main:
            self._held.hold(patience=PATIENCE, say=self.runtime.say)
        self.store.clean()
        self.runtime.barrier()
        if not self.runtime.is_main:
            self._held.watch()
        newest = self.store.newest()
        if newest is None:
            state = self._first_state(model)
        else:
            precision = self.runtime.arithmetic
            refuse_another_run(newest, self.config, self.data, precision=precision, say=self.runtime.say)
            state = restore(newest, model=model, optimizer=optimizer)
            state = state.continued(self.data.described(), self.config.ramp_of_rows, precision=precision)
            self.runtime.say(f"resuming from {newest}")
        if state.step >= self.config.total_steps:
            self.runtime.say(
                f"already at step {state.step} of {self.config.total_steps}; raise train.steps to go further, or begin "
                f"another run with --run-dir {another(self.folder)}"
            )
        elif self.runtime.is_main:
            self._open(state, newest)
            self._tell("running", state.step, exit_code=None, message=f"started from step {state.step}")
            threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
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
            precision=self.runtime.arithmetic,
        )

    def _open(self, state: TrainState, resumed: Location | None) -> None:
        """Write the folder's description and bring the record back to `state`; first what may be refused."""
        lines = read_record(self.record.path) if self.record.path.exists() else []
        before = self._held.read_environment(say=self.runtime.say)
        settings = resolved(self.config)
        write_durably(self.folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False).encode())
        self._held.write_environment(before, from_step=state.step, about=environment())
        if resumed is not None:
            earlier = max((start.from_step for start in before.starts if start.from_step < state.step), default=0)
            self._tell_of_lost_lines(lines, state.step, begun=earlier, every=read_config(resumed).log.every)
        elif any(line["step"] >= self.config.checkpoint.every for line in lines):
            self.runtime.say(
                "warning: the checkpoints of an earlier run are gone: starting over from step 1; its record is "
                f"{self.record.set_aside()}"
            )
        self.record.cut_after(state.step, evaluated=state.evaluated)
        earlier_seconds = [line.get("elapsed_seconds", 0.0) for line in lines if line["step"] <= state.step]
        self._began = time.perf_counter() - max(earlier_seconds, default=0.0)
        self.trackers = Trackers(self.runtime, self.config, run_id=before.run_id, settings=settings)

    def _tell_of_lost_lines(self, lines: list[dict[str, Any]], step: int, *, begun: int, every: int) -> None:
        """Warn if the record ends before the checkpoint of `step`, whose start logged `every` steps after `begun`."""
        last = max((line["step"] for line in lines if "val_loss" not in line), default=0)
        if max(last, begun) < step - step % every:
            self.runtime.say(
                f"warning: {self.record.path} ends at step {last}, before the checkpoint of step {step}: the lines "
                "between are lost; the run goes on from the checkpoint, whose weights are whole"
            )

    def spiked(self, before: TrainState, result: StepResult) -> bool:
        """Whether the loss jumped and the run is to go back from it."""
        train = self.config.train
        if not train.rolls_back or result.skipped:
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
        if not self.runtime.is_main:
            return
        self._held.check()
        numbers = {key: value for key, value in line.items() if key != "step"}
        numbers["elapsed_seconds"] = round(time.perf_counter() - self._began, 3)
        numbers["peak_memory_bytes"] = peak_memory(self.runtime.device)
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")
        self.record.write({"step": line["step"], **numbers, "time": now})
        self.console.show(line)
        if self.trackers is not None:
            self.trackers.log(numbers, step=line["step"])
        known = ("step", "loss", "tokens_per_second")
        live: dict[str, Any] = {key: line[key] for key in known if key in line}
        if "tokens_per_second" in line:
            live["eta_seconds"] = seconds_left(line, total_steps=self.config.total_steps, ramp=self.config.ramp)
        self._status = self._status.model_copy(update=live)  # told with the next heartbeat

    def save(self, state: TrainState, trainer: Trainer) -> None:
        """Begin a checkpoint and bring curves.png up to date."""
        began = time.perf_counter()
        state = state.model_copy(update={"loss_scale": trainer.loss_scale()})
        if self.runtime.is_main:
            self._held.check()
            self.record.sync()
        with self.runtime.pulse.unhurried(f"saving step {state.step}"), self._held.explaining():
            self.store.begin(state, model=trainer.parallel.model, optimizer=trainer.optimizer)
        self._tell("running", state.step, exit_code=None, message=f"checkpoint of step {state.step} begun")
        if self.runtime.is_main and (state.step == self.config.total_steps or began > self._drawn + DRAW_SECONDS):
            self._draw()
            self._drawn = time.perf_counter()

    def poll(self) -> None:
        """Tell of a checkpoint that was finished meanwhile. Errors: it could not be written."""
        with self._held.explaining():
            self.store.poll()

    def stopped(self, state: TrainState) -> StoppedEarly:
        """Wait for the checkpoint, let go of everything; what to raise."""
        launch = self.runtime.job.launch
        again = f": {launch.launcher} {shlex.join(sys.argv)}"
        if launch.endings:  # a script of launch/ was given
            again = ""
        message = f"stopped after step {state.step}, everything is saved; go on with the same command{again}"
        self._close("stopped", state.step, exit_code=EXIT_STOPPED, message=message)
        return StoppedEarly(message)

    def finish(self, state: TrainState) -> None:
        """The run is at its end: wait for its last checkpoint, and let go of everything."""
        message = f"done: {state.step} steps, {state.tokens:,} tokens; next: python sample.py {self.config.run_dir}"
        self._close("finished", state.step, exit_code=0, message=message)
        self.runtime.say(message)

    def _close(self, status: Literal["stopped", "finished"], step: int, *, exit_code: int, message: str) -> None:
        """Tell of the end while the folder is still held: the next start may begin as soon as it is not."""
        with self.runtime.pulse.unhurried("waiting for the last checkpoint"), self._held.explaining():
            self.store.finish()
        if self.trackers is not None:
            self.trackers.finish()
        with self._telling:
            self._closed.set()
        self._held.check()
        self.runtime.pulse.on_end = None
        self._tell(status, step, exit_code=exit_code, message=message)
        self._held.release()

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
        with self._telling:
            told = {"status": status, "step": step, "exit_code": exit_code, "message": message}
            self._status = self._status.model_copy(update=told)
            try:
                self._write_status()
            except OSError as error:
                reason = error.strerror or error
                self.runtime.say(f"warning: {self.folder / STATUS} was not written ({reason}); it should say: {status}")

    def _write_status(self) -> None:
        """In the folder itself, wherever it was moved to; nowhere if it is gone."""
        where = self._held.whereabouts()
        if where is not None:
            write_status(where, self._status.model_copy(update={"heartbeat": datetime.now(UTC)}))

    def _beat(self) -> None:
        """Say every few seconds that this process lives, and how far it is; a thread of its own does that."""
        while not self._closed.wait(HEARTBEAT):
            with self._telling, suppress(OSError):  # told when the status changes
                if not self._closed.is_set():
                    self._write_status()

    def _failed(self, exit_code: int, message: str) -> None:
        """What the process calls before it ends for another reason than its end or a stop that was saved."""
        status: Literal["stopped", "failed"] = "stopped" if exit_code == EXIT_STOPPED else "failed"
        self._closed.set()
        self._tell(status, self._status.step, exit_code=exit_code, message=message)

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


def another(folder: Path) -> Path:
    """A name for another run beside this one that is still free."""
    return next(name for n in count(2) if not (name := folder.with_name(f"{folder.name}-{n}")).exists())
