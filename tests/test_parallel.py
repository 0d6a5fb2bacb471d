"""What ranks share, decided without any; the distributed half is tests/distributed/test_strategies.py."""

from __future__ import annotations

import dataclasses
import functools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from pipeline.config import Config, ModelConfig
from pipeline.data.loading.blend import Phase
from pipeline.data.loading.loader import Loader
from pipeline.data.loading.sources import open_sources
from pipeline.errors import UserError
from pipeline.model.transformer import Decoder, build_model, count_parameters, initialise
from pipeline.train import micro_batch, parallel
from pipeline.train.memory import activation_bytes, bytes_needed, model_sizes
from pipeline.train.micro_batch import evened, find_micro_batch, with_micro_batch
from pipeline.train.parallel import adapt_blocks, choose, parallelise
from pipeline.train.runtime import Runtime

DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]


def settings(**sections: dict[str, Any]) -> Config:
    train = {"steps": 10, "batch_tokens": 256, "micro_batch": 2, "precision": "fp32", "device": "cpu"}
    model = {"n_layers": 2, "n_heads": 2, "d_model": 32, "context_length": 32}
    values: dict[str, Any] = {"data": {"path": "given as it is"}, "model": model, "train": train}
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys}
    return Config.model_validate(values)


def make(checkpointing: Any, *, compiled: bool = False, device: str = "cpu", **model: Any) -> Decoder:
    shape = {"n_layers": 3, "n_heads": 2, "d_model": 32, "context_length": 32, **model}
    made = build_model(ModelConfig.model_validate(shape), n_tokens=50).to(device)
    initialise(made, seed=1)
    adapt_blocks(made, checkpointing=checkpointing, compiled=compiled)
    return made


def tokens(rows: int, device: str = "cpu") -> torch.Tensor:
    return torch.randint(0, 50, (rows, 32), generator=torch.Generator().manual_seed(rows)).to(device)


# --- the choice of a strategy


def chosen(config: Config, *, memory: int | None, world: int, local: int) -> tuple[str, str]:
    """For a model of 1,000,000,000 parameters: 16 GB of state."""
    return choose(
        config,
        parameters=10**9,
        largest=5 * 10**7,
        n_tokens=1000,
        memory=memory,
        world_size=world,
        local_world_size=local,
    )


@pytest.mark.parametrize(
    ("memory", "world", "local", "expected"),
    [
        (10**9, 1, 1, "single"),
        (80 * 10**9, 1, 1, "single"),
        (80 * 10**9, 8, 8, "ddp"),
        (None, 8, 8, "ddp"),
        (16 * 10**9, 8, 8, "fsdp"),  # the state alone fills it
        (16 * 10**9, 16, 8, "hsdp"),  # an eighth of 16 GB, and what is gathered, fits
        (3 * 10**9, 16, 8, "fsdp"),  # an eighth does not
        (16 * 10**9, 8, 1, "fsdp"),  # nothing to shard over within a node of one rank
        (16 * 10**9, 15, 8, "fsdp"),  # nodes of unequal size
    ],
)
def test_auto_takes_the_first_strategy_that_fits(memory: int | None, world: int, local: int, expected: str) -> None:
    assert chosen(settings(), memory=memory, world=world, local=local)[0] == expected


def test_the_reason_holds_both_numbers() -> None:
    assert "18" in chosen(settings(), memory=80 * 10**9, world=8, local=8)[1]  # 16 bytes a parameter, and 2 of bf16
    strategy, why = chosen(settings(), memory=16 * 10**9, world=16, local=8)
    assert strategy == "hsdp"
    assert "a replica needs about 18.0 GB, more than 90% of the 16.0 GB of one rank; sharded over a node about " in why
    assert "micro_batch" in chosen(settings(), memory=10**9, world=8, local=8)[1]


def test_what_contradicts_the_ranks_is_refused_with_numbers_that_work() -> None:
    with pytest.raises(UserError, match="single was launched with 2 ranks"):
        chosen(settings(parallel={"strategy": "single"}), memory=None, world=2, local=2)
    hsdp = {"strategy": "hsdp"}
    assert chosen(settings(parallel=hsdp), memory=None, world=16, local=8) == ("hsdp", "as configured")
    with pytest.raises(UserError, match=r"the default of shard_ranks, is 8 of 8 ranks; .* can be 2, 4; or"):
        chosen(settings(parallel=hsdp), memory=None, world=8, local=8)
    with pytest.raises(UserError, match=r"parallel.shard_ranks is 5 of 12 ranks; .* can be 2, 3, 4, 6; or"):
        chosen(settings(parallel={**hsdp, "shard_ranks": 5}), memory=None, world=12, local=4)
    with pytest.raises(UserError, match=r"3 of 3 ranks; no number of them would"):
        chosen(settings(parallel=hsdp), memory=None, world=3, local=3)


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"strategy": "ddp", "shard_ranks": 2}, "shard_ranks has no effect with strategy ddp"),
        ({"strategy": "fsdp", "bucket_mb": 1}, "bucket_mb has no effect with strategy fsdp"),
        ({"strategy": "auto", "cpu_offload": True}, "cpu_offload has no effect with strategy auto"),
        ({"strategy": "single", "prefetch": 2}, "prefetch has no effect with strategy single"),
    ],
)
def test_settings_of_another_strategy_are_refused(keys: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        settings(parallel=keys)


def test_sharding_and_checkpointing_lower_the_estimate() -> None:
    sizes = {"parameters": 10**9, "largest": 5 * 10**7, "n_tokens": 1000, "precision": torch.bfloat16}
    plain = [bytes_needed(settings(), shards=shards, ranks=64, **sizes) for shards in (1, 2, 8, 64)]
    assert plain == sorted(plain, reverse=True)
    exact = bytes_needed(settings(), shards=1, ranks=8, **{**sizes, "precision": torch.float64})
    assert exact > 32 * 10**9
    kept = [
        bytes_needed(
            settings(parallel={"strategy": "fsdp", "sync_every_micro_batch": every}), shards=2, ranks=2, **sizes
        )
        for every in (False, True)
    ]
    assert kept[0] - kept[1] == 4 * (10**9 - 2 * 5 * 10**7)  # 8 rows on 2 ranks by 2: whole gradients wait in float32
    rows = [
        activation_bytes(
            settings(model={"n_layers": 8}, train={"activation_checkpointing": kind}),
            n_tokens=50,
            precision=torch.float32,
        )
        for kind in ("none", "selective", "full")
    ]
    assert rows == sorted(rows, reverse=True)
    assert rows[0] > 2 * rows[2]


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_the_estimate_is_near_what_autograd_keeps(precision: torch.dtype, mlp: str) -> None:
    """Per row and layer, from what is kept with more rows and more layers; and per row of logits."""

    def kept(layers: int, rows: int) -> int:
        model = build_model(
            ModelConfig(n_layers=layers, n_heads=2, d_model=64, context_length=32, mlp=mlp), n_tokens=50
        )
        initialise(model, seed=1)
        found: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        low = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), low:
            loss = model(tokens(rows), labels=tokens(rows))
            return sum(found.values()) + 0 * loss.numel()

    counted = (kept(4, 3) - kept(4, 1)) - (kept(2, 3) - kept(2, 1))  # 2 rows, 2 layers
    config = [
        settings(model={"n_layers": layers, "d_model": 64, "mlp": mlp}, train={"micro_batch": 1}) for layers in (4, 2)
    ]
    estimated = [activation_bytes(one, n_tokens=50, precision=precision) for one in config]
    assert 2 * (estimated[0] - estimated[1]) == pytest.approx(counted, rel=0.33)


def test_sizes_are_of_the_model_and_its_largest_group() -> None:
    config = settings(model={"n_layers": 5}).model
    model = build_model(config, n_tokens=50)
    block = count_parameters(model.stack.blocks[0])
    assert model_sizes(config, n_tokens=50) == (count_parameters(model), block)
    assert model_sizes(config, n_tokens=5000) == (5 * block + (rest := 5056 * 32 + 32 * 32 + 2 * 32), rest)


# --- activation checkpointing and compilation


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_recomputing_activations_changes_no_bit(kind: str, precision: torch.dtype, device: str) -> None:
    """With dropout: its masks are drawn again. Less is kept for it, which is the point."""
    found, kept = [], []
    for checkpointing in ("none", kind):
        model = make(checkpointing, device=device, dropout=0.1, n_kv_heads=1, windows=(8, None))
        torch.manual_seed(5)
        sizes: list[int] = []

        def keep(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        low = torch.autocast(device, dtype=precision, enabled=precision != torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), low:
            loss = model(tokens(3, device), labels=tokens(3, device))
        loss.backward()
        kept.append(sum(sizes))
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        found.append((loss, grads, torch.rand(1, device=device)))
    assert kept[1] < 0.7 * kept[0]
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    for name, grad in found[0][1].items():
        assert torch.equal(grad, found[1][1][name]), name
    assert torch.equal(found[0][2], found[1][2])  # what is drawn next is what it would have been


@pytest.mark.parametrize(
    ("checkpointing", "windows", "kinds"), [("none", (None,), 1), ("full", (8,), 1), ("selective", (8, None), 2)]
)
def test_a_deep_model_compiles_one_graph_per_kind_of_block(
    checkpointing: str, windows: tuple[int | None, ...], kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel.torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    model = make(checkpointing, compiled=True, n_layers=12, dropout=0.1, windows=windows)
    assert [name for name, _ in model.named_parameters()] == [
        name for name, _ in make("none", n_layers=12).named_parameters()
    ]
    graphs = []
    for mode in ("train", "train", "eval", "eval", "train", "eval"):
        getattr(model, mode)()
        with torch.set_grad_enabled(mode == "train"):
            loss = model(tokens(3), labels=tokens(3))
        if mode == "train":
            loss.backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [kinds + 1, kinds + 1, *[2 * (kinds + 1)] * 4]  # the loss is one more
    assert not counters["graph_break"]


@pytest.mark.slow
def test_a_compiled_model_computes_what_the_plain_one_does() -> None:
    """With the real compiler; one layer, for its minute is long."""
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = make("selective", compiled=compiled, n_layers=1, d_model=16)
        loss = model(tokens(3), labels=tokens(3))
        loss.backward()
        found.append((loss.item(), torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert counters["inductor"], "the compiler was at work"


# --- the size of a micro-batch


def test_micro_batches_are_evened_out() -> None:
    assert [evened(size, most=64) for size in (64, 63, 50, 32, 31, 1)] == [64, 32, 32, 32, 22, 1]
    for most in range(1, 30):
        for size in range(1, most + 1):
            found = evened(size, most=most)
            assert found <= size
            assert -(-most // found) == -(-most // size)


def test_auto_finds_what_fits_and_leaves_no_trace(dataset: Path) -> None:
    data = {"path": str(dataset)}
    config = settings(data=data, train={"micro_batch": "auto", "batch_tokens": 32 * 12})
    runtime = Runtime.start(config)
    opened = open_sources(config)
    made = parallelise(config, n_tokens=opened.vocab_size, runtime=runtime)
    blend = opened.blend([Phase(row=0, sources=opened.described())])

    def loader_of(size: int) -> Loader:
        return Loader(blend, settings(data=data, train={"micro_batch": size}), rank=0, world_size=1)

    before = torch.get_rng_state()
    held = sum(p.nbytes for p in made.model.parameters())
    row = activation_bytes(config, n_tokens=opened.vocab_size, precision=torch.float32)
    found = {
        rows: find_micro_batch(
            made,
            config,
            runtime=runtime,
            loader_of=loader_of,
            free=int((3 * held + rows * row) / micro_batch.FILLED) + 2,
        )
        for rows in (1, 2, 5, 7, 12, 1000)
    }
    assert found == {1: 1, 2: 2, 5: 4, 7: 6, 12: 12, 1000: 12}  # of 12 rows: 3 of 4 each, 2 of 6 each
    with pytest.raises(UserError, match="one sequence of 32 tokens takes"):
        find_micro_batch(made, config, runtime=runtime, loader_of=loader_of, free=3 * held)
    assert all(p.grad is None for p in made.model.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    settled = with_micro_batch(config, made, data=opened, runtime=runtime)
    assert settled.train.micro_batch == 12  # this machine has the memory
    assert settled.model_copy(update={"train": config.train}) == config


@pytest.mark.parametrize(("two_fit", "logits", "expected"), [(False, 2**31, 1), (True, 2**31, 12), (True, 8, 6)])
def test_what_cuda_has_room_for_is_found(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, two_fit: bool, logits: int, expected: int
) -> None:
    """Of 12 rows: one where two run out of memory; 6, not 8 and 4, where the kernels count no more than 8."""
    config = settings(data={"path": str(dataset)}, train={"micro_batch": "auto", "batch_tokens": 32 * 12})
    runtime = Runtime.start(config)
    made = parallelise(config, n_tokens=open_sources(config).vocab_size, runtime=runtime)

    def measured(_: object, size: int) -> int:
        if size > 1 and not two_fit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1000 * size

    monkeypatch.setattr(micro_batch._Trial, "_measured", measured)
    monkeypatch.setattr(micro_batch._Trial, "succeeds", lambda _, size: size == 1 or two_fit)
    monkeypatch.setattr(micro_batch, "most_rows", lambda *_, **__: logits)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())  # no GPU is needed
    on_cuda = dataclasses.replace(runtime, device=torch.device("cuda"))
    found = find_micro_batch(made, config, runtime=on_cuda, loader_of=pytest.fail, free=10**9)
    assert found == expected


def test_more_logits_than_31_bits_count_are_refused_on_cuda(dataset: Path) -> None:
    """40 x 1,024 x 50,304 logits are below 2^31, 42 are not. Also: one sequence is never too many."""
    config = settings(data={"path": str(dataset)}, model={"context_length": 1024, "vocab_size": 50_304},
                      train={"micro_batch": 42, "batch_tokens": 1024 * 84})  # fmt: skip
    assert micro_batch.most_rows(config, n_tokens=257) == 41
    assert micro_batch.most_rows(settings(model={"context_length": 65_536, "vocab_size": 50_304},
                                          train={"batch_tokens": 65_536}), n_tokens=257) == 1  # fmt: skip
    opened = open_sources(config)
    runtime = Runtime.start(config)
    made = parallelise(settings(), n_tokens=opened.vocab_size, runtime=runtime)
    on_cuda = dataclasses.replace(runtime, device=torch.device("cuda"))
    with pytest.raises(UserError, match=r"micro_batch is 42, but .* that is 41 sequences; lower it to 28"):
        with_micro_batch(config, made, data=opened, runtime=on_cuda)
    assert with_micro_batch(config, made, data=opened, runtime=runtime) == config


def test_a_rounded_residual_stream_changes_the_loss_a_little() -> None:
    losses = {}
    for residual in ("fp32", "bf16"):
        config = settings(train={"precision": "bf16", "residual": residual})
        runtime = Runtime.start(config)
        made = parallelise(config, n_tokens=70, runtime=runtime)
        with runtime.autocast():
            losses[residual] = made.forward(tokens=tokens(3), labels=tokens(3)).item()
        stream = made.model.embedding(tokens(3), torch.zeros(1, 1, dtype=torch.int64))
        assert stream.dtype == (torch.bfloat16 if residual == "bf16" else torch.float32)
    assert losses["fp32"] != losses["bf16"] == pytest.approx(losses["fp32"], rel=5e-3)


def test_a_rounded_residual_stream_needs_bf16() -> None:
    config = settings(train={"precision": "fp32", "residual": "bf16"})
    with pytest.raises(UserError, match=r"residual bf16 goes with train\.precision bf16"):
        parallelise(config, n_tokens=70, runtime=Runtime.start(config))


def test_auto_is_refused_with_dropout() -> None:
    with pytest.raises(ValueError, match=r"train\.micro_batch auto with model\.dropout 0\.1"):
        settings(model={"dropout": 0.1}, train={"micro_batch": "auto"})
