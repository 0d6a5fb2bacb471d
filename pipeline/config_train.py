"""Settings of how a run is computed, kept and watched: `train`, `parallel`, `checkpoint`, `eval`, `log`.

In: values of a YAML file or of flags. Out: frozen sections of `config.Config`. What a model is and learns is beside it.
"""

from __future__ import annotations

from typing import Literal

from pipeline.section import Clash, PositiveFloat, PositiveInt, Section, clash


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
    micro_batch: PositiveInt | Literal["auto"] = 8
    """Sequences per forward pass on one rank: lower it when memory runs out. Without dropout only rounding changes.
    auto: the largest that fits, found at each start."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What of a block is computed again in the backward pass, to save memory. selective: all but matrix products and
    attention. full: everything; about a third more work."""
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32", "fp64"] = "auto"
    """Arithmetic of the forward and backward pass. auto: bf16 where the device computes it natively, else fp32.
    tf32: float32 with matrix products rounded to 10 bits, on CUDA. fp64: everything in float64, for proofs on a CPU."""
    residual: Literal["fp32", "bf16"] = "fp32"
    """Precision of the residual stream, with precision bf16. bf16: faster on CUDA, where moving it costs the most; the
    loss changes by its rounding."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA when present."""
    compile: bool = False
    """Compile the model with torch.compile."""
    deterministic: bool = False
    """Use only deterministic kernels on CUDA (slower). The CPU always does."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When the loss or the gradient of a step is not finite: stop, or leave its update out and go on."""
    max_skips: PositiveInt = 10
    """Updates that a run may leave out; the next one stops it."""

    on_spike: Literal["ignore", "rollback"] = "ignore"
    """rollback: when the loss jumps, go back to the newest checkpoint that checkpoint.every asked for, and leave out
    the rows since then."""
    spike_deviations: PositiveFloat = 6.0
    """rollback: a jump is a loss of so many standard deviations above the mean of the last 64."""
    max_rollbacks: PositiveInt = 3
    """rollback: so many in a run; the next jump stops it."""
    max_minutes: PositiveFloat | None = None
    """Save and stop, as on SIGTERM, when the process is so old: a little less than a cluster's time limit."""
    hang_minutes: PositiveFloat = 10.0
    """End all ranks when one makes no progress for so long; start-up, compiling and saving have six times as long."""

    @property
    def rounds_residual(self) -> bool:
        """Whether the residual stream is in bf16."""
        return {"fp32": False, "bf16": True}[self.residual]

    @property
    def allowed_skips(self) -> int:
        """Updates that a run may leave out."""
        return {"stop": 0, "skip": self.max_skips}[self.on_nonfinite]

    @property
    def rolls_back(self) -> bool:
        """Whether a jump of the loss sends the run back."""
        return {"ignore": False, "rollback": True}[self.on_spike]

    def clashes(self) -> list[Clash]:
        """Exactly one length; nothing that has no effect."""
        found = []
        if (self.steps is None) == (self.tokens is None):
            text = "give exactly one of steps and tokens; a flag takes the other back: --train.steps null"
            found.append(clash(text, "steps", "tokens"))
        if self.on_nonfinite == "stop" and self._changed("max_skips"):
            found.append(clash("max_skips has no effect with on_nonfinite stop", "max_skips", "on_nonfinite"))
        if self.on_spike == "ignore":
            idle = [key for key in ("spike_deviations", "max_rollbacks") if self._changed(key)]
            found += [clash(f"{key} has no effect with on_spike ignore", key, "on_spike") for key in idle]
        return found


class ParallelConfig(Section):
    """How ranks share the work."""

    strategy: Literal["auto", "single", "ddp", "fsdp", "hsdp"] = "auto"
    """ddp: a replica per rank. fsdp: weights, gradients and moments divided among ranks. hsdp: divided within groups of
    ranks, replicated over groups. auto: single for one process, else the first of ddp, hsdp, fsdp that fits."""
    shard_ranks: PositiveInt | None = None
    """hsdp: ranks that share a replica; they divide the number of ranks. Default: those of one node."""
    reshard_after_forward: bool = True
    """fsdp, hsdp: let go of a block's weights between its forward and its backward pass. false: faster, more memory."""
    prefetch: PositiveInt = 1
    """fsdp, hsdp: blocks whose weights are gathered ahead of the one that computes."""
    sync_every_micro_batch: bool = False
    """fsdp, hsdp: sum gradients over ranks in each micro-batch, not once per step, and keep a part of them between."""
    cpu_offload: bool = False
    """fsdp, hsdp on CUDA: weights, gradients and moments live in the host's memory, where the optimizer runs (slow)."""
    bucket_mb: PositiveFloat = 25.0
    """ddp: megabytes of gradients that are summed over ranks at once, beside the backward pass."""

    def clashes(self) -> list[Clash]:
        """Settings of another strategy. Under auto all may be given, but for what must be meant."""
        sharding = ("reshard_after_forward", "prefetch", "sync_every_micro_batch", "cpu_offload")
        idle: dict[str, tuple[str, ...]] = {
            "auto": ("cpu_offload",),
            "single": ("shard_ranks", "bucket_mb", *sharding),
            "ddp": ("shard_ranks", *sharding),
            "fsdp": ("shard_ranks", "bucket_mb"),
            "hsdp": ("bucket_mb",),
        }
        changed = [key for key in idle[self.strategy] if self._changed(key)]
        return [clash(f"{key} has no effect with strategy {self.strategy}", key, "strategy") for key in changed]


class CheckpointConfig(Section):
    """What is kept, and how a run goes on."""

    every: PositiveInt = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: PositiveInt = 2
    """Newest checkpoints to keep."""
    keep_every: PositiveInt | None = None
    """Checkpoints at multiples of this step are kept for ever."""
    folder: str | None = None
    """Where they are kept: a folder or an address of fsspec (s3://, gs://) for this run alone. Default: in run_dir."""
    asynchronous: bool = True
    """Copy what is saved and write it beside training. false: write it at once, which needs no memory for the copy."""
    allow_changes: bool = False
    """Go on with other settings of optimizer and training, datasets or weights than those of the checkpoint."""

    def clashes(self) -> list[Clash]:
        """Checkpoints to keep that would never be written."""
        if self.keep_every is not None and self.keep_every % self.every:
            return [
                clash(f"keep_every {self.keep_every} must be a multiple of every {self.every}", "keep_every", "every")
            ]
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
