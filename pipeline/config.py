"""Every setting of a run: the schema, its defaults and its documentation.

In: a YAML file and command-line overrides. Out: one frozen `Config`, or every fault at once.
The text under a key is its documentation: `--help` and the JSON Schema show it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pipeline.config_data import DataConfig as DataConfig  # part of this schema to all others
from pipeline.config_train import CheckpointConfig as CheckpointConfig
from pipeline.config_train import EvalConfig as EvalConfig
from pipeline.config_train import LogConfig as LogConfig
from pipeline.config_train import ParallelConfig as ParallelConfig
from pipeline.config_train import RampStage as RampStage
from pipeline.config_train import TrainConfig as TrainConfig
from pipeline.credentials import masked
from pipeline.names import CONFIG_NAMES
from pipeline.ramp import Ramp
from pipeline.section import (
    Beta,
    Clash,
    Count,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    clash,
)


class ModelConfig(Section):
    """The architecture. Published sizes: see configs/."""

    family: Literal["decoder"] = "decoder"
    """Which composition of blocks: a decoder (GPT)."""
    vocab_size: PositiveInt | None = None
    """Rows of the token embedding. Default: the tokenizer's size rounded up to a multiple of 64."""
    n_layers: PositiveInt = 12
    """Blocks."""
    n_heads: PositiveInt = 12
    """Query heads."""
    n_kv_heads: PositiveInt | None = None
    """Key/value heads: n_heads is multi-head (default), 1 multi-query, between them grouped-query attention."""
    d_model: PositiveInt = 768
    """Width of the residual stream."""
    d_ff: PositiveInt | None = None
    """Hidden width of the MLP. Default: 4 x d_model."""
    context_length: PositiveInt = 1024
    """Tokens a training sample holds and the model can look back on."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation."""
    norm_position: Literal["pre", "post"] = "pre"
    """Normalise the input of each sublayer (pre) or the sum after it (post, the original Transformer)."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the variance before the square root."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head before the dot product."""
    position: Literal["learned", "rotary", "sinusoidal", "none"] = "learned"
    """How a token knows where it is."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary wavelengths."""
    mlp: Literal["gelu", "gelu_tanh", "swiglu", "relu2"] = "gelu"
    """Activation: exact GELU, its tanh approximation (GPT-2), SwiGLU (Llama) or squared ReLU."""
    bias: bool = True
    """Bias vectors in linear layers and LayerNorm."""
    tie_embeddings: bool = True
    """Use the token embedding as the output head."""
    dropout: Fraction = 0.0
    """Probability of dropping embeddings, attention weights and sublayer outputs in training."""
    windows: Annotated[tuple[PositiveInt | None, ...], Field(min_length=1)] = (None,)
    """Tokens a layer may look back on, itself included; null: all. Repeats over the layers: [256, null] alternates."""
    logit_soft_cap: PositiveFloat | None = None
    """Bound logits smoothly: cap * tanh(logits / cap)."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights; residual outputs get init_std / sqrt(2 n_layers)."""

    @property
    def pre_norm(self) -> bool:
        """Whether sublayers normalise their input."""
        return {"pre": True, "post": False}[self.norm_position]

    @property
    def kv_heads(self) -> int:
        """Key/value heads after defaults."""
        return self.n_kv_heads or self.n_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def hidden(self) -> int:
        """MLP width after defaults."""
        return self.d_ff or 4 * self.d_model

    def embedding_rows(self, n_tokens: int) -> int:
        """Rows of the token embedding for a tokenizer of `n_tokens`."""
        return self.vocab_size or -(-n_tokens // 64) * 64

    def clashes(self) -> list[Clash]:
        """Sizes that do not divide."""
        found = []
        if self.d_model % self.n_heads:
            text = f"d_model {self.d_model} must be a multiple of n_heads {self.n_heads}"
            found.append(clash(text, "d_model", "n_heads"))
        if self.n_heads % self.kv_heads:
            text = f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.kv_heads}"
            found.append(clash(text, "n_heads", "n_kv_heads"))
        if self.position == "rotary" and self.head_dim % 2:
            text = f"rotary positions need an even head width, got d_model / n_heads = {self.head_dim}"
            found.append(clash(text, "position", "d_model", "n_heads"))
        if self.position == "sinusoidal" and self.d_model % 2:
            text = f"sinusoidal positions need an even d_model, got {self.d_model}"
            found.append(clash(text, "position", "d_model"))
        if self.position != "rotary" and self._changed("rope_theta"):
            found.append(clash(f"rope_theta has no effect with position {self.position}", "position", "rope_theta"))
        return found


class ObjectiveConfig(Section):
    """What the model learns to predict."""

    kind: Literal["causal"] = "causal"
    """causal: each token from those before it."""


class OptimConfig(Section):
    """The optimizer and its learning-rate schedule."""

    kind: Literal["adamw"] = "adamw"
    """Optimizer."""
    lr: PositiveFloat = 6e-4
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the schedule."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of AdamW's first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of matrices; vectors (biases, norms) are not decayed."""
    clip_norm: PositiveFloat | None = 1.0
    """Scale gradients down to this global norm; null never clips."""
    schedule: Literal["cosine", "wsd", "linear", "inverse_sqrt", "constant"] = "cosine"
    """Shape after warm-up. wsd: stable, then a linear decay. inverse_sqrt: the original Transformer's (Noam)."""
    warmup_steps: Count | None = None
    """Steps of linear warm-up (default 0)."""
    warmup_tokens: Count | None = None
    """The same in tokens."""
    horizon_steps: PositiveInt | None = None
    """Step at which the schedule ends (default: where training ends). Stopping earlier leaves the schedule alone."""
    horizon_tokens: PositiveInt | None = None
    """The same in tokens."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """wsd only: share of the horizon spent decaying."""

    @property
    def has_horizon(self) -> bool:
        """Whether the schedule goes down to `min_lr` at a horizon."""
        return {"cosine": True, "wsd": True, "linear": True, "inverse_sqrt": False, "constant": False}[self.schedule]

    def clashes(self) -> list[Clash]:
        """One unit per length; a schedule that goes down."""
        found = []
        for length in ("warmup", "horizon"):
            keys = (f"{length}_steps", f"{length}_tokens")
            if all(getattr(self, key) is not None for key in keys):
                found.append(clash(f"give {keys[0]} or {keys[1]}, not both", *keys))
        if self.min_lr > self.lr:
            found.append(clash(f"min_lr {self.min_lr:g} is above the peak lr {self.lr:g}", "min_lr", "lr"))
        if self.schedule != "wsd" and self._changed("decay_fraction"):
            text = f"decay_fraction has no effect with schedule {self.schedule}"
            found.append(clash(text, "schedule", "decay_fraction"))
        if self.schedule == "constant" and self.min_lr:
            text = "min_lr has no effect with schedule constant: set it to 0"
            found.append(clash(text, "schedule", "min_lr"))
        if not self.has_horizon and (self.horizon_steps or self.horizon_tokens):
            text = f"a horizon has no effect with schedule {self.schedule}: set it to null"
            found.append(clash(text, "schedule", "horizon_steps", "horizon_tokens"))
        return found


_LENGTHS = (
    "train.steps", "train.tokens", "train.batch_tokens", "train.batch_ramp", "optim.warmup_steps",
    "optim.warmup_tokens", "optim.horizon_steps", "optim.horizon_tokens", "optim.schedule",
)  # fmt: skip
"""What decides on the lengths of training, warm-up and schedule."""


class Config(Section):
    """A complete run."""

    other_names: ClassVar[Mapping[str, str]] = CONFIG_NAMES

    run_dir: str = "runs/default"
    """Folder of the run: record, curves and checkpoints. With a config file NAME.yaml that names none: runs/NAME."""
    seed: Count = 1337
    """Every random choice of the run is split from this seed."""
    data: DataConfig = DataConfig(path="data/quickstart")
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig(steps=1000)
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

    @property
    def ramp(self) -> Ramp:
        """Tokens of each step's batch."""
        return Ramp(
            tuple((stage.steps, stage.batch_tokens) for stage in self.train.batch_ramp), self.train.batch_tokens
        )

    @property
    def ramp_of_rows(self) -> Ramp:
        """Sequences of each step's batch, over all ranks."""
        context = self.model.context_length
        return Ramp(tuple((steps, tokens // context) for steps, tokens in self.ramp.stages), self.ramp.full // context)

    def rows_of_step(self, step: int) -> tuple[int, int]:
        """First row and number of rows of step `step` (1 is the first), in a run under these settings all along."""
        return self.ramp_of_rows.before(step), self.ramp_of_rows.of(step)

    @property
    def total_steps(self) -> int:
        """Step at which training stops."""
        return self._steps(self.train.steps, self.train.tokens) or 1

    @property
    def warmup(self) -> int:
        """Warm-up in steps."""
        return self._steps(self.optim.warmup_steps, self.optim.warmup_tokens) or 0

    @property
    def horizon(self) -> int:
        """Step at which the learning-rate schedule ends."""
        return self._steps(self.optim.horizon_steps, self.optim.horizon_tokens) or self.total_steps

    def _steps(self, steps: int | None, tokens: int | None) -> int | None:
        return steps if tokens is None else self.ramp.steps(tokens)

    def clashes(self) -> list[Clash]:
        """Contradictions between sections."""
        found = []
        context = self.model.context_length
        stages = {f"batch_ramp.{n}.": stage.batch_tokens for n, stage in enumerate(self.train.batch_ramp)}
        for stage, tokens in {**stages, "": self.train.batch_tokens}.items():
            if tokens % context:
                low = tokens // context * context
                text = (
                    f"train.{stage}batch_tokens {tokens} must be a multiple of model.context_length {context}; "
                    f"nearest: {' or '.join(str(n) for n in (low, low + context) if n)}"
                )
                key = "train.batch_ramp" if stage else "train.batch_tokens"
                found.append(clash(text, key, "model.context_length"))
        if self.train.micro_batch == "auto" and self.model.dropout:
            text = (
                f"train.micro_batch auto with model.dropout {self.model.dropout:g}: masks are drawn per micro-batch, "
                "so the run would depend on the memory of the machine; give a number"
            )
            found.append(clash(text, "train.micro_batch", "model.dropout"))
        return found + self._bad_lengths()

    def _bad_lengths(self) -> list[Clash]:
        """Lengths that leave no time to warm up or to learn."""
        found: list[Clash] = []
        if (self.train.steps is None) == (self.train.tokens is None):
            return found  # the section says so itself
        if self.warmup >= self.horizon and self.optim.schedule != "constant":
            text = f"warm-up of {self.warmup} steps leaves nothing of the horizon of {self.horizon} steps"
            found.append(clash(text, *_LENGTHS))
        stable = self.horizon * (1 - self.optim.decay_fraction)
        if self.optim.schedule == "wsd" and self.warmup > stable:
            text = f"warm-up of {self.warmup} steps reaches into the decay, which begins after {stable:.0f}"
            found.append(clash(text, *_LENGTHS, "optim.decay_fraction"))
        at_zero = self.total_steps - self.horizon + 1
        decays = self.optim.has_horizon and self.optim.min_lr == 0
        if decays and at_zero > max(1, self.total_steps // 100):
            text = (
                f"the learning rate would be 0 for {at_zero} of {self.total_steps} steps: raise optim.min_lr, "
                f"or the horizon ({self.horizon} steps) to the length of training; a run that has begun takes that "
                "with checkpoint.allow_changes true"
            )
            found.append(clash(text, *_LENGTHS, "optim.min_lr"))
        return found


def resolved(config: Config) -> dict[str, Any]:
    """Plain nested dict of every setting, as written to a run's config.yaml: without the credentials of addresses."""
    values: dict[str, Any] = masked(config.model_dump(mode="json"))
    return values


if __name__ == "__main__":  # the JSON Schema with which editors complete and check the YAML files
    json.dump(Config.model_json_schema(), sys.stdout, indent=2)
    print()
