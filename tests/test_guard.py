"""What must not be learned from: numbers that are not finite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import Config
from pipeline.data.loading.blend import Phase
from pipeline.data.loading.loader import Loader
from pipeline.data.loading.sources import open_sources
from pipeline.errors import UserError
from pipeline.train.guard import refuse_update
from pipeline.train.processes.pulse import Elsewhere
from tests.support import tiny_settings


@pytest.fixture
def loader(dataset: Path, tmp_path: Path) -> Loader:
    config = Config.model_validate(tiny_settings(dataset, tmp_path, train={"micro_batch": 2}))
    data = open_sources(config)
    return Loader(data.blend([Phase(row=0, sources=data.described())]), config, rank=0, world_size=1)


def refusal(loader: Loader, *, loss: float, norm: float, losses: list[float]) -> UserError:
    batch: Any = loader.batch(0, 8)
    assert len(batch.micro_batches) == len(losses) == 4
    with pytest.raises(UserError) as caught:
        refuse_update(loss, norm, torch.tensor(losses), batch=batch, step=3, loader=loader)
    return caught.value


def test_only_the_documents_of_the_bad_micro_batch_are_named(loader: Loader) -> None:
    error = str(refusal(loader, loss=math.nan, norm=1.0, losses=[1.0, math.nan, 1.0, 1.0]))
    rows = loader.batch(0, 8).rows[1].tolist()
    assert error.startswith("step 3: loss nan, gradient norm 1.0. The update was not applied")
    assert f"rows {rows} of the run" in error
    for document in loader.sources(loader.batch(0, 8).rows[1]):
        assert str(document) in error


def test_a_rank_with_finite_losses_leaves_the_telling_to_the_other(loader: Loader) -> None:
    assert isinstance(refusal(loader, loss=math.inf, norm=1.0, losses=[1.0] * 4), Elsewhere)
    assert not isinstance(refusal(loader, loss=math.nan, norm=1.0, losses=[1.0, 1.0, math.nan, 1.0]), Elsewhere)


def test_a_gradient_that_is_not_finite_names_the_whole_batch(loader: Loader) -> None:
    error = refusal(loader, loss=1.0, norm=math.inf, losses=[1.0] * 4)
    assert not isinstance(error, Elsewhere)
    assert "rows [0, 1, 2, 3, 4, 5, 6, 7] of the run" in str(error)
