from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pipeline.config import Config, ModelConfig
from pipeline.model.transformer import build_model
from pipeline.train.optim import build_optimizer, learning_rate


def config(schedule: str, **optim: Any) -> Config:
    min_lr = 0.0 if schedule == "constant" else 0.1
    settings = {"lr": 1.0, "min_lr": min_lr, "schedule": schedule, "warmup_steps": 10, **optim}
    return Config.model_validate({"optim": settings, "train": {"steps": 110}})


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "inverse_sqrt", "constant"])
def test_warm_up_is_linear_and_ends_at_the_peak(schedule: str) -> None:
    rates = [learning_rate(step, config(schedule)) for step in range(1, 11)]
    assert rates == pytest.approx([step / 10 for step in range(1, 11)])


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [
        ("cosine", 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)), 0.1),
        ("linear", 0.55, 0.1),
        ("wsd", 1.0, 0.1),
        ("inverse_sqrt", math.sqrt(10 / 60), math.sqrt(10 / 110)),
        ("constant", 1.0, 1.0),
    ],
)
def test_shape_after_warm_up(schedule: str, middle: float, last: float) -> None:
    assert learning_rate(60, config(schedule)) == pytest.approx(middle)
    assert learning_rate(110, config(schedule)) == pytest.approx(last)


def test_decays_hold_their_minimum_past_the_horizon() -> None:
    for schedule in ("cosine", "linear", "wsd"):
        assert learning_rate(10_000, config(schedule)) == pytest.approx(0.1)


def test_wsd_is_stable_until_its_decay() -> None:
    chosen = config("wsd", decay_fraction=0.5)
    assert [learning_rate(step, chosen) for step in (10, 55)] == [1.0, 1.0]
    assert learning_rate(56, chosen) < 1.0


def test_horizon_is_separate_from_the_last_step() -> None:
    short = Config.model_validate({"optim": {"lr": 1.0, "horizon_steps": 100}, "train": {"steps": 10}})
    long = Config.model_validate({"optim": {"lr": 1.0, "horizon_steps": 100}, "train": {"steps": 100}})
    assert [learning_rate(s, short) for s in range(1, 11)] == [learning_rate(s, long) for s in range(1, 11)]


def test_matches_the_cosine_of_torch() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=110, eta_min=0.1)
    chosen = config("cosine", warmup_steps=0)
    for step in range(1, 111):
        optimizer.step()
        reference.step()
        assert learning_rate(step, chosen) == pytest.approx(reference.get_last_lr()[0], rel=1e-6)


def test_groups_cover_every_parameter_once_and_only_matrices_decay() -> None:
    model = build_model(ModelConfig(n_layers=2, n_heads=2, d_model=16), n_tokens=10)
    optimizer = build_optimizer(model, Config().optim)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert {p.dim() for p in optimizer.param_groups[0]["params"]} == {2}
    assert {p.dim() for p in optimizer.param_groups[1]["params"]} == {1}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
