"""A spike is told from the losses before it, alike everywhere; going back leaves the rows of the spike out."""

from __future__ import annotations

import math
import statistics

import pytest

from pipeline.config_data import SourceConfig
from pipeline.data.loading.blend import Phase, PhaseSource
from pipeline.ramp import Ramp
from pipeline.train.spikes import ENOUGH, WINDOW, is_spike, threshold
from pipeline.train.state import BatchSizes, Rollback, TrainState

SOURCES = (PhaseSource(name="a", digest="a", settings=SourceConfig(path="data/a")),)


def begun() -> TrainState:
    return TrainState(
        step=0,
        rows=0,
        tokens=0,
        n_tokens=256,
        phases=(Phase(row=0, sources=SOURCES),),
        batches=(BatchSizes(after=0, row=0, ramp=Ramp(stages=((2, 1),), full=4)),),
        tokenizer_fingerprint="",
        tokenizer_eos_id=0,
        precision="torch.float32",
    )


def test_threshold_is_mean_plus_deviations() -> None:
    losses = [4 - 0.01 * n + 0.1 * math.sin(n) for n in range(ENOUGH)]
    expected = statistics.fmean(losses) + 6 * statistics.pstdev(losses)
    assert threshold(losses, deviations=6) == pytest.approx(expected, rel=1e-12)
    assert is_spike(expected + 1e-9, losses, deviations=6)
    assert not is_spike(expected - 1e-9, losses, deviations=6)


def test_too_few_losses_tell_nothing() -> None:
    assert not is_spike(1e9, [1.0] * (ENOUGH - 1), deviations=1)
    assert is_spike(1e9, [1.0] * ENOUGH, deviations=1)


def test_the_state_remembers_a_window_of_losses_and_what_was_skipped() -> None:
    state = begun()
    for step in range(1, WINDOW + 11):
        state = state.after(targets=8, loss=float(step), skipped=step == 5)
    assert state.recent_losses == tuple(float(step) for step in range(11, WINDOW + 11))
    assert state.skipped == (5,)
    assert state.tokens == 8 * (WINDOW + 9), "nothing was learned from the skipped step"
    assert state.rows == 2 + 4 * (WINDOW + 8), "its rows are used up all the same"


def test_going_back_leaves_out_the_rows_up_to_the_spike() -> None:
    state = begun()
    states = [state]
    for _ in range(9):
        states.append(states[-1].after(targets=1, loss=1.0))
    back = states[9].rolled_back(states[4])
    assert (back.step, back.rows, back.rollbacks) == (4, states[9].rows, (Rollback(spike=9, to=4),))
    assert back.rows_of(5) == (states[9].rows, 4)
    assert back.rows_of(6) == (states[9].rows + 4, 4)
    assert [back.rows_of(step) for step in (1, 2, 3, 4)] == [(0, 1), (1, 1), (2, 4), (6, 4)], "what was learned stays"
    changed = back.continued(SOURCES, back.batches[-1].ramp, precision="torch.bfloat16")
    changed = changed.model_copy(update={"phases": (*changed.phases, Phase(row=back.rows, sources=SOURCES))})
    kept = changed.after(targets=1, loss=1.0).rolled_back(states[4])
    assert (kept.phases, kept.precision) == (changed.phases, "torch.bfloat16"), "what changed since then stays so"
    again = back.after(targets=1, loss=1.0).rolled_back(back)
    assert again.rows_of(5) == (states[9].rows + 4, 4)
    assert len(again.batches) == 2
    assert again.rollbacks == (Rollback(spike=9, to=4), Rollback(spike=5, to=4))
