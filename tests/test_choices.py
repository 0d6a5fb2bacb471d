"""Every value of a key that offers a choice does something of its own, and a value without a branch is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from accelerate.utils import LoggerType
from pydantic import BaseModel

from pipeline.config import Config, ModelConfig
from pipeline.data.dataset import open_dataset
from pipeline.data.exchange.foreign_files import open_file
from pipeline.data.loading.objectives import make_batch
from pipeline.data.loading.rows import Rows
from pipeline.data.loading.sources import make_plan
from pipeline.errors import UserError
from pipeline.model.transformer import Block, build_model, initialise
from pipeline.train.memory import activation_bytes
from pipeline.train.optim import build_optimizer, learning_rate
from pipeline.train.parallel import adapt_blocks, choose, shards_of
from pipeline.train.runtime import _device_type, _matmul_precision, _precision

BASE = Config.model_validate(
    {
        "model": {"n_layers": 2, "n_heads": 2, "d_model": 16, "context_length": 32, "init_std": 0.5},
        "optim": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 4},
        "train": {"steps": 40, "batch_tokens": 64},
    }
)
NOT_A_CHOICE = {"train.micro_batch"}
"""A number, or auto: tests/test_micro_batch.py."""
SAME = {
    "train.precision": {"auto"},  # stands for one of the others
    "train.device": {"auto"},
    "parallel.strategy": {"auto"},
}


def choices(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(section.key, values) of every key whose type names its values."""
    for key, field in schema.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from choices(annotation, f"{prefix}{key}.")
            continue
        values = [value for part in parts(annotation) if get_origin(part) is Literal for value in get_args(part)]
        if values:
            yield f"{prefix}{key}", tuple(values)


def parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        if not isinstance(part, str):
            yield from parts(part)


CHOICES = {key: values for key, values in choices(Config) if key not in NOT_A_CHOICE}


def with_value(key: str, value: Any) -> Config:
    """The base config with one key changed and nothing checked, so that a value of tomorrow can be tried today."""
    section, name = key.split(".")
    changed = getattr(BASE, section).model_copy(update={name: value})
    return BASE.model_copy(update={section: changed})


def loss(config: Config, _: Path) -> float:
    """Of a model with the seeded weights, on fixed tokens."""
    torch.manual_seed(0)
    model = build_model(ModelConfig.model_construct(**config.model.model_dump()), n_tokens=50).double()
    initialise(model, seed=1)
    tokens = torch.arange(64).reshape(2, 32) * 7 % 50
    return float(model(tokens, labels=(tokens + 3) % 50).detach()) / 64


def rates(config: Config, _: Path) -> tuple[float, ...]:
    return tuple(learning_rate(step, config) for step in range(1, 41))


def optimizer(config: Config, _: Path) -> str:
    return type(build_optimizer(torch.nn.Linear(2, 2), config.optim)).__name__


def labels(config: Config, _: Path) -> list[int]:
    tokens = np.arange(8)[None]
    rows = Rows(tokens=tokens, labels=tokens + 1, documents=None, positions=None)
    batch = make_batch(rows, objective=config.objective, data=config.data)
    return [batch.targets, *batch.labels.flatten().tolist()]


def rows_of_plan(config: Config, dataset: Path) -> int:
    return make_plan(open_dataset(dataset).split("train"), config, digest="a").rows


def type_of_ids(config: Config, dataset: Path) -> str:
    path = dataset.parent / "bare.bin"
    path.write_bytes(np.arange(1, 9, dtype="<u2").tobytes())
    return open_file(path, dtype=config.data.dtype, eos_id=0).dtype.name


def recomputation(config: Config, _: Path) -> tuple[str, int]:
    model = build_model(config.model, n_tokens=50)
    adapt_blocks(model, checkpointing=config.train.activation_checkpointing, compiled=False)
    (block,) = list(model.stack.blocks)[:1]
    assert isinstance(block, Block)
    return block.forward.__name__, activation_bytes(config, n_tokens=50, precision=torch.float32)


def strategy(config: Config, _: Path) -> tuple[str, int]:
    """On four ranks of two nodes; single is refused there."""
    ranks: Any = SimpleNamespace(world_size=4, local_world_size=2)
    found, _reason = choose(
        config, parameters=100, largest=10, n_tokens=50, memory=None, world_size=4, local_world_size=2
    )
    return found, shards_of(found, config.parallel, runtime=ranks)


OUTCOMES: dict[str, Callable[[Config, Path], Any]] = {
    "data.dtype": type_of_ids,
    "data.plan": rows_of_plan,
    "model.family": loss,
    "model.norm": loss,
    "model.norm_position": loss,
    "model.position": loss,
    "model.mlp": loss,
    "objective.kind": labels,
    "optim.kind": optimizer,
    "optim.schedule": rates,
    "train.activation_checkpointing": recomputation,
    "train.precision": lambda config, _: (_precision(config.train, "cuda"), _matmul_precision(config.train)),
    "train.residual": lambda config, _: activation_bytes(config, n_tokens=50, precision=torch.bfloat16),
    "train.device": lambda config, _: _device_type(config.train),
    "train.on_nonfinite": lambda config, _: config.train.allowed_skips,
    "train.on_spike": lambda config, _: config.train.rolls_back,
    "parallel.strategy": strategy,
    "log.trackers": lambda config, _: [LoggerType(name) for name in np.atleast_1d(config.log.trackers).tolist()],
}
"""What a key decides: a loss, a learning rate, or another outcome."""


@pytest.fixture(autouse=True)
def _a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA, as far as it is asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)


def outcome(key: str, value: Any, dataset: Path) -> Any:
    try:
        return OUTCOMES[key](with_value(key, value), dataset)
    except UserError as refusal:
        return str(refusal)


def test_every_key_with_a_choice_has_an_outcome_to_compare() -> None:
    assert CHOICES.keys() == OUTCOMES.keys()


@pytest.mark.parametrize("key", CHOICES)
def test_every_value_changes_the_outcome(key: str, dataset: Path) -> None:
    values = [value for value in CHOICES[key] if value not in SAME.get(key, set())]
    found = {value: outcome(key, value, dataset) for value in values}
    repeated = [(a, b) for a in values for b in values if a < b and found[a] == found[b]]
    assert repeated == []


@pytest.mark.parametrize("key", SAME)
def test_auto_stands_for_another_value(key: str, dataset: Path) -> None:
    others = [outcome(key, value, dataset) for value in CHOICES[key] if value != "auto"]
    assert outcome(key, "auto", dataset) in others


@pytest.mark.parametrize("key", CHOICES)
def test_a_value_without_a_branch_is_never_taken_for_another(key: str, dataset: Path) -> None:
    """What happens on the day on which someone adds a value to the schema and nothing else."""
    with pytest.raises((AssertionError, LookupError, ValueError, TypeError)):
        OUTCOMES[key](with_value(key, "unheard_of"), dataset)
