from __future__ import annotations

import errno
import io
import json
import resource
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.config_data import SourceConfig
from pipeline.data.loading.blend import Phase, PhaseSource
from pipeline.errors import UserError
from pipeline.model.transformer import Decoder, build_model, initialise
from pipeline.ramp import Ramp
from pipeline.train.optim import build_optimizer
from pipeline.train.runtime import Runtime
from pipeline.train.saving.checkpoint import (
    checkpoint_folder,
    list_checkpoints,
    load_model,
    newest_intact,
    optimizer_tensors,
    read_state,
    resolve_checkpoint,
    restore,
    verify,
)
from pipeline.train.saving.pieces import write_stream
from pipeline.train.saving.storage import LocalShelf, entries, locate, read_bytes, write_bytes
from pipeline.train.saving.store import CheckpointStore, DiskNeeds
from pipeline.train.state import BatchSizes, TrainState

SETTINGS = {
    "model": {"n_layers": 2, "n_heads": 2, "d_model": 16, "context_length": 8},
    "train": {"steps": 100, "batch_tokens": 8, "device": "cpu", "precision": "fp32"},
}


def config_of(**checkpoint: object) -> Config:
    return Config.model_validate({**SETTINGS, "checkpoint": checkpoint})


def state_at(step: int) -> TrainState:
    return TrainState(
        step=step,
        rows=step * 4,
        tokens=step * 32,
        n_tokens=11,
        phases=(Phase(row=0, sources=(source("d"),)),),
        batches=(BatchSizes(after=0, row=0, ramp=Ramp(stages=(), full=4)),),
        tokenizer_fingerprint="t",
        tokenizer_eos_id=3,
        precision="torch.float32",
    )


def source(digest: str, *, weight: float = 1.0) -> PhaseSource:
    return PhaseSource(name=digest, digest=digest, settings=SourceConfig(path=digest, weight=weight))


def trained(config: Config, *, steps: int = 3) -> tuple[Decoder, torch.optim.Optimizer]:
    """A model whose optimizer has moments."""
    model = build_model(config.model, n_tokens=11)
    initialise(model, seed=1)
    optimizer = build_optimizer(model, config.optim)
    for _ in range(steps):
        tokens = torch.randint(0, 11, (2, 8))
        model(tokens, labels=tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(store: CheckpointStore, state: TrainState, *, model: Decoder, optimizer: torch.optim.Optimizer) -> Path:
    store.begin(state, model=model, optimizer=optimizer)
    store.finish()
    return Path(str(list_checkpoints(store.folder)[-1]))


@pytest.fixture(params=[True, False], ids=["asynchronous", "at once"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    config = config_of(every=5, keep=2, keep_every=10, asynchronous=request.param)
    runtime = Runtime.start(config)
    return CheckpointStore(tmp_path / "checkpoints", config, tokenizer_json=b"{}", runtime=runtime)


def test_restores_weights_moments_and_state_bit_by_bit(store: CheckpointStore) -> None:
    model, optimizer = trained(store.config)
    path = save(store, state_at(3), model=model, optimizer=optimizer)
    again, other = trained(store.config, steps=1)
    assert restore(path, model=again, optimizer=other) == state_at(3)
    for (name, expected), (same, found) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == same
        assert torch.equal(expected, found), name
    for parameter, same_parameter in zip(model.parameters(), again.parameters(), strict=True):
        expected_state, found_state = optimizer.state[parameter], other.state[same_parameter]
        assert set(expected_state) == set(found_state) == {"step", "exp_avg", "exp_avg_sq"}
        for key in expected_state:
            assert torch.equal(expected_state[key], found_state[key]), key
    loaded, config = load_model(path, device=torch.device("cpu"))
    assert config == store.config
    tokens = torch.randint(0, 11, (1, 8))
    assert torch.equal(loaded(tokens), model.eval()(tokens))


def test_files_are_safetensors_under_plain_names_without_pickle(store: CheckpointStore) -> None:
    model, optimizer = trained(store.config)
    path = save(store, state_at(3), model=model, optimizer=optimizer)
    names: set[str] = set()
    for file in (path / "model").iterdir():
        with safe_open(file, framework="np") as opened:
            names |= set(opened.keys())
    assert names == {name for name, _ in model.named_parameters()}
    suffixes = {file.suffix for file in path.rglob("*") if file.is_file()}
    assert suffixes == {".safetensors", ".json", ".yaml"}


def test_keeps_the_newest_and_the_milestones(store: CheckpointStore) -> None:
    model, optimizer = trained(store.config)
    for step in (5, 10, 15, 20, 25, 30, 35):
        save(store, state_at(step), model=model, optimizer=optimizer)
    assert [path.name for path in list_checkpoints(store.folder)] == [
        "step-00000010", "step-00000020", "step-00000030", "step-00000035",
    ]  # fmt: skip
    assert {path.name for path in store.folder.iterdir()} == {path.name for path in list_checkpoints(store.folder)}


@pytest.mark.parametrize("name", ["state.json", "config.yaml", "tokenizer.json", "model", "optimizer", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_to_any_file_is_found_and_named(store: CheckpointStore, name: str, damage: str) -> None:
    model, optimizer = trained(store.config)
    older = save(store, state_at(3), model=model, optimizer=optimizer)
    newer = save(store, state_at(4), model=model, optimizer=optimizer)
    file = newer / name
    if file.is_dir():
        file = next(file.iterdir())
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert len(verify(newer)) == 1
    assert str(file.relative_to(newer)) in verify(newer)[0]
    said: list[str] = []
    assert newest_intact(store.folder, warn=said.append) == older
    assert len(said) == 1
    assert str(newer) in said[0]
    with pytest.raises(UserError, match="is damaged"):
        resolve_checkpoint(newer)


def test_retention_never_counts_a_damaged_checkpoint(store: CheckpointStore) -> None:
    """Two damaged ones are newer than the one that the run goes on from: its next save must not push that out."""
    model, optimizer = trained(store.config)
    for step in (8, 12):
        save(store, state_at(step), model=model, optimizer=optimizer)
    for damaged in list_checkpoints(store.folder)[1:]:
        (damaged / "state.json").write_text("{}")
    chosen = store.newest()
    assert chosen is not None
    assert chosen.name == "step-00000008"
    saved = save(store, state_at(9), model=model, optimizer=optimizer)
    assert list_checkpoints(store.folder) == [chosen, saved]
    assert (store.folder / "step-00000012.damaged").is_dir()


def test_partial_folders_are_neither_seen_nor_kept(store: CheckpointStore) -> None:
    model, optimizer = trained(store.config)
    path = save(store, state_at(3), model=model, optimizer=optimizer)
    partial = store.folder / ".step-00000004.partial"
    partial.mkdir()
    (store.folder / "mine").mkdir()
    assert list_checkpoints(store.folder) == [path]
    store.clean()
    assert not partial.exists()
    assert (store.folder / "mine").is_dir()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_not_saved(store: CheckpointStore, value: float) -> None:
    model, optimizer = trained(store.config)
    save(store, state_at(3), model=model, optimizer=optimizer)
    with torch.no_grad():
        model.stack.blocks[1].mlp.up.weight[3, 2] = value
    with pytest.raises(UserError, match=r"stack\.blocks\.1\.mlp\.up\.weight"):
        save(store, state_at(4), model=model, optimizer=optimizer)
    assert names_in(store) == ["step-00000003"]


def test_too_little_space_is_seen_before_writing(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained(store.config)
    save(store, state_at(3), model=model, optimizer=optimizer)
    monkeypatch.setattr(
        "pipeline.train.saving.storage.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})
    )
    monkeypatch.setattr("pipeline.train.saving.flush.write_stream", None)
    with pytest.raises(UserError, match=r"1\.0 kB free\n  the last intact checkpoint is .*step-00000003"):
        save(store, state_at(4), model=model, optimizer=optimizer)
    assert names_in(store) == ["step-00000003"]


def test_a_disk_that_fills_up_meanwhile_leaves_the_earlier_one_alone(store: CheckpointStore) -> None:
    """A limit on the size of files stands for the disk."""
    model, optimizer = trained(store.config)
    earlier = save(store, state_at(3), model=model, optimizer=optimizer)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"step-00000004: File too large\n  the last intact") as raised:
            save(store, state_at(4), model=model, optimizer=optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(raised.value.__cause__, OSError)
    assert names_in(store) == ["step-00000003"]
    assert verify(earlier) == []
    save(store, state_at(4), model=model, optimizer=optimizer)
    assert names_in(store) == ["step-00000003", "step-00000004"]


def test_a_bug_in_the_background_is_told_with_its_traceback(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained(store.config)

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("pipeline.train.saving.flush.write_stream", broken)
    with pytest.raises(RuntimeError, match="step-00000003 could not be written") as raised:
        save(store, state_at(3), model=model, optimizer=optimizer)
    cause = raised.value.__cause__
    assert isinstance(cause, ZeroDivisionError)
    assert "broken" in [frame.name for frame in traceback.extract_tb(cause.__traceback__)]
    assert names_in(store) == []
    store.finish()  # once is enough


@pytest.mark.parametrize("fault", ["permission", "gone"])
def test_a_folder_that_cannot_be_written_is_named(
    store: CheckpointStore, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained(store.config)
    if fault == "permission":
        monkeypatch.setattr(Path, "mkdir", denied)
    else:
        store.folder.write_text("a file")  # type: ignore[union-attr] - a local one
    with pytest.raises(UserError, match=r"could not save .*step-00000003: (Permission denied|Not a directory)"):
        save(store, state_at(3), model=model, optimizer=optimizer)


def denied(self: Path, *_: object, **__: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied", str(self))


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained(store.config)
    save(store, state_at(3), model=model, optimizer=optimizer)
    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(UserError, match="cannot be listed: Permission denied"):
        store.newest()


def test_what_does_not_read_back_is_not_a_checkpoint(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that tells other bytes than it was given."""
    model, optimizer = trained(store.config)

    def write_badly(stream: IO[bytes], header: bytes, blocks: Iterable[Tensor]) -> dict[str, int | str]:
        about = write_stream(stream, header, blocks)
        stream.seek(-1, io.SEEK_END)
        stream.write(b"?")
        return about

    monkeypatch.setattr("pipeline.train.saving.flush.write_stream", write_badly)
    with pytest.raises(UserError, match="does not read back"):
        save(store, state_at(3), model=model, optimizer=optimizer)
    assert names_in(store) == []


def test_a_file_that_another_rank_lost_is_missed(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained(store.config)
    monkeypatch.setattr("pipeline.train.saving.flush.size_of", lambda file: 7)
    with pytest.raises(UserError, match=r"00001-of-00001\.safetensors has 7 bytes instead of"):
        save(store, state_at(3), model=model, optimizer=optimizer)
    assert names_in(store) == []


def names_in(store: CheckpointStore) -> list[str]:
    return [place.name for place in entries(store.folder)]


def test_what_changes_after_begin_does_not_reach_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written before all weights and moments have changed."""
    config = config_of(every=5)
    store = CheckpointStore(tmp_path, config, tokenizer_json=b"{}", runtime=Runtime.start(config))
    model, optimizer = trained(config)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    go, make = threading.Event(), LocalShelf.make
    monkeypatch.setattr(LocalShelf, "make", lambda shelf, place: (go.wait(60), make(shelf, place)))
    store.begin(state_at(3), model=model, optimizer=optimizer)
    store.poll()
    assert list_checkpoints(tmp_path) == [], "it has not been written yet"
    with torch.no_grad():
        for tensor in (*model.state_dict().values(), *optimizer_tensors(model, optimizer).values()):
            tensor.fill_(float("nan"))
    go.set()
    store.finish()
    [checkpoint] = list_checkpoints(tmp_path)
    for part, expected in (("model", weights), ("optimizer", moments)):
        [file] = entries(checkpoint / part)
        found = load_file(str(file))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_saved_is_said_only_of_what_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(every=5)
    store = CheckpointStore(tmp_path, config, tokenizer_json=b"{}", runtime=Runtime.start(config))
    model, optimizer = trained(config)
    go, publish = threading.Event(), LocalShelf.publish
    monkeypatch.setattr(LocalShelf, "publish", lambda shelf, step: (go.wait(60), publish(shelf, step)))
    store.begin(state_at(3), model=model, optimizer=optimizer)
    store.poll()
    assert "saved" not in capsys.readouterr().out
    threading.Timer(0.3, go.set).start()
    store.begin(state_at(4), model=model, optimizer=optimizer)  # waits for the first
    assert list_checkpoints(tmp_path)[0].name == "step-00000003"
    assert capsys.readouterr().out.count("saved /") == 1
    store.finish()
    assert "step-00000004: 92.9 kB in" in capsys.readouterr().out


def test_a_failure_is_raised_by_the_next_poll(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(every=5)
    store = CheckpointStore(tmp_path, config, tokenizer_json=b"{}", runtime=Runtime.start(config))
    model, optimizer = trained(config)
    monkeypatch.setattr(LocalShelf, "make", denied)
    store.begin(state_at(3), model=model, optimizer=optimizer)
    deadline = time.monotonic() + 30
    raised = None
    while raised is None and time.monotonic() < deadline:
        try:
            store.poll()
        except UserError as error:
            raised = error
    assert "Permission denied" in str(raised)
    store.poll()  # once is enough


def test_older_ones_that_cannot_be_removed_are_warned_of(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = trained(store.config)
    for step in (5, 6):
        save(store, state_at(step), model=model, optimizer=optimizer)
    with monkeypatch.context() as patched:
        patched.setattr(LocalShelf, "remove", denied)
        save(store, state_at(7), model=model, optimizer=optimizer)
    assert "warning: older checkpoints could not be removed" in capsys.readouterr().out
    save(store, state_at(8), model=model, optimizer=optimizer)
    assert names_in(store) == ["step-00000007", "step-00000008"]


@pytest.mark.parametrize("keep", [1, 2, 3, 30])
@pytest.mark.parametrize("keep_every", [None, 5, 10, 50])
@pytest.mark.parametrize("steps", [4, 98, 100])
def test_what_is_kept_needs_as_much_disk_as_was_said(
    keep: int, keep_every: int | None, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole course is saved: of all folders that there were at once the most is what was said, at any step before."""
    config = config_of(every=5, keep=keep, keep_every=keep_every, asynchronous=False)
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})
    store = CheckpointStore(tmp_path, config, tokenizer_json=b"{}", runtime=Runtime.start(config))
    model, optimizer = trained(config, steps=0)
    publish, most = LocalShelf.publish, {0: 0}

    def counted(shelf: LocalShelf, step: int) -> Path:
        here = len(list(tmp_path.iterdir()))
        most.update({before: max(seen, here) for before, seen in most.items()})
        return publish(shelf, step)

    monkeypatch.setattr(LocalShelf, "publish", counted)
    said = {0: store.requirements(state_at(0), model=model, optimizer=optimizer).at_once}
    for step in sorted({*range(5, steps + 1, 5), steps}):
        save(store, state_at(step), model=model, optimizer=optimizer)
        most[step] = len(list(tmp_path.iterdir()))
        said[step] = store.requirements(state_at(step), model=model, optimizer=optimizer).at_once
    assert said == most


def test_one_checkpoint_takes_as_much_disk_as_was_said(store: CheckpointStore) -> None:
    """Before the first update, whose moments are still to come. 100 steps: each fifth saved, 2 kept."""
    fresh, no_moments = trained(store.config, steps=0)
    model, optimizer = trained(store.config)
    needs = store.requirements(state_at(0), model=fresh, optimizer=no_moments)
    assert needs.at_once == 8 + 2 + 1, "steps 10 to 80 for ever, 90 and 95 as the newest, and 100 under way"
    assert needs.needed == 11 * needs.checkpoint
    assert needs.free is not None
    assert needs.fits
    path = save(store, state_at(5), model=model, optimizer=optimizer)
    tensors = sum(file.stat().st_size for file in path.rglob("*.safetensors"))
    assert needs.checkpoint <= tensors <= needs.checkpoint + 10_000
    later = store.requirements(state_at(5), model=model, optimizer=optimizer)
    assert later.checkpoint == needs.checkpoint
    assert (later.at_once, later.needed) == (11, 10 * needs.checkpoint)
    assert not DiskNeeds(10, 3, 30, 29).fits
    assert DiskNeeds(10, 3, 30, None).fits


def test_updates_that_were_skipped_do_not_count_for_the_optimizer(store: CheckpointStore) -> None:
    model, optimizer = trained(store.config, steps=3)
    state = state_at(5).model_copy(update={"skipped": (2, 4)})
    path = save(store, state, model=model, optimizer=optimizer)
    again, other = trained(store.config, steps=0)
    restore(path, model=again, optimizer=other)
    assert [float(moments["step"]) for moments in other.state.values()] == [3.0] * len(optimizer.state)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "adamw fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
    "amsgrad": lambda model: torch.optim.Adam(model.parameters(), lr=1e-2, amsgrad=True),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
    "muon": lambda model: torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=1e-2),
    "no moments": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_any_optimizer_goes_on_as_if_nothing_had_been(tmp_path: Path, kind: str, steps: int) -> None:
    config = config_of()
    store = CheckpointStore(tmp_path, config, tokenizer_json=b"{}", runtime=Runtime.start(config))

    def walk(model: Decoder, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            tokens = torch.randint(0, 11, (2, 8), generator=torch.Generator().manual_seed(step))
            model(tokens, labels=tokens).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, _ = trained(config, steps=0)
    optimizer = OPTIMIZERS[kind](model)
    walk(model, optimizer, range(steps))
    path = save(store, state_at(steps), model=model, optimizer=optimizer)
    again, _ = trained(config, steps=1)
    other = OPTIMIZERS[kind](again)
    walk(again, other, range(100, 102))  # it holds something else
    restore(path, model=again, optimizer=other)
    walk(model, optimizer, range(steps, steps + 3))
    walk(again, other, range(steps, steps + 3))
    for (name, expected), found in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(expected, found), name


def test_float64_is_kept_and_read_as_float32_for_sampling(store: CheckpointStore) -> None:
    model, optimizer = trained(store.config, steps=0)
    model.double()
    path = save(store, state_at(0), model=model, optimizer=optimizer)
    again, other = trained(store.config, steps=0)
    restore(path, model=again.double(), optimizer=other)
    loaded, _ = load_model(path, device=torch.device("cpu"))
    for name, expected in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], expected)
        assert torch.equal(loaded.state_dict()[name], expected.float())


@pytest.mark.parametrize("scheme", ["memory", "local"])
def test_an_object_store_does_what_a_folder_does(scheme: str, tmp_path: Path) -> None:
    config = config_of(every=5, keep=2)
    folder = locate(f"{scheme}://{tmp_path}/checkpoints")
    store = CheckpointStore(folder, config, tokenizer_json=b"{}", runtime=Runtime.start(config))
    model, optimizer = trained(config)
    store.clean()
    assert store.newest() is None
    for step in (5, 10, 15):
        store.begin(state_at(step), model=model, optimizer=optimizer)
    store.finish()
    assert names_in(store) == ["step-00000010", "step-00000015"]
    assert resolve_checkpoint(f"{scheme}://{tmp_path}/checkpoints") == folder / "step-00000015"
    loaded, read = load_model(folder / "step-00000015", device=torch.device("cpu"))
    assert read == config
    again, other = trained(config, steps=1)
    assert restore(folder / "step-00000015", model=again, optimizer=other) == state_at(15)
    for name, expected in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], expected)
        assert torch.equal(loaded.state_dict()[name], expected)
    [file] = entries(folder / "step-00000015" / "optimizer")
    write_bytes(file, read_bytes(file)[:-1])
    assert store.newest() == folder / "step-00000010"
    assert list_checkpoints(folder) == [folder / "step-00000010"]
    assert read_bytes(folder / "step-00000015" / "state.json")


def test_a_run_whose_checkpoints_are_elsewhere_is_found(tmp_path: Path) -> None:
    config = config_of(folder=str(tmp_path / "elsewhere"))
    store = CheckpointStore(checkpoint_folder(config), config, tokenizer_json=b"{}", runtime=Runtime.start(config))
    model, optimizer = trained(config)
    path = save(store, state_at(3), model=model, optimizer=optimizer)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_bytes((path / "config.yaml").read_bytes())
    assert resolve_checkpoint(tmp_path / "run") == path == tmp_path / "elsewhere" / "step-00000003"
    assert checkpoint_folder(config_of(), tmp_path) == tmp_path / "checkpoints"


def test_foreign_format_is_refused(store: CheckpointStore) -> None:
    model, optimizer = trained(store.config)
    path = save(store, state_at(3), model=model, optimizer=optimizer)
    values = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**values, "format": 99}))
    with pytest.raises(UserError, match="has format 99, this version reads 3"):
        restore(path, model=model, optimizer=optimizer)


def test_model_of_another_shape_is_refused(store: CheckpointStore) -> None:
    model, optimizer = trained(store.config)
    path = save(store, state_at(3), model=model, optimizer=optimizer)
    wider = config_of().model_copy(update={"model": store.config.model.model_copy(update={"d_ff": 128})})
    other, its_optimizer = trained(wider)
    with pytest.raises(UserError, match="does not fit this model"):
        restore(path, model=other, optimizer=its_optimizer)


def test_a_path_that_is_nothing_is_named_with_its_neighbour(store: CheckpointStore) -> None:
    model, optimizer = trained(store.config)
    path = save(store, state_at(3), model=model, optimizer=optimizer)
    with pytest.raises(UserError, match="did you mean"):
        resolve_checkpoint(Path(str(store.folder) + "x"))
    assert resolve_checkpoint(path) == path
    assert resolve_checkpoint(store.folder.parent) == path


def test_the_rows_of_every_step_survive_other_batch_sizes() -> None:
    """A walk from step to step, with sizes changed on resuming at steps 5 and 7, and 7 once more before it is taken."""
    state = state_at(0)
    taken = []
    ramps = {5: Ramp(((6, 2), (2, 3)), 8), 7: Ramp((), 1)}
    for step in range(12):
        for ramp in [Ramp((), 9), ramps[step]] if step in ramps else [state.batches[-1].ramp]:
            state = state.continued((source("d"),), ramp)
        taken.append(state.rows_of(step + 1))
        state = TrainState.model_validate_json(state.after(targets=1, loss=2.5).model_dump_json())
    assert [rows for _, rows in taken] == [4] * 5 + [2, 3] + [1] * 5
    firsts = [sum(rows for _, rows in taken[:n]) for n in range(12)]
    assert [first for first, _ in taken] == firsts
    assert [state.rows_of(step) for step in range(1, 13)] == taken
    assert (state.step, state.rows, len(state.batches)) == (12, firsts[-1] + 1, 3)


def test_a_phase_begins_where_shares_change_and_nowhere_else() -> None:
    state = state_at(0).continued((source("a", weight=0.7), source("b", weight=0.3)), Ramp((), 4))
    assert len(state.phases) == 1, "nothing was read in the first one"
    state = state.after(targets=1, loss=2.5)
    scaled = (source("b", weight=3), source("a", weight=7))  # the same shares
    assert state.continued(scaled, Ramp((), 4)).phases == (Phase(row=0, sources=scaled),)
    other = (source("a", weight=0.5), source("b", weight=0.5))
    state = state.continued(other, Ramp((), 4))
    assert [phase.row for phase in state.phases] == [0, 4]
    assert state.continued((source("c"),), Ramp((), 4)).phases[1:] == (Phase(row=4, sources=(source("c"),)),)


def test_the_precision_is_the_one_that_a_run_goes_on_with() -> None:
    sources, ramp = (source("d"),), Ramp((), 4)
    state = state_at(3).continued(sources, ramp, precision="torch.bfloat16")
    assert state.precision == "torch.bfloat16"
    assert state.continued(sources, ramp).precision == "torch.bfloat16", "nothing was computed"


def test_a_state_of_another_format_or_a_torn_one_is_named(tmp_path: Path) -> None:
    for content, message in (
        ('{"format": 1, "rows": 3}', "has format 1, this version reads 3"),
        ('{"for', "it is not JSON"),
    ):
        (tmp_path / "state.json").write_text(content)
        with pytest.raises(UserError, match=message):
            read_state(tmp_path)
