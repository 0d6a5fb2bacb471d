"""One update against the formula, and what happens when numbers overflow."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipeline.config import Config
from pipeline.data.loading.blend import Phase
from pipeline.data.loading.loader import Loader
from pipeline.data.loading.sources import TrainingData, open_sources
from pipeline.errors import UserError
from pipeline.model.transformer import Decoder, build_model
from pipeline.train.optim import build_optimizer
from pipeline.train.parallel import Parallel, parallelise
from pipeline.train.runtime import Runtime
from pipeline.train.step import Evaluation, LossScale, Trainer, evaluate, naming_memory
from tests.support import make_dataset


def settings(**sections: dict[str, Any]) -> Config:
    values: dict[str, Any] = {
        "data": {"path": "given as it is"},
        "model": {"n_layers": 1, "n_heads": 2, "d_model": 16, "context_length": 32},
        "train": {"steps": 100, "batch_tokens": 256, "micro_batch": 3, "precision": "fp32", "device": "cpu"},
    }
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys}
    return Config.model_validate(values)


def data_of(dataset: Path, config: Config) -> TrainingData:
    data = config.data.model_copy(update={"path": str(dataset)})
    return open_sources(config.model_copy(update={"data": data}))


def make(dataset: Path, config: Config, *, precision: torch.dtype = torch.float32) -> tuple[Decoder, Trainer]:
    runtime = dataclasses.replace(Runtime.start(config), precision=precision)
    data = data_of(dataset, config)
    parallel = parallelise(config, n_tokens=data.vocab_size, runtime=runtime)
    loader = Loader(data.blend([Phase(row=0, sources=data.described())]), config, rank=0, world_size=1)
    optimizer = build_optimizer(parallel.model, config.optim)
    return parallel.model, Trainer(parallel, optimizer, loader=loader, runtime=runtime, config=config)


def evaluated(parallel: Parallel, validation: Any, *, runtime: Runtime, tokens: int | None) -> Evaluation:
    found = evaluate(parallel, validation, runtime=runtime, tokens=tokens)
    assert found is not None
    return found


def test_loss_and_gradient_are_means_over_all_targets(dataset: Path) -> None:
    """Targets differ between micro-batches, so a mean of means would be another number."""
    config = settings(data={"cross_document_targets": False}, optim={"clip_norm": None})
    model, trainer = make(dataset, config)
    batch = trainer.loader.batch(0, 8)
    counts = [part.targets for part in batch.micro_batches]
    assert len(set(counts)) > 1
    reference = build_model(config.model, n_tokens=model.n_tokens).double()
    reference.load_state_dict(model.state_dict())
    tokens = torch.cat([part.inputs["tokens"] for part in batch.micro_batches])
    labels = torch.cat([part.labels for part in batch.micro_batches])
    expected = F.cross_entropy(reference(tokens).flatten(0, 1), labels.flatten())
    expected.backward()
    norm = math.sqrt(sum(float(p.grad.pow(2).sum()) for p in reference.parameters() if p.grad is not None))
    result = trainer.step(batch, step=1, lr=1e-3)
    assert result.targets == sum(counts)
    assert result.loss == pytest.approx(expected.item(), rel=1e-6)
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)


def test_clipping_scales_the_update_and_reports_the_norm_before_it(dataset: Path) -> None:
    _, plain = make(dataset, settings(optim={"clip_norm": None}))
    _, clipped = make(dataset, settings(optim={"clip_norm": 1e-3}))
    batch = plain.loader.batch(0, 8)
    norms = [trainer.step(batch, step=1, lr=1e-3).grad_norm for trainer in (plain, clipped)]
    assert norms[0] == norms[1] > 1e-3
    moments = [
        torch.cat([trainer.optimizer.state[p]["exp_avg"].flatten() for p in trainer.parameters])
        for trainer in (plain, clipped)
    ]
    torch.testing.assert_close(moments[1], moments[0] * (1e-3 / norms[0]), rtol=1e-4, atol=1e-12)


def test_an_update_that_is_not_finite_is_refused_and_changes_nothing(dataset: Path) -> None:
    model, trainer = make(dataset, settings())
    with torch.no_grad():
        model.embedding.tokens.weight[ord("e")] = math.inf
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"step 7: loss nan(.|\n)*corpus\.jsonl, row "):
        trainer.step(trainer.loader.batch(0, 8), step=7, lr=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not trainer.optimizer.state


def test_skipping_leaves_the_update_out_and_counts(dataset: Path) -> None:
    """Once more than `max_skips` stops; what is skipped leaves weights, moments and their count as they were."""
    train: dict[str, Any] = {"on_nonfinite": "skip", "max_skips": 2}
    model, trainer = make(dataset, settings(train=train))
    batch = trainer.loader.batch(0, 8)
    trainer.step(batch, step=1, lr=1e-3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weight = model.embedding.tokens.weight
    for step in (2, 3):
        with torch.no_grad():
            kept = weight[ord("e")].clone()
            weight[ord("e")] = math.inf
        result = trainer.step(batch, step=step, lr=1e-3)
        assert result.skipped
        assert not math.isfinite(result.loss)
        with torch.no_grad():
            weight[ord("e")] = kept
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    result = trainer.step(batch, step=4, lr=1e-3)
    assert (result.skipped, trainer.skipped) == (False, 2)
    assert {int(trainer.optimizer.state[p]["step"]) for p in trainer.parameters} == {2}
    with torch.no_grad():
        weight[ord("e")] = math.inf
    with pytest.raises(UserError, match="step 5"):
        trainer.step(batch, step=5, lr=1e-3)


def test_a_step_tells_that_the_run_was_asked_to_stop(dataset: Path) -> None:
    _, trainer = make(dataset, settings())
    asked: list[bool] = [False, True]
    trainer.stop = lambda: asked.pop(0)
    assert [trainer.step(trainer.loader.batch(0, 8), step=step, lr=1e-3).stop for step in (1, 2)] == [False, True]


def test_fp16_overflow_repeats_the_batch_at_a_smaller_scale(dataset: Path) -> None:
    _, calm = make(dataset, settings(), precision=torch.float16)
    _, wild = make(dataset, settings(), precision=torch.float16)
    wild.load_loss_scale({**calm.loss_scale(), "scale": 2.0**40})
    results = [trainer.step(trainer.loader.batch(0, 8), step=1, lr=1e-3) for trainer in (calm, wild)]
    assert results[1].loss == results[0].loss
    assert results[1].grad_norm == pytest.approx(results[0].grad_norm, rel=1e-2)
    assert 1 < wild.loss_scale()["scale"] < 2.0**40
    for ours, theirs in zip(wild.parameters, calm.parameters, strict=True):
        assert wild.optimizer.state[ours]["step"] == calm.optimizer.state[theirs]["step"] == 1
    again, _ = make(dataset, settings())
    assert not all(torch.equal(a, b) for a, b in zip(again.parameters(), wild.parameters, strict=True))


def test_a_batch_that_no_loss_scale_helps_leaves_it_as_it_was(dataset: Path) -> None:
    model, trainer = make(dataset, settings(train={"on_nonfinite": "skip", "max_skips": 1}), precision=torch.float16)
    before = trainer.loss_scale()
    broken = next(model.parameters()).register_hook(lambda grad: grad * math.nan)
    assert trainer.step(trainer.loader.batch(0, 8), step=1, lr=1e-3).skipped
    assert trainer.loss_scale() == before
    broken.remove()
    assert not trainer.step(trainer.loader.batch(8, 8), step=2, lr=1e-3).skipped


def test_loss_scale_goes_on_where_it_was(dataset: Path) -> None:
    _, first = make(dataset, settings(), precision=torch.float16)
    first.load_loss_scale({**first.loss_scale(), "scale": 2.0**40})
    first.step(first.loader.batch(0, 8), step=1, lr=1e-3)
    _, second = make(dataset, settings(), precision=torch.float16)
    second.load_loss_scale(first.loss_scale())
    assert second.loss_scale() == first.loss_scale()
    _, plain = make(dataset, settings())
    assert plain.loss_scale() == {}


def test_the_loss_scale_goes_up_and_down_by_twos() -> None:
    scale = LossScale()
    for _ in range(1999):
        scale.passed()
    assert scale == LossScale(2.0**16, passes=1999)
    scale.passed()
    assert scale == LossScale(2.0**17, passes=0)
    scale.passed()
    assert scale.lower()
    assert scale == LossScale(2.0**16, passes=0)
    assert not LossScale(1.0).lower()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_running_out_of_memory_names_what_would_fit(error: RuntimeError) -> None:
    with (
        pytest.raises(
            UserError, match=r"micro-batch of 12(.|\n)*train\.micro_batch to 6(.|\n)*full or parallel.strategy fsdp"
        ),
        naming_memory(settings(), rows=12),
    ):
        raise error
    with pytest.raises(UserError, match="micro-batch of 1") as told, naming_memory(settings(), rows=1):
        raise error
    assert "micro_batch" not in str(told.value)
    with pytest.raises(RuntimeError, match="another"), naming_memory(settings(), rows=1):
        raise RuntimeError("another")


def test_evaluation_is_given_up_between_batches_when_asked_to_stop(dataset: Path) -> None:
    config = settings()
    _, trainer = make(dataset, config)
    validation = data_of(dataset, config).validation(config, rank=0, world_size=1)
    asked: list[bool] = [False, True, True]
    found = evaluate(trainer.parallel, validation, runtime=trainer.runtime, tokens=None, stop=lambda: asked.pop(0))
    assert found is None
    assert asked == [True]
    assert trainer.parallel.model.training


def test_evaluation_is_the_mean_over_every_validation_token(dataset: Path) -> None:
    config = settings()
    model, trainer = make(dataset, config)
    data = data_of(dataset, config)
    validation = data.validation(config, rank=0, world_size=1)
    found = evaluated(trainer.parallel, validation, runtime=trainer.runtime, tokens=None)
    split = data.sources[0].dataset.split("val")
    stream = torch.from_numpy(split.tokens(0, split.n_tokens).astype("int64"))
    nats, targets = 0.0, 0
    for start in range(0, len(stream) - 1, 32):  # one window at a time
        window = stream[start : start + 33]
        logits = model(window[None, :-1])[0].double()
        nats += F.cross_entropy(logits, window[1:], reduction="sum").item()
        targets += len(window) - 1
    assert targets == found.targets == split.n_tokens - 1
    assert found.loss == pytest.approx(nats / targets, rel=1e-6)
    in_bytes = found.loss / math.log(2) * split.n_tokens / split.text_bytes
    assert found.bits_per_byte == pytest.approx(in_bytes)
    part = evaluated(trainer.parallel, validation, runtime=trainer.runtime, tokens=100)
    assert part.targets == 128  # whole windows
    assert model.training


def test_packed_evaluation_is_every_document_alone(dataset: Path) -> None:
    """With positions and attention within documents, packing changes nothing: against one document at a time."""
    data: dict[str, Any] = {"plan": "pack", "document_mask": True}
    config = settings(data=data, model={"context_length": 1024}, train={"batch_tokens": 8192})
    model, trainer = make(dataset, config)
    opened = data_of(dataset, config)
    found = evaluated(
        trainer.parallel, opened.validation(config, rank=0, world_size=1), runtime=trainer.runtime, tokens=None
    )
    split = opened.sources[0].dataset.split("val")
    nats, targets, start = 0.0, 0, 0
    for length in split.lengths.tolist():
        document = torch.from_numpy(split.tokens(start, start + length).astype("int64"))
        nats += F.cross_entropy(model(document[None, :-1])[0].double(), document[1:], reduction="sum").item()
        targets, start = targets + length - 1, start + length
    assert found.targets == targets
    assert found.loss == pytest.approx(nats / targets, rel=1e-5)


def test_evaluation_of_a_blend_weighs_targets_and_names_each(dataset: Path, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "other", documents=60, seed=4)
    sources = [{"path": str(folder)} for folder in (dataset, other)]
    config = settings(data={"path": None, "sources": sources})
    _, trainer = make(dataset, settings())
    sets = open_sources(config).validation(config, rank=0, world_size=1)
    together = evaluated(trainer.parallel, sets, runtime=trainer.runtime, tokens=None)
    alone = [evaluated(trainer.parallel, [one], runtime=trainer.runtime, tokens=None) for one in sets]
    assert together.sources == {"dataset": alone[0].loss, "other": alone[1].loss}
    assert together.targets == sum(one.targets for one in alone)
    assert together.loss == pytest.approx(sum(one.loss * one.targets for one in alone) / together.targets)
    text = [one.loss * one.targets / math.log(2) / one.bits_per_byte for one in alone]
    assert together.bits_per_byte == pytest.approx(together.loss * together.targets / math.log(2) / sum(text))


def test_dropout_depends_on_seed_and_step_alone(dataset: Path) -> None:
    config = settings(model={"dropout": 0.3})
    losses = []
    for disturbed in (False, True):
        _, trainer = make(dataset, config)
        if disturbed:
            torch.manual_seed(99)
        losses.append([trainer.step(trainer.loader.batch(0, 8), step=step, lr=1e-9).loss for step in (1, 2)])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]
