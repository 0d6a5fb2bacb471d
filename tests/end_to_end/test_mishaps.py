"""Mishaps that meet: changes and a spike, a stop and a spike, a failure while a checkpoint is written."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import pipeline.train.running.run as run_module
from pipeline.status import Status
from pipeline.train.processes.signals import StopSignal
from pipeline.train.running.run import Run
from pipeline.train.saving.checkpoint import list_checkpoints, read_state
from pipeline.train.saving.storage import LocalShelf, names_a_checkpoint
from pipeline.train.state import Rollback, TrainState
from pipeline.train.step import Trainer
from tests.distributed.test_failures import of_ranks
from tests.end_to_end.test_bad_steps import spoil
from tests.support import make_dataset, record, run_pretrain, run_ranks, tiny_settings, write_config

pytestmark = pytest.mark.slow

BACK: dict[str, dict[str, Any]] = {
    "checkpoint": {"every": 10},
    "eval": {"every": 100},
    "train": {"steps": 40, "on_spike": "rollback", "spike_deviations": 20},
    "optim": {"horizon_steps": 50},
}
JUMP = partial(spoil, {26 * 8 + 3}, 40.0)  # in step 27


def last_state(run_dir: Path) -> TrainState:
    return read_state(list_checkpoints(run_dir / "checkpoints")[-1])


def go(
    folder: Path, name: str, settings: dict[str, Any], *flags: str, before: Callable[[], None] | None = None
) -> tuple[int, str]:
    """One process; its exit code and what it printed."""
    config = write_config(folder / f"{name}.yaml", settings)
    output = folder / f"{name}-{time.monotonic_ns()}.txt"
    code, printed = run_ranks(1, str(config), *flags, output=output, before=before)
    return code, printed


def test_weights_changed_on_resuming_stay_changed_after_a_spike(dataset: Path, tmp_path: Path) -> None:
    """Between the resume and the spike nothing was saved: what the run goes back to knows the old weights alone."""
    more = make_dataset(tmp_path / "more", seed=2)
    settings = tiny_settings(dataset, tmp_path / "run", **{**BACK, "checkpoint": {"every": 20}})

    def weighted(share: float, steps: int) -> dict[str, Any]:
        sources = [{"path": str(dataset), "weight": share}, {"path": str(more), "weight": 1 - share}]
        return {**settings, "data": {"sources": sources}, "train": {**settings["train"], "steps": steps}}

    assert go(tmp_path, "a", weighted(0.75, 20))[0] == 0
    code, printed = go(tmp_path, "a", weighted(0.25, 40), "--checkpoint.allow-changes", "true", before=JUMP)
    assert code == 0, printed
    assert "step 27: the loss jumped to" in printed
    state = last_state(tmp_path / "run")
    assert [(phase.row, float(phase.sources[0].settings.weight)) for phase in state.phases] == [(0, 0.75), (160, 0.25)]
    assert state.rollbacks == (Rollback(spike=27, to=20),)
    code, printed = go(tmp_path, "a", weighted(0.25, 44))
    assert code == 0, printed


def test_a_precision_changed_once_need_not_be_allowed_again(dataset: Path, tmp_path: Path) -> None:
    train = {"steps": 4, "on_spike": "ignore"}
    config = write_config(tmp_path / "a.yaml", tiny_settings(dataset, tmp_path / "run", **{**BACK, "train": train}))
    bf16 = ("--train.precision", "bf16")
    assert run_pretrain(config)[0] == 0
    code, printed = run_pretrain(config, "--train.steps", "6", *bf16, "--checkpoint.allow-changes", "true")
    assert code == 0, printed
    assert last_state(tmp_path / "run").precision == "torch.bfloat16"
    code, printed = run_pretrain(config, "--train.steps", "8", *bf16)
    assert code == 0, printed
    code, printed = run_pretrain(config, "--train.steps", "10")
    assert code == 2, printed
    assert "train.precision: torch.bfloat16 -> torch.float32" in printed


def stopping(step: int) -> None:
    """The run is asked to stop in that step, and its losses jump as in `JUMP`."""
    JUMP()
    backward = Trainer._backward

    def asked(self: Trainer, batch: Any, *, step: int, targets: int) -> Any:
        self.stop = (lambda: True) if step == at else self.stop
        return backward(self, batch, step=step, targets=targets)

    at = step
    Trainer._backward = asked  # type: ignore[method-assign]  # a fault put in place


def test_a_stop_before_a_spike_leaves_no_trace(dataset: Path, tmp_path: Path) -> None:
    """It saves step 24, which no run without the stop could go back to; only one checkpoint is kept."""
    back = {**BACK, "checkpoint": {"every": 10, "keep": 1}}
    code, printed = go(tmp_path, "a", tiny_settings(dataset, tmp_path / "a", **back), before=JUMP)
    assert code == 0, printed
    settings = tiny_settings(dataset, tmp_path / "b", **back)
    _, printed = go(tmp_path, "b", settings, before=partial(stopping, 24))
    assert "stopped after step 24" in printed
    code, printed = go(tmp_path, "b", settings, before=JUMP)
    assert code == 0, printed
    assert "back to" in printed
    assert "step-00000020, leaving out the 56 rows from row 160 on" in printed
    assert record(tmp_path / "b") == record(tmp_path / "a")
    last, same = (list_checkpoints(tmp_path / name / "checkpoints")[-1] for name in "ab")
    for file in sorted(Path(str(last)).rglob("*.safetensors")):
        assert Path(str(same), file.relative_to(str(last))).read_bytes() == file.read_bytes()


def skips_and_jump() -> None:
    """Two steps that are not finite: before the spike, and after it."""
    JUMP()
    spoil({22 * 8 + 1, 45 * 8 + 1}, float("nan"))


def test_skips_that_were_gone_back_from_do_not_count(dataset: Path, tmp_path: Path) -> None:
    """One may be skipped: the first is forgotten with the steps that are left out, as a resumed run would have it."""
    train = {**BACK["train"], "steps": 50, "on_nonfinite": "skip", "max_skips": 1}
    settings = tiny_settings(dataset, tmp_path / "a", **{**BACK, "train": train})
    code, printed = go(tmp_path, "a", settings, before=skips_and_jump)
    assert code == 0, printed
    assert "step 27: the loss jumped to" in printed
    assert printed.count("skipped: loss or gradient norm was not finite") == 2
    assert len(last_state(tmp_path / "a").skipped) == 1


def stopped_in_evaluation(step: int) -> None:
    """The run is asked to stop while it evaluates after that step."""
    asked = [False]
    call, evaluate = StopSignal.__call__, Run.evaluate

    def evaluating(self: Run, state: TrainState, *arguments: Any) -> TrainState:
        asked[0] = asked[0] or state.step == step
        return evaluate(self, state, *arguments)

    StopSignal.__call__ = lambda self: call(self) or asked[0]  # type: ignore[method-assign]
    Run.evaluate = evaluating  # type: ignore[method-assign]


def slow_evaluation() -> None:
    evaluate = run_module.evaluate

    def slow(*arguments: Any, **named: Any) -> Any:
        time.sleep(4)
        return evaluate(*arguments, **named)

    run_module.evaluate = slow


def test_an_evaluation_cut_short_twice_is_still_made_up_for(dataset: Path, tmp_path: Path) -> None:
    settings = tiny_settings(dataset, tmp_path / "run")
    _, printed = go(tmp_path, "a", settings, before=partial(stopped_in_evaluation, 5))
    assert "stopped after step 5" in printed
    _, printed = go(tmp_path, "a", settings, "--train.max-minutes", "0.05", before=slow_evaluation)
    assert "stopped after step 5" in printed
    state = last_state(tmp_path / "run")
    assert (state.step, state.evaluated) == (5, False)
    code, printed = go(tmp_path, "a", settings)
    assert code == 0, printed
    assert [line["step"] for line in record(tmp_path / "run") if "val_loss" in line] == [5, 10, 12]


def test_an_evaluation_made_again_after_a_spike_is_recorded_once(dataset: Path, tmp_path: Path) -> None:
    """What the run goes back to was saved by a stop in its evaluation, at a step that is scheduled, too."""
    settings = tiny_settings(dataset, tmp_path / "run", **{**BACK, "eval": {"every": 20}})
    _, printed = go(tmp_path, "a", settings, before=partial(stopped_in_evaluation, 20))
    assert "stopped after step 20" in printed
    code, printed = go(tmp_path, "a", settings, before=JUMP)
    assert code == 0, printed
    assert "step-00000020, leaving out" in printed
    assert [line["step"] for line in record(tmp_path / "run") if "val_loss" in line] == [20, 40]


def fail_while_saving(rank: int | None) -> None:
    """Step 4 takes seconds to be saved, and step 6 fails: with a loss that is not finite, or of one rank alone."""
    publish = LocalShelf.publish
    LocalShelf.publish = lambda shelf, step: (time.sleep(3), publish(shelf, step))[1]  # type: ignore[method-assign]
    if rank is None:
        spoil({5 * 8 + 1}, float("nan"))
    elif rank == int(os.environ["RANK"]):
        backward = Trainer._backward

        def failing(self: Trainer, batch: Any, *, step: int, targets: int) -> Any:
            if step == 6:
                raise ZeroDivisionError
            return backward(self, batch, step=step, targets=targets)

        Trainer._backward = failing  # type: ignore[method-assign]


@pytest.mark.parametrize(("ranks", "rank"), [(1, None), (2, None), (2, 0), (2, 1)])
def test_what_is_being_saved_when_training_fails_is_saved(
    ranks: int, rank: int | None, dataset: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "a.yaml", tiny_settings(dataset, tmp_path / "run"))
    fault = partial(fail_while_saving, rank)
    code, printed = run_ranks(ranks, str(config), output=tmp_path / "o.txt", before=fault)
    assert code != 0
    assert ("ZeroDivisionError" if rank is not None else "error: step 6: loss nan") in printed
    folder = tmp_path / "run" / "checkpoints"
    assert [place.name for place in sorted(folder.iterdir()) if names_a_checkpoint(place)] == ["step-00000004"]
    code, printed = run_ranks(ranks, str(config), output=tmp_path / "again.txt")
    assert code == 0, printed
    assert "resuming from" in printed


def full_disk() -> None:
    """The third step fails for want of room, and so does what would tell of it."""
    write = run_module.write_status

    def full(folder: Path, status: Status) -> None:
        if status.status == "failed":
            raise OSError(errno.ENOSPC, "No space left on device", "status.json.tmp")
        write(folder, status)

    run_module.write_status = full
    backward = Trainer._backward

    def failing(self: Trainer, batch: Any, *, step: int, targets: int) -> Any:
        if step == 3 and self.runtime.is_main:
            raise OSError(errno.ENOSPC, "No space left on device", "x")
        return backward(self, batch, step=step, targets=targets)

    Trainer._backward = failing  # type: ignore[method-assign]


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_end_that_cannot_be_recorded_is_an_end_all_the_same(ranks: int, dataset: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "a.yaml", tiny_settings(dataset, tmp_path / "run"))
    began = time.monotonic()
    code, printed = run_ranks(ranks, str(config), output=tmp_path / "o.txt", before=full_disk)
    assert code != 0
    assert time.monotonic() - began < 60
    assert "error: cannot use x: No space left on device" in printed
    assert "status.json was not written (No space left on device)" in printed.replace("\n", " ")
    assert "Traceback" not in of_ranks(printed), printed
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "running"
