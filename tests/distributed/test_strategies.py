"""Every strategy on any number of ranks computes the same run: against a plain loop in float64 that knows no rank.

Ranks are started once for each number of them and run all cases (`cases` below); the tests look at what they found.
On a machine with GPUs the same is asked of CUDA, on as many ranks as there are GPUs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from pipeline.config import Config
from pipeline.data.loading.blend import Phase
from pipeline.data.loading.loader import Loader
from pipeline.data.loading.sources import TrainingData, open_sources
from pipeline.errors import UserError
from pipeline.model.transformer import build_model, initialise
from pipeline.train import parallel as strategies
from pipeline.train.memory import activation_bytes
from pipeline.train.micro_batch import FILLED, find_micro_batch
from pipeline.train.optim import build_optimizer
from pipeline.train.parallel import Parallel, held_rows, parallelise
from pipeline.train.processes.job import Job
from pipeline.train.processes.launched import read_launch
from pipeline.train.runtime import Runtime
from pipeline.train.step import Evaluation, Trainer, evaluate
from tests.support import FORKS

STEPS, ROWS, LR, CLIP = 20, 7, 1e-3, 0.5
PRECISIONS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
# Sizes that no number of ranks divides: 263 tokens, 18 channels; head norms of 3 numbers leave one of 4 ranks without.
MODEL = {
    "n_layers": 2, "n_heads": 6, "d_model": 18, "context_length": 32, "vocab_size": 263, "qk_norm": True,
}  # fmt: skip


def settings(strategy: str = "auto", **sections: dict[str, Any]) -> Config:
    """7 rows a step; targets differ between them, and every step is clipped."""
    train = {"steps": 100, "batch_tokens": 32 * ROWS, "micro_batch": 8, "precision": "fp64", "device": "auto"}
    values: dict[str, Any] = {
        "data": {"path": "given as it is", "cross_document_targets": False},
        "model": MODEL,
        "optim": {"clip_norm": CLIP},
        "train": train,
        "parallel": {"strategy": strategy},
    }
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys}
    return Config.model_validate(values)


def data_of(dataset: Path, config: Config) -> TrainingData:
    return open_sources(config.model_copy(update={"data": config.data.model_copy(update={"path": str(dataset)})}))


# --- the reference: no wrapper, no rank, no micro-batch


@functools.cache
def reference(dataset: Path) -> tuple[list[float], list[float], dict[str, np.ndarray[Any, Any]]]:
    """Loss and gradient norm of each step, and the last weights."""
    config = settings()
    data = data_of(dataset, config)
    loader = Loader(data.blend([Phase(row=0, sources=data.described())]), config, rank=0, world_size=1)
    model = build_model(config.model, n_tokens=data.vocab_size)
    initialise(model, seed=config.seed)
    model.double()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    losses, norms = [], []
    for step in range(STEPS):
        (batch,) = loader.batch(step * ROWS, ROWS).micro_batches
        loss = F.cross_entropy(model(batch.inputs["tokens"]).flatten(0, 1), batch.labels.flatten())
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.pow(2).sum()) for p in parameters if p.grad is not None))
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad *= min(1.0, CLIP / norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        norms.append(norm)
    return losses, norms, {name: p.detach().numpy() for name, p in model.named_parameters()}


# --- what each rank does


class Rank:
    """One process; made once, for all cases."""

    def __init__(self, dataset: Path, device: str) -> None:
        self.dataset = dataset
        config = settings("fsdp", train={"device": device})  # so that one process has a group, too
        self.runtime = Runtime.start(config, Job(read_launch(), watched=False))

    def trainer(self, config: Config, *, local: int | None = None) -> Trainer:
        runtime = dataclasses.replace(
            self.runtime,
            precision=PRECISIONS[config.train.precision],
            local_world_size=self.runtime.local_world_size if local is None else local,
        )
        data = data_of(self.dataset, config)
        parallel = parallelise(config, n_tokens=data.vocab_size, runtime=runtime)
        blend = data.blend([Phase(row=0, sources=data.described())])
        loader = Loader(blend, config, rank=runtime.rank, world_size=runtime.world_size)
        optimizer = build_optimizer(parallel.model, config.optim)
        return Trainer(parallel, optimizer, loader=loader, runtime=runtime, config=config)

    def evaluated(self, trainer: Trainer, config: Config) -> float:
        runtime = trainer.runtime
        validation = data_of(self.dataset, config).validation(config, rank=runtime.rank, world_size=runtime.world_size)
        found = evaluate(trainer.parallel, validation, runtime=runtime, tokens=None)
        assert isinstance(found, Evaluation)
        return found.loss

    def run(self, config: Config, *, steps: int = STEPS, local: int | None = None) -> dict[str, Any]:
        """Train; evaluate in the middle, which must leave no trace."""
        trainer = self.trainer(config, local=local)
        found: dict[str, Any] = {"first": whole(trainer.parallel), "losses": [], "norms": [], "rows": [], "why": None}
        found["held"] = {name: held_rows(p)[1] for name, p in trainer.parallel.model.named_parameters()}
        found["strategy"] = trainer.parallel.strategy
        for step in range(1, steps + 1):
            batch = trainer.loader.batch((step - 1) * ROWS, ROWS)
            found["rows"].append([row for part in batch.rows for row in part.tolist()])
            result = trainer.step(batch, step=step, lr=LR)
            found["losses"].append(result.loss)
            found["norms"].append(result.grad_norm)
            if step == steps // 2:
                found["validation"] = self.evaluated(trainer, config)
                # what a checkpoint of this step would see: shards again, not what the evaluation gathered
                found["shards"] = {isinstance(p, DTensor) for p in trainer.parallel.model.parameters()}
        found["last"] = whole(trainer.parallel)
        return found


def whole(parallel: Parallel) -> dict[str, np.ndarray[Any, Any]]:
    """All weights, gathered from the ranks that hold them."""
    parameters = parallel.model.named_parameters()
    gathered = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in parameters}
    return {name: value.detach().cpu().numpy().copy() for name, value in gathered.items()}


def cases(rank: Rank) -> dict[Any, Any]:
    world = rank.runtime.world_size
    found: dict[Any, Any] = {}
    for strategy, precision, micro in product(strategies_for(world), ("fp64", "fp32"), (1, 8)):
        config = settings(strategy, train={"precision": precision, "micro_batch": micro})
        found[strategy, precision, micro] = rank.run(config, local=2 if strategy == "hsdp" else None)
    if world == 4:
        found["patience"] = patience_of_groups(rank)
        return found
    for strategy in strategies_for(world):
        found["bf16", strategy] = rank.run(settings(strategy, train={"precision": "bf16"}), steps=2)
    if world == 2:
        found.update(cases_of_two(rank))
    return found


def strategies_for(world: int) -> tuple[str, ...]:
    return {1: ("single", "fsdp"), 4: ("ddp", "fsdp", "hsdp")}.get(world, ("ddp", "fsdp"))


def cases_of_two(rank: Rank) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for every in (False, True):
        sharding = {"sync_every_micro_batch": every, "reshard_after_forward": every, "prefetch": 1 + every}
        config = settings("fsdp", train={"micro_batch": 1}, parallel=sharding)
        with counted_reductions() as count:
            found["every", every] = {**rank.run(config, steps=2), "reductions": count}
    with counted_reductions() as count:
        found["ddp", "count"] = {**rank.run(settings("ddp", train={"micro_batch": 1}), steps=2), "reductions": count}
    for strategy, checkpointing in product(("ddp", "fsdp"), ("none", "selective", "full")):
        config = settings(
            strategy, model={"dropout": 0.1}, train={"activation_checkpointing": checkpointing, "micro_batch": 2}
        )
        found["recomputed", strategy, checkpointing] = rank.run(config, steps=3)
    found["compiled"] = compiled(rank)
    found["cut"] = {strategy: compiled_pieces(rank, strategy) for strategy in ("ddp", "fsdp")}
    found["in buckets"] = gradients_of_each_micro_batch(rank)
    for strategy in ("ddp", "fsdp"):
        found["skipped", strategy] = one_rank_is_not_finite(rank, strategy)
        found["stopped", strategy] = one_rank_is_asked_to_stop(rank, strategy)
        found["micro_batch", strategy] = micro_batch_of_unequal_ranks(rank, strategy)
    with pytest.raises(UserError, match="hsdp needs groups") as told:
        rank.trainer(settings("hsdp"))
    found["refused"] = str(told.value)
    return found


@contextlib.contextmanager
def counted_reductions() -> Iterator[list[int]]:
    """How many times gradients were summed over ranks: buckets of DDP, groups of FSDP."""
    count = [0]
    dist = torch.distributed
    scatter = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    originals = (strategies._sum, getattr(dist, scatter))

    def counting(original: Any) -> Any:
        def counted(*arguments: Any, **keywords: Any) -> Any:
            count[0] += 1
            return original(*arguments, **keywords)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategies, "_sum", counting(originals[0]))
        patch.setattr(dist, scatter, counting(originals[1]))
        yield count


def compiled(rank: Rank) -> dict[str, Any]:
    """With a compiler that only traces: the real one takes minutes, and the same path. 6 layers, and what they cost."""
    found: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp"):
        torch._dynamo.reset()
        counters.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
            found[strategy] = rank.run(settings(strategy, train={"compile": True}), steps=3)
            trainer = rank.trainer(settings(strategy, model={"n_layers": 6}, train={"compile": True}))
        graphs = []
        for step in (1, 2, 3):
            trainer.step(trainer.loader.batch(0, ROWS), step=step, lr=LR)
            graphs.append(counters["stats"]["unique_graphs"])
        found[f"{strategy} graphs"] = graphs
        found[f"{strategy} breaks"] = sum(counters["graph_break"].values())
    return found


def compiled_pieces(rank: Rank, strategy: str) -> int:
    """What the compiler is asked for when blocks are larger than DDP's first bucket of 1 MB."""
    torch._dynamo.reset()
    pieces: list[int] = []

    def compiler(graph: torch.fx.GraphModule, _: object) -> Any:
        pieces.append(len(graph.graph.nodes))
        return graph.forward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler))
        trainer = rank.trainer(settings(strategy, model={"d_model": 192}, train={"compile": True}))
    trainer.step(trainer.loader.batch(0, ROWS), step=1, lr=LR)
    return len(pieces)


def watched(trainer: Trainer, look: Callable[[], None]) -> None:
    """Let every forward pass of the trainer begin with a `look`."""
    plain = trainer.parallel

    class Watched(Parallel):
        def forward(self, *, labels: Tensor | None = None, **inputs: Tensor) -> Tensor:
            look()
            return super().forward(labels=labels, **inputs)

    trainer.parallel = Watched(**{field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)})


def gradients_of_each_micro_batch(rank: Rank) -> list[tuple[int, bool]]:
    """Before each forward pass under DDP: bytes that gradients lie in, and whether these are those of the first."""
    trainer = rank.trainer(settings("ddp", train={"micro_batch": 1}))
    seen: list[dict[int, int]] = []

    def look() -> None:
        storages = [p.grad.untyped_storage() for p in trainer.parameters if p.grad is not None]
        seen.append({storage.data_ptr(): storage.nbytes() for storage in storages})

    watched(trainer, look)
    for step in (1, 2, 3):
        trainer.step(trainer.loader.batch(0, ROWS), step=step, lr=LR)
    held = sum(p.nbytes for p in trainer.parameters)
    return [(sum(storages.values()) - held, storages == seen[0]) for storages in seen]


def patience_of_groups(rank: Rank) -> list[timedelta]:
    """How long the groups wait that HSDP exchanges in, and for how long they should."""
    trainer = rank.trainer(settings("hsdp"), local=2)
    (mesh,) = {p.device_mesh for p in trainer.parameters if isinstance(p, DTensor)}
    backends = [mesh.get_group(number)._get_backend(rank.runtime.device) for number in range(2)]
    return [*(backend.options._timeout for backend in backends), rank.runtime.patience]


def one_rank_is_not_finite(rank: Rank, strategy: str) -> dict[str, Any]:
    trainer = rank.trainer(settings(strategy, train={"on_nonfinite": "skip", "max_skips": 1, "micro_batch": 2}))
    trainer.step(trainer.loader.batch(0, ROWS), step=1, lr=LR)
    before = whole(trainer.parallel)
    plain = trainer.parallel

    class Poisoned(Parallel):
        def forward(self, *, labels: Tensor | None = None, **inputs: Tensor) -> Tensor:
            return super().forward(labels=labels, **inputs) * (math.inf if rank.runtime.rank == 1 else 1.0)

    trainer.parallel = Poisoned(**{field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)})
    skipped = trainer.step(trainer.loader.batch(ROWS, ROWS), step=2, lr=LR)
    kept = all(np.array_equal(value, before[name]) for name, value in whole(plain).items())
    try:
        trainer.step(trainer.loader.batch(ROWS, ROWS), step=3, lr=LR)
        refused = False
    except UserError:
        refused = True
    trainer.parallel = plain
    plain.clear_gradients()
    after = trainer.step(trainer.loader.batch(2 * ROWS, ROWS), step=4, lr=LR)
    return {"skipped": skipped.skipped, "kept": kept, "refused": refused, "after": (after.loss, after.skipped)}


def one_rank_is_asked_to_stop(rank: Rank, strategy: str) -> dict[str, Any]:
    config = settings(strategy)
    trainer = rank.trainer(config)
    asked = [False]
    trainer.stop = lambda: asked[0] and rank.runtime.rank == 1
    first = trainer.step(trainer.loader.batch(0, ROWS), step=1, lr=LR)
    asked[0] = True
    second = trainer.step(trainer.loader.batch(ROWS, ROWS), step=2, lr=LR)
    validation = data_of(rank.dataset, config).validation(config, rank=rank.runtime.rank, world_size=2)
    given_up = evaluate(trainer.parallel, validation, runtime=trainer.runtime, tokens=None, stop=trainer.stop)
    third = trainer.step(trainer.loader.batch(2 * ROWS, ROWS), step=3, lr=LR)  # nothing is left gathered
    return {"stops": [one.stop for one in (first, second, third)], "given_up": given_up is None}


def micro_batch_of_unequal_ranks(rank: Rank, strategy: str) -> list[float]:
    config = settings(strategy, train={"micro_batch": "auto"})
    number = settings(strategy)
    trainer = rank.trainer(number)

    def loader_of(size: int) -> Loader:
        sized = settings(strategy, train={"micro_batch": size})
        return Loader(trainer.loader.source, sized, rank=rank.runtime.rank, world_size=2)

    held = sum(held_rows(p)[0].nbytes for p in trainer.parameters)
    row = activation_bytes(number, n_tokens=trainer.parallel.model.n_tokens, precision=torch.float64)
    # FSDP holds whole gradients while micro-batches wait for others: with their memory, a second row would fit
    needed = 2.5 * row if strategy == "ddp" else sum(p.nbytes for p in trainer.parameters) + 1.7 * row
    free = 10**9 if rank.runtime.rank == 0 else int((3 * held + needed) / FILLED)
    found = find_micro_batch(trainer.parallel, config, runtime=trainer.runtime, loader_of=loader_of, free=free)
    alone = find_micro_batch(trainer.parallel, config, runtime=trainer.runtime, loader_of=loader_of, free=10**9)
    return [found, alone, sum(p.grad.abs().sum().item() for p in trainer.parameters if p.grad is not None)]


# --- starting them


def work(environment: dict[str, str], dataset: str, device: str, sender: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    try:
        rank = Rank(Path(dataset), device)
        sender.send(cases(rank))
        rank.runtime.barrier()
        rank.runtime.stop()
    except BaseException:
        sender.send(traceback.format_exc())
        raise


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def run_world(world: int, dataset: Path, device: str) -> list[dict[Any, Any]]:
    """What each rank found."""
    common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes, receivers = [], []
    for rank in range(world):
        receiver, sender = FORKS.Pipe(duplex=False)
        environment = {key: str(value) for key, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
        process = FORKS.Process(target=work, args=(environment, str(dataset), device, sender), daemon=True)
        process.start()
        sender.close()
        processes.append(process)
        receivers.append(receiver)
    deadline = time.monotonic() + 300
    try:
        found = [one.recv() if one.poll(max(deadline - time.monotonic(), 0)) else "it hung" for one in receivers]
        assert all(isinstance(one, dict) for one in found), "\n".join(one for one in found if isinstance(one, str))
        return found
    finally:
        for process in processes:
            process.join(20)
            process.kill()


pytestmark = pytest.mark.slow
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]


@pytest.fixture(scope="module", params=DEVICES)
def worlds(request: pytest.FixtureRequest, dataset: Path) -> dict[int, list[dict[Any, Any]]]:
    """What every rank found, by the number of ranks."""
    device = request.param
    sizes = [n for n in (1, 2, 3, 4) if device == "cpu" or n <= torch.cuda.device_count()]
    return {world: run_world(world, dataset, device) for world in sizes}


def matrix(worlds: dict[int, list[dict[Any, Any]]], precision: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every run of the matrix on every rank, with a name."""
    for world, ranks in worlds.items():
        for strategy, micro, rank in product(strategies_for(world), (1, 8), range(world)):
            name = f"{world} ranks, {strategy}, micro-batch {micro}, rank {rank}"
            yield name, ranks[rank][strategy, precision, micro]


# --- what must hold


def test_every_layout_computes_the_reference_in_float64(worlds: dict[int, list[dict[Any, Any]]], dataset: Path) -> None:
    """Loss, gradient norm, clipped updates: what differs in float64 is rounding, far below what a mistake makes."""
    losses, norms, weights = reference(dataset)
    assert min(norms) > CLIP, "every step is clipped"
    for name, found in matrix(worlds, "fp64"):
        assert found["losses"] == pytest.approx(losses, rel=1e-9), name
        assert found["norms"] == pytest.approx(norms, rel=1e-9), name
        for key, expected in weights.items():
            np.testing.assert_allclose(found["last"][key], expected, atol=1e-7, rtol=1e-7, err_msg=f"{name}: {key}")


def test_every_layout_agrees_in_float32(worlds: dict[int, list[dict[Any, Any]]], dataset: Path) -> None:
    """To 1e-6 with one process, over 20 steps."""
    single = worlds[1][0]["single", "fp32", 8]
    losses, norms, _ = reference(dataset)
    assert single["losses"] == pytest.approx(losses, rel=1e-6)
    assert single["norms"] == pytest.approx(norms, rel=1e-5)
    for name, found in matrix(worlds, "fp32"):
        assert found["losses"] == pytest.approx(single["losses"], rel=1e-6), name
        assert found["norms"] == pytest.approx(single["norms"], rel=1e-6), name


def test_validation_is_the_same_everywhere(worlds: dict[int, list[dict[Any, Any]]]) -> None:
    expected = worlds[1][0]["single", "fp64", 8]["validation"]
    for name, found in matrix(worlds, "fp64"):
        assert found["validation"] == pytest.approx(expected, rel=1e-9), name
    for name, found in matrix(worlds, "fp32"):
        assert found["validation"] == pytest.approx(expected, rel=1e-6), name


def test_initial_weights_are_the_same_bits_everywhere(worlds: dict[int, list[dict[Any, Any]]]) -> None:
    expected = worlds[1][0]["single", "fp32", 8]["first"]
    for precision in ("fp64", "fp32"):
        for name, found in matrix(worlds, precision):
            assert found["first"].keys() == expected.keys(), name
            for key, value in found["first"].items():
                assert np.array_equal(value, expected[key].astype(value.dtype)), (name, key)


def test_each_row_is_trained_on_by_one_rank(worlds: dict[int, list[dict[Any, Any]]]) -> None:
    for world, ranks in worlds.items():
        for strategy, micro in product(strategies_for(world), (1, 8)):
            for step in range(STEPS):
                rows = [row for rank in ranks for row in rank[strategy, "fp32", micro]["rows"][step]]
                assert sorted(rows) == list(range(step * ROWS, (step + 1) * ROWS))


def test_each_rank_holds_its_rows_and_no_more(worlds: dict[int, list[dict[Any, Any]]]) -> None:
    for world, ranks in worlds.items():
        for strategy in strategies_for(world):
            shards = {"fsdp": world, "hsdp": 2}.get(strategy, 1)
            assert ranks[0][strategy, "fp32", 8]["shards"] == {strategy in ("fsdp", "hsdp")}, (world, strategy)
            for name, value in ranks[0][strategy, "fp32", 8]["first"].items():
                expected = [len(chunk) for chunk in torch.arange(value.shape[0]).chunk(shards)]
                expected += [0] * (shards - len(expected))
                for number, rank in enumerate(ranks):
                    held = rank[strategy, "fp32", 8]["held"][name]
                    assert len(held) == expected[number % shards], (world, strategy, name)
                    assert held.start == sum(expected[: number % shards]) or not held
    if 4 in worlds:
        assert 0 in {len(held) for held in worlds[4][3]["fsdp", "fp32", 8]["held"].values()}, "a rank without rows"


def test_bf16_differs_by_the_rounding_of_norm_weights_alone(worlds: dict[int, list[dict[Any, Any]]]) -> None:
    """Of the first step there is no difference: norm weights are still 1."""
    for world, ranks in worlds.items():
        if world == 4:
            continue
        plain, sharded = (ranks[0]["bf16", strategy] for strategy in strategies_for(world))
        assert sharded["losses"][0] == pytest.approx(plain["losses"][0], rel=1e-6)
        assert sharded["norms"][0] == pytest.approx(plain["norms"][0], rel=1e-5)
        assert sharded["losses"][1] == pytest.approx(plain["losses"][1], rel=1e-3)


def two(worlds: dict[int, list[dict[Any, Any]]]) -> list[dict[Any, Any]]:
    if 2 not in worlds:
        pytest.skip("needs two GPUs")
    return worlds[2]


def test_gradients_are_summed_once_per_step(worlds: dict[int, list[dict[Any, Any]]], dataset: Path) -> None:
    """4 micro-batches, 2 steps, 3 groups of weights under FSDP; one bucket under DDP, twice more to settle it."""
    losses, norms, _ = reference(dataset)
    for rank in two(worlds):
        counts = {key: rank[key]["reductions"][0] for key in (("ddp", "count"), ("every", False), ("every", True))}
        assert counts == {("ddp", "count"): 2 + 2, ("every", False): 2 * 3, ("every", True): 2 * 3 * 4}
        for key in counts:
            assert rank[key]["losses"] == pytest.approx(losses[:2], rel=1e-9)
            assert rank[key]["norms"] == pytest.approx(norms[:2], rel=1e-9)


def test_recomputing_activations_changes_no_bit_under_wrappers(worlds: dict[int, list[dict[Any, Any]]]) -> None:
    for rank, strategy in product(two(worlds), ("ddp", "fsdp")):
        plain = rank["recomputed", strategy, "none"]
        assert plain["losses"] == pytest.approx(rank["recomputed", "ddp", "none"]["losses"], rel=1e-9)
        for kind in ("selective", "full"):
            found = rank["recomputed", strategy, kind]
            assert (found["losses"], found["norms"]) == (plain["losses"], plain["norms"])
            assert all(np.array_equal(value, plain["last"][name]) for name, value in found["last"].items())


def test_compiled_blocks_compute_the_same_without_a_break(
    worlds: dict[int, list[dict[Any, Any]]], dataset: Path
) -> None:
    losses, norms, _ = reference(dataset)
    for rank in two(worlds):
        found = rank["compiled"]
        for strategy in ("ddp", "fsdp"):
            assert found[strategy]["losses"] == pytest.approx(losses[:3], rel=1e-9)
            assert found[strategy]["norms"] == pytest.approx(norms[:3], rel=1e-9)
            assert found[strategy]["last"].keys() == rank["ddp", "fp64", 8]["last"].keys()
            assert found[f"{strategy} breaks"] == 0
            assert len(set(found[f"{strategy} graphs"])) == 1, "6 layers run what 2 have compiled"
            assert found[f"{strategy} graphs"][0] <= 8  # block and loss, training and evaluation, two sizes of batches


def test_blocks_are_compiled_whole_under_ddp(worlds: dict[int, list[dict[Any, Any]]]) -> None:
    for rank in two(worlds):
        assert rank["cut"]["ddp"] == rank["cut"]["fsdp"]


def test_gradients_never_leave_the_buckets_of_ddp(worlds: dict[int, list[dict[Any, Any]]]) -> None:
    for rank in two(worlds):
        assert rank["in buckets"] == [(0, True)] * 12  # 3 steps of 4 micro-batches: not one byte besides


def test_groups_of_hsdp_wait_as_long_as_all_ranks_do(worlds: dict[int, list[dict[Any, Any]]]) -> None:
    for rank in worlds[4]:
        replicate, shard, wanted = rank["patience"]
        assert replicate == shard == wanted > timedelta(minutes=30)


def test_a_number_that_is_not_finite_on_one_rank_is_skipped_by_all(worlds: dict[int, list[dict[Any, Any]]]) -> None:
    for strategy in ("ddp", "fsdp"):
        found = [rank["skipped", strategy] for rank in two(worlds)]
        assert [(one["skipped"], one["kept"], one["refused"]) for one in found] == [(True, True, True)] * 2
        assert found[0]["after"] == found[1]["after"]
        assert math.isfinite(found[0]["after"][0])
        assert not found[0]["after"][1]


def test_a_signal_to_one_rank_stops_all(worlds: dict[int, list[dict[Any, Any]]]) -> None:
    for rank, strategy in product(two(worlds), ("ddp", "fsdp")):
        assert rank["stopped", strategy] == {"stops": [False, True, True], "given_up": True}


def test_ranks_agree_on_the_smallest_micro_batch(worlds: dict[int, list[dict[Any, Any]]]) -> None:
    for strategy, fits in (("ddp", 2), ("fsdp", 1)):
        found = [rank["micro_batch", strategy] for rank in two(worlds)]
        assert found[0] == found[1]
        assert found[0] == [fits, 4, 0.0]  # 7 rows are at most 4 on a rank; no gradient is left


def test_groups_of_ranks_that_cannot_be_are_refused(worlds: dict[int, list[dict[Any, Any]]]) -> None:
    for rank in two(worlds):
        assert "is 2 of 2 ranks; no number of them would; or use parallel.strategy fsdp" in rank["refused"]
