"""What any ranks under any strategy saved, any others read: bit by bit, each rank its rows only."""

from __future__ import annotations

import json
import os
import socket
import traceback
import uuid
import zlib
from collections.abc import Callable
from datetime import timedelta
from errno import ENOSPC, ESTALE
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.model.transformer import Decoder, build_model
from pipeline.train.runtime import Runtime
from pipeline.train.saving import checkpoint as checkpoint_module
from pipeline.train.saving import flush, pieces
from pipeline.train.saving.checkpoint import list_checkpoints, load_model, optimizer_tensors, restore, verify
from pipeline.train.saving.storage import LocalShelf
from pipeline.train.saving.store import CheckpointStore
from tests.support import FORKS
from tests.test_checkpoint import state_at

# Rows that no number of ranks divides: 13, 10, 7 and 5 of them; and 3, fewer than 4 ranks.
CONFIG = Config.model_validate(
    {
        "model": {"n_layers": 2, "n_heads": 1, "d_model": 10, "d_ff": 3, "context_length": 7, "vocab_size": 13,
                  "tie_embeddings": False},
        "train": {"steps": 100, "batch_tokens": 7},
        "checkpoint": {"every": 5},
    }
)  # fmt: skip
LAYOUTS = {
    1: ("plain", "fsdp"),
    2: ("plain", "fsdp"),
    3: ("plain", "fsdp"),
    4: ("plain", "fsdp", "hsdp"),
}
_PATIENCE = timedelta(seconds=100)
MOMENTS = ("exp_avg", "exp_avg_sq")


def spawn(world: int, function: Callable[..., Any], folder: Path, *, lost: int | None = None) -> list[Any]:
    """What `function(rank, world, folder)` returned on each of `world` gloo ranks; `lost`: a rank that dies in it."""
    meeting = folder.with_name(f"{folder.name}-{uuid.uuid4().hex}")
    pipes = [FORKS.Pipe(duplex=False) for _ in range(world)]
    ranks = [
        FORKS.Process(target=_rank, args=(rank, world, meeting, function, folder, pipe[1]))
        for rank, pipe in enumerate(pipes)
    ]
    try:
        for process, (_, sender) in zip(ranks, pipes, strict=True):
            process.start()
            sender.close()
        found = []
        for rank, (receiver, _) in enumerate(pipes):
            assert receiver.poll(120), f"rank {rank} says nothing"
            failed, value = (True, "died") if rank == lost else receiver.recv()
            assert rank == lost or not failed, f"rank {rank}:\n{value}"
            found.append(value)
        return found
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _rank(rank: int, world: int, meeting: Path, function: Callable[..., Any], folder: Path, pipe: Any) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=_PATIENCE)
        value = function(rank, world, folder)
        pipe.send((False, value))
    except BaseException:
        pipe.send((True, traceback.format_exc()))
        os._exit(1)  # the others learn of it at once


def store_in(folder: Path, rank: int, world: int, config: Config = CONFIG) -> CheckpointStore:
    device = torch.device("cpu")
    runtime = Runtime(cast("Any", None), device, rank, world, torch.float32, Console(quiet=True))
    return CheckpointStore(folder, config, tokenizer_json=b"{}", runtime=runtime)


def values(name: str, shape: torch.Size) -> Tensor:
    """Numbers for a tensor of that name, the same everywhere."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def fill(tensor: Tensor, name: str, *, zero: bool) -> None:
    """With its numbers or with zeros, as PyTorch distributes them."""
    whole = values(name, tensor.shape) * (not zero)
    if isinstance(tensor, DTensor):
        whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements)
    tensor.detach().copy_(whole)


def model_of(kind: str, world: int, *, zero: bool) -> tuple[Decoder, torch.optim.Optimizer]:
    """A model laid out as `kind`, with an optimizer whose moments are filled, too."""
    model = build_model(CONFIG.model, n_tokens=11)
    if kind != "plain":
        mesh = (
            init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))
            if kind == "hsdp"
            else init_device_mesh("cpu", (world,))
        )
        for module in (*model.stack.blocks, model):
            fully_shard(cast("nn.Module", module), mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for name, parameter in model.named_parameters():
        fill(parameter, name, zero=zero)
        if not zero:
            optimizer.state[parameter] = {key: torch.empty_like(parameter) for key in MOMENTS}
            optimizer.state[parameter]["step"] = torch.tensor(5.0)
            for key in MOMENTS:
                fill(optimizer.state[parameter][key], f"{name}.{key}", zero=False)
    return model, optimizer


def save_all(rank: int, world: int, folder: Path) -> None:
    for kind in LAYOUTS[world]:
        model, optimizer = model_of(kind, world, zero=False)
        store = store_in(folder / f"{world}-{kind}", rank, world)
        store.clean()
        store.begin(state_at(5), model=model, optimizer=optimizer)
        numbers = 3 * sum(parameter.numel() for parameter in model.parameters())
        one_row_each = 3 * sum(parameter.shape[1:].numel() for parameter in model.parameters())
        copies = 4 * (numbers / world + one_row_each) + 16 * 3 * len(list(model.parameters()))
        assert store._host.nbytes <= copies, "a rank copies its share only"
        for parameter in model.parameters():
            parameter.detach().zero_()  # what was begun does not care
        for _ in range(5):  # nor does it mix with what training sends
            assert float(_summed(torch.tensor(rank + 1.0))) == world * (world + 1) / 2
        store.finish()


def _summed(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor


def load_all(rank: int, world: int, folder: Path) -> None:
    for kind in LAYOUTS[world]:
        for saved in sorted(folder.iterdir()):
            model, optimizer = model_of(kind, world, zero=True)
            checkpoint = store_in(saved, rank, world).newest()
            assert checkpoint is not None
            read: list[int] = []
            original, pieces.read_into = pieces.read_into, counting(pieces.read_into, read)
            assert restore(checkpoint, model=model, optimizer=optimizer) == state_at(5)
            pieces.read_into = original
            compare(model, optimizer)
            tensors = [*model.state_dict().values(), *optimizer_tensors(model, optimizer).values()]
            held = sum(t.to_local().nbytes if isinstance(t, DTensor) else t.nbytes for t in tensors)
            headers = [int.from_bytes(file.read_bytes()[:8], "little") for file in checkpoint.rglob("*.safetensors")]
            assert sum(read) == held + sum(headers) + 8 * len(headers), "no rows but its own"
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()  # takes the moments as its own
            assert {float(moments["step"]) for moments in optimizer.state.values()} == {6.0}


def counting(read_into: Callable[..., None], read: list[int]) -> Callable[..., None]:
    def counted(file: Any, offset: int, target: memoryview) -> None:
        read.append(len(target))
        read_into(file, offset, target)

    return counted


def compare(model: Decoder, optimizer: torch.optim.Optimizer) -> None:
    tensors = {**model.state_dict(), **optimizer_tensors(model, optimizer)}
    names = dict(model.named_parameters()).keys()
    assert tensors.keys() == names | {f"{name}.{key}" for name in names for key in MOMENTS}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(whole, values(name, whole.shape)), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint of each layout."""
    folder = tmp_path_factory.mktemp("saved")
    for world in LAYOUTS:
        spawn(world, save_all, folder)
    return folder


@pytest.mark.parametrize("world", LAYOUTS)
def test_any_layout_reads_any_layout(saved: Path, world: int) -> None:
    assert len(list(saved.iterdir())) == sum(map(len, LAYOUTS.values()))
    spawn(world, load_all, saved)


def test_each_rank_writes_its_share_which_others_can_read(saved: Path) -> None:
    """Put together by the safetensors library and numpy alone."""
    for layout in sorted(saved.iterdir()):
        world = int(layout.name[0])
        [checkpoint] = list_checkpoints(layout)
        assert verify(checkpoint) == []
        for part in ("model", "optimizer"):
            files = sorted(Path(str(checkpoint), part).iterdir())
            assert [file.name for file in files] == [f"{n + 1:05d}-of-{world:05d}.safetensors" for n in range(world)]
            wholes: dict[str, Any] = {}
            sizes = []
            for file in files:
                with safetensors.safe_open(file, framework="np") as opened:
                    rows = json.loads(opened.metadata().get("rows", "{}"))
                    assert not rows or world > 1
                    sizes.append(0)
                    for name in opened.keys():  # noqa: SIM118 - it is no dict
                        tensor = opened.get_tensor(name)
                        first, total = rows.get(name, (0, len(tensor)))
                        whole = wholes.setdefault(name, np.full((total, *tensor.shape[1:]), np.nan, np.float32))
                        whole[first : first + len(tensor)] = tensor
                        sizes[-1] += tensor.nbytes
            for name, whole in wholes.items():
                assert np.array_equal(whole, values(name, torch.Size(whole.shape)).numpy()), name
            rows_of_each = sum(whole[:1].nbytes for whole in wholes.values())
            assert max(sizes) <= sum(sizes) / world + 2 * rows_of_each


def test_one_process_reads_them_without_any_ranks(saved: Path) -> None:
    for layout in sorted(saved.iterdir()):
        model, _ = load_model(list_checkpoints(layout)[0], device=torch.device("cpu"))
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, values(name, tensor.shape)), name


def message_of(work: Callable[[], object]) -> tuple[str, str]:
    try:
        work()
    except (UserError, RuntimeError) as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def fail_one_by_one(rank: int, world: int, folder: Path) -> dict[str, tuple[str, str]]:
    """A first checkpoint, then failures of one rank, then a last one."""
    heard = {}
    for kind in ("asynchronous", "at once"):
        settings = CONFIG.checkpoint.model_copy(update={"asynchronous": kind == "asynchronous"})
        config = CONFIG.model_copy(update={"checkpoint": settings})
        store = store_in(folder / kind, rank, world, config)
        model, optimizer = model_of("fsdp", world, zero=False)

        def save(step: int, store: CheckpointStore = store, model: Any = model, optimizer: Any = optimizer) -> None:
            store.begin(state_at(step), model=model, optimizer=optimizer)
            store.finish()

        save(5)
        original = flush.write_stream
        if rank == 1:
            flush.write_stream = full
        heard[f"{kind}: full"] = message_of(lambda: save(10))
        if rank == 1:
            flush.write_stream = buggy
        heard[f"{kind}: bug"] = message_of(lambda: save(10))
        flush.write_stream = original
        weight = cast("DTensor", model.embedding.tokens.weight).to_local()
        if rank == 1:
            weight.detach()[0, 0] = float("nan")
        heard[f"{kind}: nan"] = message_of(lambda: save(10))
        weight.detach().zero_()
        heard[f"{kind}: left"] = ("", str(sorted(place.name for place in (folder / kind).iterdir())))
        dist.barrier()
        save(15)
    return heard


def full(*_: object) -> None:
    raise OSError(ENOSPC, "No space left on device")


def buggy(*_: object) -> None:
    raise ZeroDivisionError("a bug")


def test_what_one_rank_cannot_write_no_rank_takes_for_saved(tmp_path: Path) -> None:
    first, second = spawn(2, fail_one_by_one, tmp_path)
    host = socket.gethostname()
    for kind in ("asynchronous", "at once"):
        safe = f"the last intact checkpoint is {tmp_path / kind / 'step-00000005'}"
        for case, kind_of_error, of_others, own in (
            ("full", "UserError", f"rank 1 on {host}: [Errno 28] No space left", "step-00000010: No space left"),
            (
                "nan",
                "UserError",
                f"rank 1 on {host}: embedding.tokens.weight has values",
                "embedding.tokens.weight has",
            ),
            ("bug", "RuntimeError", "step-00000010 could not be written", "step-00000010 could not be written"),
        ):
            for rank, (found, text) in enumerate((first[f"{kind}: {case}"], second[f"{kind}: {case}"])):
                assert found == kind_of_error
                assert (own if rank else of_others) in text
                assert case == "bug" or safe in text
        assert first[f"{kind}: left"][1] == "['step-00000005']"
        assert [place.name for place in list_checkpoints(tmp_path / kind)] == ["step-00000005", "step-00000015"]


def lose_a_rank(rank: int, world: int, folder: Path) -> tuple[str, str]:
    store = store_in(folder, rank, world)
    model, optimizer = model_of("fsdp", world, zero=False)
    store.begin(state_at(5), model=model, optimizer=optimizer)
    store.finish()
    if rank == 1:
        flush.write_stream = vanish
    store.begin(state_at(10), model=model, optimizer=optimizer)
    return message_of(store.finish)


def vanish(*_: object) -> None:
    os._exit(9)


def test_a_rank_that_dies_leaves_nothing_that_is_taken_for_a_checkpoint(tmp_path: Path) -> None:
    survivor, _ = spawn(2, lose_a_rank, tmp_path, lost=1)
    assert survivor == ("RuntimeError", f"{tmp_path / 'step-00000010'} could not be written")
    assert [place.name for place in list_checkpoints(tmp_path)] == ["step-00000005"]
    assert [place.name for place in LocalShelf(tmp_path).leftovers()] == [".step-00000010.partial"]
    store_in(tmp_path, 0, 1).clean()
    assert [place.name for place in tmp_path.iterdir()] == ["step-00000005"]


def look_at_disks(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Own disks, one disk, and the newest intact checkpoint by common consent."""
    heard: dict[str, Any] = {"own": message_of(store_in(folder / f"disk-{rank}", rank, world).clean)}
    store = store_in(folder / "one", rank, world)
    heard["one"] = message_of(store.clean)
    model, optimizer = model_of("plain", world, zero=False)
    for step in (5, 10):
        store.begin(state_at(step), model=model, optimizer=optimizer)
    store.finish()
    damaged = folder / "one" / "step-00000010" / "model" / "00002-of-00002.safetensors"
    if rank == 0:
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    dist.barrier()
    fingerprint, checkpoint_module.PAUSES = checkpoint_module.fingerprint, (0.0,)
    if rank == 1:
        checkpoint_module.fingerprint = stale
    heard["passing"] = message_of(store.newest)
    checkpoint_module.fingerprint = fingerprint
    heard["newest"] = str(store.newest())
    dist.barrier()
    heard["left"] = sorted(place.name for place in (folder / "one").iterdir())
    return heard


def stale(file: object) -> Any:
    raise OSError(ESTALE, "Stale file handle")


def test_ranks_agree_on_the_folder_and_on_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for heard in spawn(2, look_at_disks, tmp_path):
        assert heard["own"][0] == "UserError"
        host = socket.gethostname()
        assert f"disk-{int('disk-1' in heard['own'][1])} of {host} is not seen on {host}" in heard["own"][1]
        assert heard["one"] == ("nothing", "")
        assert heard["passing"][0] == "UserError", "what one cannot read for now is told on all, and nothing is renamed"
        assert "cannot be read after 2 tries: Stale file handle" in heard["passing"][1]
        assert heard["newest"] == str(tmp_path / "one" / "step-00000005")
        assert heard["left"] == ["step-00000005", "step-00000010.damaged"]
