"""Where a run stands: numbers and names, no tensors; state.json of a checkpoint.

In: what each step trained on. Out: the rows of any step, past or to come, and all else that a run needs to go on as
if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.data.loading.blend import Phase, PhaseSource, continued
from pipeline.ramp import Ramp
from pipeline.train.spikes import WINDOW
from pipeline.untrusted import Natural

FORMAT = 3
MOST_ROWS = 2**24
"""Rows of a batch; runs have a thousandth of it."""


class BatchSizes(BaseModel):
    """From step `after` + 1 on, which begins at row `row`, each step takes its rows by `ramp`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    after: Natural
    row: Natural
    ramp: Ramp

    @model_validator(mode="after")
    def _sizes_are_sizes(self) -> Self:
        sizes = [self.ramp.full, *(rows for _, rows in self.ramp.stages)]
        if not all(0 < rows <= MOST_ROWS for rows in sizes) or not all(steps > 0 for steps, _ in self.ramp.stages):
            raise ValueError(f"expected batches of 1 to {MOST_ROWS:,} rows in stages of at least 1 step")
        return self


def rows_of_step(batches: Sequence[BatchSizes], step: int) -> tuple[int, int]:
    """First row and number of rows of step `step`; 1 is the first."""
    sizes = next(sizes for sizes in reversed(batches) if sizes.after < step)
    return sizes.row + sizes.ramp.before(step) - sizes.ramp.before(sizes.after + 1), sizes.ramp.of(step)


class Rollback(BaseModel):
    """After step `spike` the run went back to the checkpoint of step `to` and left out the rows between them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spike: Natural
    to: Natural


class TrainState(BaseModel):
    """Where a run stands. The next batch starts at row `rows`; there is no other data position.

    `phases` say what the rows are, `batches` which of them each step took; both grow when a resumed run changes them.
    `evaluated` is false when the run was stopped before the evaluation that this step was due for. `skipped` names
    steps whose update was not applied, `recent_losses` are the last ones, oldest first, by which a spike is told.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    step: Natural
    rows: Natural
    tokens: Natural
    n_tokens: Natural
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)]
    batches: Annotated[tuple[BatchSizes, ...], Field(min_length=1)]
    tokenizer_fingerprint: str
    tokenizer_eos_id: Natural
    precision: str
    loss_scale: dict[str, float | int] = {}
    evaluated: bool = True
    skipped: tuple[Natural, ...] = ()
    rollbacks: tuple[Rollback, ...] = ()
    recent_losses: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        """What grows with the run begins at its beginning; a step is skipped once."""
        for name, places in (
            ("phases", [phase.row for phase in self.phases]),
            ("batches", [sizes.after for sizes in self.batches]),
        ):
            if places[0] != 0 or any(low >= high for low, high in pairwise(places)):
                raise ValueError(f"expected {name} that begin at 0 and ascend, got {places[:5]}")
        if len(set(self.skipped)) < len(self.skipped) or max(self.skipped, default=0) > self.step:
            raise ValueError(f"expected skipped steps up to {self.step}, each once, got {self.skipped[:5]}")
        return self

    @property
    def updates(self) -> int:
        """Updates that were applied: what the optimizer has counted."""
        return self.step - len(self.skipped)

    def rows_of(self, step: int) -> tuple[int, int]:
        """First row and number of rows of any step, one of the past or one to come."""
        return rows_of_step(self.batches, step)

    def after(self, *, targets: int, loss: float, skipped: bool = False) -> TrainState:
        """The state one step later, of so many targets and that loss; `skipped`: its update was not applied."""
        first, rows = self.rows_of(self.step + 1)
        assert first == self.rows, f"step {self.step + 1} begins at row {first}, got as far as {self.rows}"
        changed: dict[str, Any] = {"step": self.step + 1, "rows": first + rows}
        if skipped:
            changed["skipped"] = (*self.skipped, self.step + 1)
        else:
            changed["tokens"] = self.tokens + targets
            changed["recent_losses"] = (*self.recent_losses, loss)[-WINDOW:]
        return self.model_copy(update=changed)

    def rolled_back(self, to: TrainState) -> TrainState:
        """The state `to`, an earlier one, from which the run goes on with the rows after those of this one.

        What changed since `to` was written stays changed: datasets, sizes of batches, precision.
        """
        batches = (*(sizes for sizes in self.batches if sizes.after < to.step),)
        batches += (BatchSizes(after=to.step, row=self.rows, ramp=self.batches[-1].ramp),)
        rollbacks = (*self.rollbacks, Rollback(spike=self.step, to=to.step))
        changed = {"phases": self.phases, "batches": batches, "precision": self.precision}
        return to.model_copy(update={"rows": self.rows, "rollbacks": rollbacks, **changed})

    def continued(self, sources: tuple[PhaseSource, ...], ramp: Ramp, *, precision: str | None = None) -> TrainState:
        """The state from which a run goes on with these datasets, sizes of batches and precision, perhaps new ones.

        precision: the resolved one; None where nothing is computed.
        """
        batches = self.batches
        if ramp != batches[-1].ramp:
            batches = (*(sizes for sizes in batches if sizes.after < self.step),)
            batches += (BatchSizes(after=self.step, row=self.rows, ramp=ramp),)
        phases = continued(self.phases, sources, row=self.rows)
        changed = {"batches": batches, "phases": phases, "precision": precision or self.precision}
        return self.model_copy(update=changed)
