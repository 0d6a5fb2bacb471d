from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pipeline.config import Config
from pipeline.config_data import SourceConfig
from pipeline.data.loading.blend import Phase, PhaseSource
from pipeline.errors import UserError
from pipeline.model.transformer import Decoder, build_model, initialise
from pipeline.ramp import Ramp
from pipeline.train.checkpoint import (
    list_checkpoints,
    load_model,
    newest_intact,
    read_state,
    resolve_checkpoint,
    restore,
    verify,
)
from pipeline.train.optim import build_optimizer
from pipeline.train.runtime import Runtime
from pipeline.train.state import BatchSizes, TrainState
from pipeline.train.store import CheckpointStore

SETTINGS = {
    "model": {"n_layers": 2, "n_heads": 2, "d_model": 16, "context_length": 8},
    "train": {"steps": 100, "batch_tokens": 8, "device": "cpu", "precision": "fp32"},
}


def config_of(**checkpoint: int) -> Config:
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


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    config = config_of(every=5, keep=2, keep_every=10)
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


@pytest.mark.parametrize("name", ["state.json", "config.yaml", "tokenizer.json", "model", "optimizer"])
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


def test_weights_that_are_not_finite_are_not_saved(store: CheckpointStore) -> None:
    model, optimizer = trained(store.config)
    save(store, state_at(3), model=model, optimizer=optimizer)
    with torch.no_grad():
        model.stack.blocks[1].mlp.up.weight[3, 2] = float("nan")
    with pytest.raises(UserError, match=r"stack\.blocks\.1\.mlp\.up\.weight"):
        save(store, state_at(4), model=model, optimizer=optimizer)
    assert [path.name for path in store.folder.iterdir()] == ["step-00000003"]


def test_too_little_space_is_seen_before_writing(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained(store.config)
    save(store, state_at(3), model=model, optimizer=optimizer)
    monkeypatch.setattr("pipeline.train.storage.shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"0\.0 MB free\n  the last intact checkpoint is .*step-00000003"):
        save(store, state_at(4), model=model, optimizer=optimizer)
    assert [path.name for path in store.folder.iterdir()] == ["step-00000003"]


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


def test_a_state_of_another_format_or_a_torn_one_is_named(tmp_path: Path) -> None:
    for content, message in (
        ('{"format": 1, "rows": 3}', "has format 1, this version reads 3"),
        ('{"for', "cannot be"),
    ):
        (tmp_path / "state.json").write_text(content)
        with pytest.raises(UserError, match=message):
            read_state(tmp_path)
