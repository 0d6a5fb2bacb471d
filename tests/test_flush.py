"""Copies on their way to disk, and what ranks tell each other about them; with ranks: tests/distributed."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.train.saving import flush
from pipeline.train.saving.flush import Channel, Flush, HostBlocks, plan
from pipeline.train.saving.manifest import read_manifest
from pipeline.train.saving.pieces import Piece
from pipeline.train.saving.storage import LocalShelf, entries

FLATS = [
    torch.arange(40, dtype=torch.float64),
    torch.arange(7, dtype=torch.bfloat16),
    torch.arange(0, dtype=torch.float32),
    torch.arange(33, dtype=torch.float32),
    torch.tensor([True, False, True]),
    torch.arange(64, dtype=torch.int64),
]


@pytest.fixture(params=[64, 1 << 26])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of a block: few, so that every tensor is cut, and as it is."""
    monkeypatch.setattr(flush, "BLOCK", request.param)
    return int(request.param)


def test_a_snapshot_has_the_values_of_its_time(block: int) -> None:
    flats = [flat.clone() for flat in FLATS]
    copies = HostBlocks().snapshot(flats)
    for flat in flats:
        flat.zero_()
    for expected, parts in zip(FLATS, copies, strict=True):
        assert all(0 < part.nbytes <= block for part in parts)
        assert all(part.dtype == expected.dtype for part in parts)
        assert torch.equal(torch.cat([expected[:0], *parts]), expected)


def test_memory_is_kept_and_hardly_more_than_what_is_copied(block: int) -> None:
    host = HostBlocks()
    first = [part.data_ptr() for parts in host.snapshot(FLATS) for part in parts]
    taken = sum(flat.nbytes for flat in FLATS)
    assert taken <= host.nbytes <= taken + 16 * len(first)
    assert [part.data_ptr() for parts in host.snapshot(FLATS) for part in parts] == first
    assert all(address % 16 == 0 for address in first)


def test_memory_that_cannot_be_reserved_is_told_by_who_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    unforeseen: list[object] = []
    monkeypatch.setattr(threading, "excepthook", unforeseen.append)
    monkeypatch.setattr(flush.torch, "empty", _no_memory)
    host = HostBlocks()
    host.reserve(1 << 30)
    with pytest.raises(RuntimeError, match="out of memory"):
        host.snapshot(FLATS)
    assert unforeseen == []


def _no_memory(*_: object, **__: object) -> None:
    raise RuntimeError("CUDA error: out of memory")


def test_a_process_that_ends_while_it_reserves_memory_keeps_its_exit_code() -> None:
    """It neither aborts within C++ nor waits for all blocks, which would take an hour."""
    script = """
import time, torch
from pipeline.train.saving.flush import BLOCK, HostBlocks
some = torch.randn(1500, 1500)
torch.empty = lambda *_, **__: some @ some
HostBlocks().reserve(100_000 * BLOCK)
time.sleep(0.2)
raise SystemExit(2)
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "")


def test_what_is_streamed_from_host_memory_is_not_copied(block: int) -> None:
    host = HostBlocks()
    for flat in FLATS:
        parts = list(host.stream(flat))
        assert torch.equal(torch.cat(parts), flat)
        assert max(part.nbytes for part in parts) <= block
        assert parts[0].data_ptr() == flat.data_ptr()
    assert host.nbytes == 0


@pytest.mark.parametrize("copy", [True, False])
def test_a_flush_writes_what_the_plan_says(tmp_path: Path, copy: bool, block: int) -> None:
    tensors = {"model": FLATS[3].reshape(11, 3), "optimizer": FLATS[0].reshape(4, 10)}
    pieces = {part: [Piece.of("x", tensor, rank=0, world_size=1)] for part, tensor in tensors.items()}
    save = plan(pieces, step=7, texts={"state.json": b"{}"}, host=HostBlocks(), copy=copy)
    assert save.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    retained: list[int] = []
    work = Flush(
        save,
        shelf=LocalShelf(tmp_path),
        channel=Channel(rank=0, world_size=1),
        retain=lambda: retained.append(7),
        version=3,
    )
    work.run()
    assert work.failure is None
    assert retained == [7]
    [checkpoint] = entries(tmp_path)
    assert checkpoint.name == "step-00000007"
    assert set(read_manifest(checkpoint)) == {
        "state.json",
        "model/00001-of-00001.safetensors",
        "optimizer/00001-of-00001.safetensors",
    }
    for part, expected in tensors.items():
        found = load_file(tmp_path / checkpoint.name / part / "00001-of-00001.safetensors")
        assert torch.equal(found["x"], expected)


def test_alone_a_rank_hears_itself() -> None:
    assert Channel(rank=0, world_size=1).exchange({"a": [1, None]}) == [{"a": [1, None]}]
