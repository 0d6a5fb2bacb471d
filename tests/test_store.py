"""What stays, what is gone on from, and what a failure leaves; writing and reading: test_checkpoint.py."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from pipeline.train.processes.pulse import Elsewhere
from pipeline.train.runtime import Runtime
from pipeline.train.saving import checkpoint as checkpoint_module
from pipeline.train.saving import storage
from pipeline.train.saving.checkpoint import inspect, list_checkpoints, restore
from pipeline.train.saving.pieces import Piece, header_of, in_file_order, write_stream
from pipeline.train.saving.storage import LocalShelf, Location, entries, locate, read_bytes, write_bytes
from pipeline.train.saving.store import CheckpointStore
from tests.test_checkpoint import config_of, denied, names_in, save, state_at, trained


def store_in(folder: Location, *, rollback: bool = False, **settings: object) -> CheckpointStore:
    config = config_of(**{"every": 10, "keep": 1, **settings})
    train = config.train.model_copy(update={"on_spike": "rollback" if rollback else "ignore"})
    config = config.model_copy(update={"train": train})
    return CheckpointStore(folder, config, tokenizer_json=b"{}", runtime=Runtime.start(config))


def fill(store: CheckpointStore, *steps: int) -> None:
    model, optimizer = trained(store.config, steps=1)
    for step in steps:
        save(store, state_at(step), model=model, optimizer=optimizer)


def numbers(store: CheckpointStore) -> list[int]:
    return [storage.step_of(checkpoint) for checkpoint in list_checkpoints(store.folder)]


# What stays


def test_what_a_spike_would_send_the_run_back_to_is_kept(tmp_path: Path) -> None:
    store = store_in(tmp_path, rollback=True)
    fill(store, 10, 20, 24, 27)
    assert numbers(store) == [20, 27]
    assert store.newest() == tmp_path / "step-00000027"
    assert store.newest(scheduled=True) == tmp_path / "step-00000020"
    fill(store, 30)
    assert numbers(store) == [30]


def test_without_a_scheduled_one_any_other_is_gone_back_to(tmp_path: Path) -> None:
    store = store_in(tmp_path, keep=3)
    fill(store, 10, 14, 17)
    (tmp_path / "step-00000010" / "state.json").unlink()
    assert store.newest(scheduled=True) == tmp_path / "step-00000017"
    assert numbers(store) == [14, 17], "the damaged one is set aside"


def test_what_was_saved_after_the_step_gone_back_to_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = store_in(tmp_path, keep=3)
    fill(store, 10, 20, 24, 27)
    store.forget_after(20)
    assert numbers(store) == [20]
    fill(store, 24)
    with monkeypatch.context() as patched:
        patched.setattr(LocalShelf, "remove", denied)
        store.forget_after(20)
    assert "warning: checkpoints after step 20 could not be removed" in capsys.readouterr().out
    fill(store, 22)
    assert numbers(store) == [20, 22, 24], "what is newer counts for nothing"


class ServiceError(Exception):
    """Not an OSError: clients of object stores have errors of their own."""


@pytest.mark.parametrize("error", [OSError(errno.ENOTEMPTY, "Directory not empty"), ServiceError("503")])
def test_a_removal_that_failed_half_way_is_tried_again_and_stops_no_other(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on NFS, where a file that is still open somewhere keeps its folder."""
    store = store_in(tmp_path, keep=3)
    fill(store, 10, 20, 30)
    store.config = store_in(tmp_path, keep=1).config
    rmtree: Callable[..., None] = shutil.rmtree

    def held(path: Path, *arguments: object) -> None:
        if "step-00000010" in str(path):
            raise error
        rmtree(path, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(storage.shutil, "rmtree", held)
        fill(store, 40)
    assert "warning: older checkpoints could not be removed: " in capsys.readouterr().out
    assert names_in(store) == [".step-00000010.removed", "step-00000040"]
    fill(store, 50)
    assert names_in(store) == ["step-00000050"]


# What is gone on from


def unreadable(
    monkeypatch: pytest.MonkeyPatch, name: str, number: int, *, times: int = 1000, kind: type[Exception] | None = None
) -> list[str]:
    """Reading files whose path contains `name` fails so many times."""
    tried: list[str] = []
    fingerprint = checkpoint_module.fingerprint

    def read(file: Location) -> dict[str, int | str]:
        if name in str(file) and len(tried) < times:
            tried.append(str(file))
            raise OSError(number, os.strerror(number), str(file)) if kind is None else kind("timed out")
        return fingerprint(file)

    monkeypatch.setattr(checkpoint_module, "fingerprint", read)
    monkeypatch.setattr(checkpoint_module, "PAUSES", (0.0, 0.0, 0.0))
    return tried


PASSING = [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EMFILE]


@pytest.mark.parametrize("number", PASSING)
def test_a_read_that_fails_once_is_tried_again(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_in(tmp_path, keep=2)
    fill(store, 10, 20)
    tried = unreadable(monkeypatch, "step-00000020/model", number, times=3)
    assert store.newest() == tmp_path / "step-00000020"
    assert len(tried) == 3


@pytest.mark.parametrize("number", PASSING)
def test_a_read_that_goes_on_failing_is_not_taken_for_damage(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that went on from an older one would lose work that is good."""
    store = store_in(tmp_path, keep=2)
    fill(store, 10, 20)
    unreadable(monkeypatch, "step-00000020/model", number)
    with pytest.raises(UserError, match=r"step-00000020/model/.* cannot be read after 4 tries: .*nothing was changed"):
        store.newest()
    assert names_in(store) == ["step-00000010", "step-00000020"]


def test_an_object_store_that_does_not_answer_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_in(locate(f"memory://{tmp_path}/a"), keep=2)
    fill_remote(store, 10, 20)
    unreadable(monkeypatch, "step-00000020/model", 0, kind=ServiceError)
    with pytest.raises(UserError, match="cannot be read after 4 tries: ServiceError"):
        store.newest()
    assert numbers(store) == [10, 20]


def fill_remote(store: CheckpointStore, *steps: int) -> None:
    model, optimizer = trained(store.config, steps=1)
    for step in steps:
        store.begin(state_at(step), model=model, optimizer=optimizer)
        store.finish()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR])
def test_one_that_may_not_be_read_is_passed_over_and_left_as_it_is(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = store_in(tmp_path, keep=2)
    fill(store, 10, 20)
    with monkeypatch.context() as patched:
        tried = unreadable(patched, "step-00000020/model", number)
        assert store.newest() == tmp_path / "step-00000010"
        assert len(tried) == 1, "trying again tells the same"
        assert inspect(tmp_path / "step-00000020").closed
    said = capsys.readouterr().out
    assert "step-00000020 may not be read and is passed over, left as it is" in said.replace("\n", " ")
    fill(store, 12, 14)
    assert numbers(store) == [12, 14, 20], "nor does it count among the newest"
    fill(store, 20)
    assert numbers(store) == [14, 20], "until it is written again"


def test_when_none_may_be_read_the_run_does_not_start_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_in(tmp_path)
    fill(store, 10)
    unreadable(monkeypatch, "step-", errno.EACCES)
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged or may not be read"):
        store.newest()


def test_a_stray_file_is_not_read(tmp_path: Path) -> None:
    """A shard of another checkpoint of the step, from a copy of four ranks' over that of one, before and after ours."""
    store = store_in(tmp_path)
    model, optimizer = trained(store.config)
    path = save(store, state_at(10), model=model, optimizer=optimizer)
    stale = {name: torch.full_like(tensor, 7.0) for name, tensor in model.state_dict().items()}
    for rank, name in ((0, "00000-of-00004"), (3, "00004-of-00004")):
        held = in_file_order(Piece.of(name, one, rank=rank, world_size=4) for name, one in stale.items())
        with (path / "model" / f"{name}.safetensors").open("wb") as file:
            write_stream(file, header_of(held), [piece.written() for piece in held])
    (path / "optimizer" / "x.safetensors").write_bytes(b"no such file")
    assert store.newest() == path, "it does not make a good checkpoint unusable"
    again, other = trained(store.config, steps=1)
    restore(path, model=again, optimizer=other)
    for name, expected in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], expected), name


@pytest.mark.parametrize("scheme", ["memory", "local"])
def test_a_damaged_one_on_an_object_store_outlives_its_step(scheme: str, tmp_path: Path) -> None:
    store = store_in(locate(f"{scheme}://{tmp_path}/b"), keep=2)
    fill_remote(store, 10, 20)
    [file] = entries(store.folder / "step-00000020" / "model")
    damaged = read_bytes(file)[:-1]
    write_bytes(file, damaged)
    assert store.newest() == store.folder / "step-00000010"
    fill_remote(store, 20, 30)
    assert numbers(store) == [20, 30]
    assert names_in(store) == ["step-00000020", "step-00000020.damaged", "step-00000030"]
    [kept] = entries(store.folder / "step-00000020.damaged" / "model")
    assert read_bytes(kept) == damaged


# What a failure leaves


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Checkpoints get their name when it is set."""
    go, publish = threading.Event(), LocalShelf.publish
    monkeypatch.setattr(LocalShelf, "publish", lambda shelf, step: (go.wait(60), publish(shelf, step))[1])
    return go


def fails_while_saving(store: CheckpointStore, error: Exception) -> None:
    model, optimizer = trained(store.config, steps=1)
    with store.completing():
        store.begin(state_at(10), model=model, optimizer=optimizer)
        raise error


@pytest.mark.parametrize(
    "error",
    [UserError("step 11: loss nan"), Elsewhere("step 11"), OSError(errno.EIO, "Input/output error"), KeyError("bug")],
)
def test_a_checkpoint_under_way_is_completed_when_training_fails(
    error: Exception, tmp_path: Path, held: threading.Event
) -> None:
    store, before = store_in(tmp_path), str(error)
    threading.Timer(0.3, held.set).start()
    with pytest.raises(type(error)) as raised:
        fails_while_saving(store, error)
    assert raised.value is error
    assert str(error) == before
    assert names_in(store) == ["step-00000010"]


@pytest.mark.parametrize("error", [UserError("loss nan"), OSError(errno.EIO, "broken", "x"), KeyError("bug")])
def test_a_second_failure_is_told_beside_the_first(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalShelf, "publish", denied)
    with pytest.raises(type(error)) as raised:
        fails_while_saving(store_in(tmp_path), error)
    assert raised.value is error
    told = "\n".join([str(error), *getattr(error, "__notes__", [])])
    assert told.index(str(error).split("\n")[0]) < told.index("could not save ")
    assert "Permission denied" in told


@pytest.mark.parametrize("gone", [True, False])
def test_what_cannot_be_completed_is_named_and_not_waited_for(
    gone: bool, tmp_path: Path, held: threading.Event
) -> None:
    """Another rank is gone, or the disk does not answer."""
    store = store_in(tmp_path)
    store.runtime.pulse.limit = 600.0 if gone else 0.1
    store.runtime = replace(store.runtime, world_size=2 if gone else 1)
    error = RuntimeError("[gloo] Connection closed by peer") if gone else UserError("step 11: loss nan")
    with pytest.raises(type(error)):
        fails_while_saving(store, error)
    assert "step-00000010 was being written and is lost" in "".join([str(error), *getattr(error, "__notes__", [])])
    held.set()
