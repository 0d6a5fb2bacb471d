"""What only a GPU can show: the CUDA path against the CPU in float64, and its promises.

Run on a machine with a GPU by `python -m pytest tests/test_cuda.py`, and by `python -m benchmarks.gpu`.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.config import Config, ModelConfig
from pipeline.data.loading.blend import Phase
from pipeline.data.loading.loader import Loader, Prefetcher
from pipeline.data.loading.sources import open_sources
from pipeline.generate.decode import Options, generate
from pipeline.model.transformer import Decoder, build_model, initialise
from pipeline.train import parallel as strategies
from pipeline.train.micro_batch import find_micro_batch
from pipeline.train.optim import build_optimizer
from pipeline.train.parallel import Parallel, parallelise
from pipeline.train.runtime import Runtime
from pipeline.train.step import StepResult, Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ROOT = Path(__file__).parent.parent
CUDA = torch.device("cuda")
ROWS, CONTEXT, VOCABULARY = 3, 128, 263
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"norm": "rmsnorm", "position": "rotary", "mlp": "swiglu", "bias": False, "n_kv_heads": 2},
    "windows": {"windows": (32, None), "position": "rotary", "n_kv_heads": 1, "qk_norm": True},
}


def make(**settings: Any) -> Decoder:
    sizes = {"n_layers": 2, "n_heads": 4, "d_model": 64, "context_length": CONTEXT, "init_std": 0.1, **settings}
    model = build_model(ModelConfig.model_validate(sizes), n_tokens=VOCABULARY)
    initialise(model, seed=3)
    return model


def inputs(*, documents: bool) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    found = {"tokens": torch.randint(0, VOCABULARY, (ROWS, CONTEXT), generator=draws)}
    if documents:
        starts = torch.rand(ROWS, CONTEXT, generator=draws) < 0.05
        found["documents"] = starts.cumsum(1)
    return found


def loss_and_gradients(model: Decoder, values: dict[str, torch.Tensor], device: torch.device, **cast: Any) -> Any:
    model = model.to(device, **cast)
    values = {name: tensor.to(device) for name, tensor in values.items()}
    with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda" and cast.get("dtype") is None):
        loss = model(**values, labels=values["tokens"])
    loss.backward()
    gradients = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return loss.double().item(), gradients


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("precision", "close"), [(torch.float32, 1e-4), (None, 3e-2)], ids=["fp32", "bf16"])
def test_loss_and_gradients_are_those_of_float64_on_the_cpu(
    shape: str, documents: bool, precision: torch.dtype | None, close: float
) -> None:
    values = inputs(documents=documents)
    right, right_gradients = loss_and_gradients(make(**SHAPES[shape]), values, torch.device("cpu"), dtype=torch.float64)
    found, gradients = loss_and_gradients(
        make(**SHAPES[shape]), values, CUDA, **({} if precision is None else {"dtype": precision})
    )
    assert found == pytest.approx(right, rel=close)
    for name, gradient in right_gradients.items():
        error = (gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < 3 * close, f"{name}: {error:.2e}"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_changed_document_leaves_the_others_alone(shape: str) -> None:
    """Bit for bit: what a mask hides must not leak through a kernel."""
    model = make(**SHAPES[shape]).to(CUDA).eval()
    documents = torch.zeros(ROWS, CONTEXT, dtype=torch.int64, device=CUDA)
    documents[:, CONTEXT // 2 :] = 1
    before = inputs(documents=False)["tokens"].to(CUDA)
    after = before.clone()
    after[:, : CONTEXT // 2] = (after[:, : CONTEXT // 2] + 1) % VOCABULARY
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        first, second = (model(tokens, documents=documents) for tokens in (before, after))
    assert torch.equal(first[:, CONTEXT // 2 :], second[:, CONTEXT // 2 :])
    assert not torch.equal(first[:, : CONTEXT // 2], second[:, : CONTEXT // 2])


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_text_is_that_of_the_cpu(shape: str) -> None:
    prompts = [[5, 9, 2], list(range(60, 100)), [7], list(range(CONTEXT + 1))]
    options = Options(max_new_tokens=40, temperature=0.0)
    model = make(**SHAPES[shape]).eval()
    expected = [(t.prompt, t.id) for t in generate(model, prompts, options=options)]
    assert [(t.prompt, t.id) for t in generate(model.to(CUDA), prompts, options=options)] == expected


# --- training


def settings(**sections: dict[str, Any]) -> Config:
    values: dict[str, Any] = {
        "data": {"path": "given as it is"},
        "model": {"n_layers": 2, "n_heads": 4, "d_model": 64, "context_length": 64},
        "train": {"steps": 100, "batch_tokens": 64 * 8, "micro_batch": 2, "precision": "fp32", "device": "cuda"},
    }
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys}
    return Config.model_validate(values)


def trainer_of(dataset: Path, config: Config, *, parallel: Parallel | None = None) -> Trainer:
    runtime = Runtime.start(config)
    data = open_sources(config.model_copy(update={"data": config.data.model_copy(update={"path": str(dataset)})}))
    parallel = parallel or parallelise(config, n_tokens=data.vocab_size, runtime=runtime)
    loader = Loader(data.blend([Phase(row=0, sources=data.described())]), config, rank=0, world_size=1)
    optimizer = build_optimizer(parallel.model, config.optim)
    return Trainer(parallel, optimizer, loader=loader, runtime=runtime, config=config)


def run(trainer: Trainer, *, steps: int = 5) -> list[StepResult]:
    return [trainer.step(trainer.loader.batch(8 * n, 8), step=n + 1, lr=1e-3) for n in range(steps)]


def numbers(results: list[StepResult]) -> list[tuple[float, float]]:
    return [(result.loss, result.grad_norm) for result in results]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this one process."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_steps_are_those_of_the_cpu(dataset: Path, precision: str, compiled: bool) -> None:
    cpu = settings(train={"device": "cpu"})
    expected = run(trainer_of(dataset, cpu))
    found = run(trainer_of(dataset, settings(train={"precision": precision, "compile": compiled})))
    close = 1e-4 if precision == "fp32" else 2e-2
    for one, other in zip(found, expected, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=close)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=3 * close)
        assert not one.skipped


def test_ddp_sums_what_one_process_computes(dataset: Path, group: None) -> None:
    """The hook, no_sync and the settling of buckets, on a group of one: two ranks cannot share a GPU."""
    config = settings()
    expected = numbers(run(trainer_of(dataset, config)))
    plain = trainer_of(dataset, config).parallel
    wrapped = strategies._replicate(plain.model, bucket_mb=0.05, device=torch.device("cuda", 0))
    parallel = dataclasses.replace(plain, strategy="ddp", wrapped=wrapped)
    found = numbers(run(trainer_of(dataset, config, parallel=parallel)))
    assert found == pytest.approx(expected, rel=1e-6) or found == expected
    for (loss, norm), (right, right_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(right, rel=1e-6)
        assert norm == pytest.approx(right_norm, rel=1e-6)


@pytest.mark.parametrize("keys", [{}, {"cpu_offload": True}, {"reshard_after_forward": False}], ids=str)
def test_fsdp_on_one_rank_computes_the_same(dataset: Path, group: None, keys: dict[str, Any]) -> None:
    expected = numbers(run(trainer_of(dataset, settings())))
    found = numbers(run(trainer_of(dataset, settings(parallel={"strategy": "fsdp", **keys}))))
    for (loss, norm), (right, right_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(right, rel=1e-5)
        assert norm == pytest.approx(right_norm, rel=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_deterministic_steps_repeat_bit_by_bit(dataset: Path, compiled: bool) -> None:
    config = settings(train={"deterministic": True, "precision": "bf16", "compile": compiled})
    try:
        first, second = (numbers(run(trainer_of(dataset, config))) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert first == second


def test_the_micro_batch_that_is_found_fits(dataset: Path) -> None:
    config = settings(train={"batch_tokens": 64 * 64, "micro_batch": "auto", "precision": "bf16"})
    data = open_sources(config.model_copy(update={"data": config.data.model_copy(update={"path": str(dataset)})}))
    runtime = Runtime.start(config)
    parallel = parallelise(config, n_tokens=data.vocab_size, runtime=runtime)
    blend = data.blend([Phase(row=0, sources=data.described())])

    def loader_of(size: int) -> Loader:
        sized = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": size})})
        return Loader(blend, sized, rank=0, world_size=1)

    assert find_micro_batch(parallel, config, runtime=runtime, loader_of=loader_of) == 64
    assert all(parameter.grad is None for parameter in parallel.model.parameters())


# --- data


def test_batches_are_ahead_on_the_device(dataset: Path) -> None:
    config = settings(data={"document_mask": True})
    loader = trainer_of(dataset, config).loader

    def schedule(step: int) -> tuple[int, int]:
        return (step - 1) * 8, 8

    with Prefetcher(loader, schedule=schedule, first_step=1, device=CUDA) as ahead:
        for step, batch in zip(range(1, 20), ahead, strict=False):
            expected = loader.batch(*schedule(step))
            for part, right in zip(batch.micro_batches, expected.micro_batches, strict=True):
                assert part.labels.is_cuda
                assert part.targets == right.targets
                assert torch.equal(part.labels.cpu(), right.labels)
                assert {name: t.cpu().tolist() for name, t in part.inputs.items()} == {
                    name: t.tolist() for name, t in right.inputs.items()
                }


# --- libraries


def test_segments_of_memory_can_grow() -> None:
    """The setting is read while torch is imported, so it is looked at in a process of its own."""
    code = (
        "from pipeline.train.processes.launched import prepare_allocator; prepare_allocator(); import torch; "
        "torch.zeros(1, device='cuda'); "
        "print(torch.cuda.memory._snapshot()['allocator_settings']['expandable_segments'])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTORCH_")}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "True"
