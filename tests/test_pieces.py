"""Files are read back by the safetensors library, shares compared with `torch.chunk`."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import xxhash
from torch import Tensor

from pipeline.errors import UserError
from pipeline.train.saving import pieces as module
from pipeline.train.saving.pieces import (
    Piece,
    StoredTensor,
    check_fit,
    chunk,
    header_of,
    in_file_order,
    read_headers,
    read_tensor,
    total_bytes,
    write_stream,
)

TENSORS = {
    "flags": torch.tensor([True, False, True]),
    "half": torch.arange(15, dtype=torch.bfloat16).reshape(5, 3),
    "wide": torch.linspace(0, 1, 28, dtype=torch.float64).reshape(7, 2, 2),
    "scalar": torch.tensor(3.5),
    "short": torch.tensor([1.0, 2.0]),
    "matrix": torch.arange(33, dtype=torch.float32).reshape(11, 3),
    "none": torch.empty(0, 4),
}


def write(folder: Path, tensors: dict[str, Tensor], *, ranks: int) -> list[Path]:
    """What each of several ranks writes of tensors that all of them hold."""
    files = []
    for rank in range(ranks):
        held = [Piece.of(name, tensor, rank=rank, world_size=ranks) for name, tensor in tensors.items()]
        ordered = in_file_order(held)
        files.append(folder / f"{rank}.safetensors")
        with files[-1].open("wb") as stream:
            about = write_stream(stream, header_of(ordered), [piece.written() for piece in ordered])
        content = files[-1].read_bytes()
        assert about == {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
    return files


def headers(folder: Path) -> dict[str, StoredTensor]:
    """Of all files there."""
    return read_headers(sorted(folder.glob("*.safetensors")), folder=folder)


def read_rows(folder: Path, name: str, like: Tensor) -> Tensor:
    target = Piece.of(name, torch.zeros_like(like), rank=0, world_size=1)
    read_tensor(headers(folder)[name], target)
    return target.local.reshape(like.shape)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7, 20])
@pytest.mark.parametrize("rows", [1, 2, 5, 11, 12, 40])
def test_shares_are_those_of_torch_chunk(rows: int, parts: int) -> None:
    expected = [part.tolist() for part in torch.arange(rows).chunk(parts)]
    found = [list(chunk(range(100, 100 + rows), parts=parts, part=part)) for part in range(parts)]
    assert [[row - 100 for row in share] for share in found if share] == expected


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 9])
def test_every_row_is_written_once_and_equally_by_all(ranks: int) -> None:
    held = [
        [Piece.of(name, tensor, rank=rank, world_size=ranks) for name, tensor in TENSORS.items()]
        for rank in range(ranks)
    ]
    rows = Counter((piece.name, row) for pieces in held for piece in pieces for row in piece.own)
    assert rows == Counter(
        (name, row) for name, tensor in TENSORS.items() for row in range(len(tensor) if tensor.dim() else 1)
    )
    written = [sum(piece.written().nbytes for piece in pieces) for pieces in held]
    assert sum(written) == total_bytes(held[0]) == sum(tensor.nbytes for tensor in TENSORS.values())
    one_row_each = sum(tensor[:1].nbytes if tensor.dim() else tensor.nbytes for tensor in TENSORS.values())
    assert max(written) <= sum(written) / ranks + one_row_each


def test_a_file_of_one_process_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    [file] = write(tmp_path, TENSORS, ranks=1)
    found = safetensors.torch.load_file(file)
    assert found.keys() == TENSORS.keys() - {"none"}
    for name, tensor in found.items():
        assert tensor.dtype == TENSORS[name].dtype
        assert tensor.shape == TENSORS[name].shape
        assert torch.equal(tensor, TENSORS[name]), name
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert (8 + header) % 64 == 0
    with safetensors.safe_open(file, framework="np") as opened:
        assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_files_of_several_ranks_say_which_rows_they_hold(tmp_path: Path, ranks: int) -> None:
    """Put together again with nothing but the safetensors library and numpy."""
    del (tensors := dict(TENSORS))["half"]  # numpy knows no bf16
    found = {name: np.full(tensor.shape or (1,), 7, tensor.numpy().dtype) for name, tensor in tensors.items()}
    for file in write(tmp_path, tensors, ranks=ranks):
        with safetensors.safe_open(file, framework="np") as opened:
            rows = json.loads(opened.metadata().get("rows", "{}"))
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                part = opened.get_tensor(name)
                first, total = rows.get(name, (0, len(part) if part.ndim else 1))
                assert total == len(found[name])
                found[name][first : first + (len(part) if part.ndim else 1)] = part
    for name, tensor in tensors.items():
        assert np.array_equal(found[name].reshape(tensor.shape), tensor.numpy()), name


@pytest.mark.parametrize("ranks", [1, 3])
def test_any_rows_are_read_from_any_files_and_no_others(
    tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, TENSORS, ranks=ranks)
    stored = headers(tmp_path)
    assert stored.keys() == TENSORS.keys() - {"none"}
    read: list[int] = []
    original = module.read_into
    monkeypatch.setattr(module, "read_into", lambda f, o, target: read.append(len(target)) or original(f, o, target))
    monkeypatch.setattr(module, "BLOCK", 16)
    for name in stored:
        whole = TENSORS[name].reshape(1) if name == "scalar" else TENSORS[name]
        for start in range(len(whole) + 1):
            for stop in range(start, len(whole) + 1):
                read.clear()
                local = torch.zeros_like(whole[start:stop])
                read_tensor(stored[name], Piece(name, tuple(TENSORS[name].shape), range(start, stop), range(0), local))
                assert torch.equal(local, whole[start:stop])
                assert sum(read) == local.nbytes
                assert max(read, default=0) <= 16


def test_another_precision_is_converted(tmp_path: Path) -> None:
    write(tmp_path, TENSORS, ranks=2)
    for name in ("wide", "half"):
        found = read_rows(tmp_path, name, TENSORS[name].to(torch.float32))
        assert torch.equal(found, TENSORS[name].to(torch.float32))


def test_rows_in_no_file_are_named(tmp_path: Path) -> None:
    files = write(tmp_path, TENSORS, ranks=4)
    files[1].unlink()
    with pytest.raises(UserError, match="lacks rows 2 to 3 of 'wide'"):
        read_rows(tmp_path, "matrix", TENSORS["matrix"])
    files[3].unlink()
    with pytest.raises(UserError, match=r"holds no \.safetensors files"):
        read_headers([], folder=tmp_path / "nowhere")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x05\0\0",
        b"\xff" * 8,
        b"\x05\0\0\0\0\0\0\0{}",
        b"\x05\0\0\0\0\0\0\0{]   ",
        b"\x02\0\0\0\0\0\0\0[]",
        *(
            len(text).to_bytes(8, "little") + text
            for text in (
                b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
                b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
                b'{"a": {"shape": [1], "data_offsets": [0, 4]}}',
                b'{"__metadata__":{"rows":"{\\"a\\":[3,3]}"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
                b'{"__metadata__":{"rows":"{"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            )
        ),
    ],
)
def test_what_is_no_safetensors_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.safetensors cannot be read as safetensors"):
        headers(tmp_path)


def test_files_that_contradict_each_other_are_named(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.zeros(4, 2)}, ranks=2)
    (tmp_path / "sub").mkdir()
    [other] = write(tmp_path / "sub", {"a": torch.zeros(4, 3)}, ranks=1)
    other.rename(tmp_path / "9.safetensors")
    with pytest.raises(UserError, match=r"9\.safetensors cannot be read as safetensors: .*'a' is "):
        headers(tmp_path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    [file] = write(tmp_path, {"a": torch.zeros(4, 2)}, ranks=1)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"bytes 0 to 32, .* in a file of 159"):
        read_rows(tmp_path, "a", torch.zeros(4, 2))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.zeros(4, 2), "b": torch.zeros(1)}, ranks=1)
    with pytest.raises(UserError) as raised:
        check_fit(headers(tmp_path), {"a": torch.zeros(2, 4), "c": torch.zeros(1)}, where=tmp_path)
    for fault in ("c is missing", "b is too many", "a: expected floats (2, 4), found torch.float32 (4, 2)"):
        assert fault in str(raised.value)


def test_blocks_may_be_cut_anywhere() -> None:
    tensor = torch.arange(10.0)
    whole, cut = io.BytesIO(), io.BytesIO()
    assert write_stream(whole, b"head", [tensor]) == write_stream(cut, b"head", [tensor[:3], tensor[3:3], tensor[3:]])
    assert whole.getvalue() == cut.getvalue() == b"head" + tensor.numpy().tobytes()
