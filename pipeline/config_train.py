"""Settings of how a run is computed, kept and watched: `train`, `parallel`, `checkpoint`, `eval`, `log`.

In: values of a YAML file or of flags. Out: frozen sections of `config.Config`. What a model is and learns is beside it.
"""

from __future__ import annotations

from typing import Literal

from pipeline.section import PositiveFloat, PositiveInt, Section


class RampStage(Section):
    """Some steps with a batch of their own."""

    steps: PositiveInt
    """Updates of this stage."""
    batch_tokens: PositiveInt
    """Tokens per update in it: a multiple of model.context_length."""


class TrainConfig(Section):
    """The length of training and how a step is computed."""

    steps: PositiveInt | None = None
    """Updates to make."""
    tokens: PositiveInt | None = None
    """The same in tokens, rounded up to whole steps."""
    batch_tokens: PositiveInt = 491520
    """Tokens per update over all ranks: a multiple of model.context_length. Accumulation is derived from it."""
    batch_ramp: tuple[RampStage, ...] = ()
    """Stages with other batches before that, from step 1 on: a list of {steps, batch_tokens}."""
    micro_batch: PositiveInt = 8
    """Sequences per forward pass on one rank: lower it when memory runs out. Without dropout only rounding changes."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic of the forward and backward pass. auto: bf16 where the device computes it natively, else fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA when present."""
    compile: bool = False
    """Compile the model with torch.compile."""
    deterministic: bool = False
    """Use only deterministic kernels on CUDA (slower). The CPU always does."""

    def faults(self) -> list[str]:
        """Exactly one length."""
        if (self.steps is None) == (self.tokens is None):
            return ["give exactly one of steps and tokens; a flag takes the other back: --train.steps null"]
        return []


class ParallelConfig(Section):
    """How ranks share the work."""

    strategy: Literal["auto", "single", "ddp"] = "auto"
    """auto: single for one process, ddp (one replica per rank) for several."""


class CheckpointConfig(Section):
    """What is kept, and how a run goes on."""

    every: PositiveInt = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: PositiveInt = 2
    """Newest checkpoints to keep."""
    keep_every: PositiveInt | None = None
    """Checkpoints at multiples of this step are kept for ever."""
    allow_changes: bool = False
    """Go on with other settings of optimizer and training, datasets or weights than those of the checkpoint."""

    def faults(self) -> list[str]:
        """Checkpoints to keep that would never be written."""
        if self.keep_every is not None and self.keep_every % self.every:
            return [f"keep_every {self.keep_every} must be a multiple of every {self.every}"]
        return []


class EvalConfig(Section):
    """Evaluation on the fixed validation set."""

    every: PositiveInt = 1000
    """Steps between evaluations; the last step is always evaluated."""
    tokens: PositiveInt | None = None
    """Evaluate on the first so many validation tokens of each dataset, rounded up to whole rows (default: all)."""


class LogConfig(Section):
    """The record of a run."""

    every: PositiveInt = 10
    """Steps between lines in metrics.jsonl and on the console; the last step is always logged."""
    trackers: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Services fed from the record. They can fail without stopping the run."""
    project: str = "pretraining"
    """Project name for the trackers."""
    peak_tflops: PositiveFloat | None = None
    """Dense peak of one device in the chosen precision, for MFU on devices that are not in the table."""
