"""Which rows of which tensor a rank holds, writes and reads; and the safetensors files that hold them.

In: tensors, plain ones (the same on every rank) or DTensors sharded over rows. Out: files, one per rank; rows of any
tensor read from any set of such files into any other layout. Nothing here communicates: who writes what is a pure
function of names, shapes, placements and ranks.

A file is a safetensors file of tensors under their plain names. Where a file holds only some rows of a tensor, its
header says so: `__metadata__["rows"]` is JSON, {name: [first row, rows of the whole tensor]}. A tensor that is not
listed there is whole, so what one process wrote is a safetensors file like any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import IO, Annotated, Any

import torch
import xxhash
from pydantic import BaseModel, Field
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from pipeline.errors import UserError
from pipeline.train.saving.storage import Location, read_into, size_of
from pipeline.untrusted import DamagedFileError, Natural, Object, check, parse_json, shown

BLOCK = 1 << 26  # bytes moved at a time: what goes through memory beside the tensors themselves
SUFFIX = ".safetensors"
_ALIGNMENT = 64  # of the first tensor in a file
_HEADER_LIMIT = 100_000_000  # bytes, as the safetensors library has it
_MOST_DIMENSIONS = 8
_READERS = 16  # headers read at once: on an object store each is a round trip

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


def chunk(rows: range, *, parts: int, part: int) -> range:
    """The share of `part`, as `torch.chunk` divides: ceil(n / parts) rows each, the last ones fewer or none."""
    size = -(-len(rows) // parts)
    return rows[size * part : size * (part + 1)]


@dataclass(frozen=True)
class Piece:
    """One rank's part of a tensor: it holds the rows `held` in `local`, and writes `own` of them.

    `shape` is the whole tensor's. Rows are counted in the whole tensor; a scalar counts as one row. local: (held, ...).
    """

    name: str
    shape: tuple[int, ...]
    held: range
    own: range
    local: Tensor

    @staticmethod
    def of(name: str, tensor: Tensor, *, rank: int, world_size: int) -> Piece:
        """Rows held by several ranks are dealt among them: each writes about 1 / world of the whole."""
        shards, shard, replicas, replica = 1, 0, world_size, rank
        local = tensor.detach()
        if isinstance(local, DTensor):
            shards, shard, replicas, replica = _place(name, local)
            local = local.to_local()
        shape = tuple(tensor.shape)
        rows = range(shape[0] if shape else 1)
        held = chunk(rows, parts=shards, part=shard)
        local = local.reshape(1) if not shape else local
        assert len(held) == local.shape[0], f"{name}: expected rows {held} of {len(rows)}, holds {local.shape[0]}"
        return Piece(name, shape, held, chunk(held, parts=replicas, part=replica), local)

    def written(self) -> Tensor:
        """The elements that this rank writes, flat."""
        return self.local[self.own.start - self.held.start : self.own.stop - self.held.start].reshape(-1)


def _place(name: str, tensor: DTensor) -> tuple[int, int, int, int]:
    """(shards, which of them, replicas, which of them) of this rank."""
    shards, shard, replicas, replica = 1, 0, 1, 0
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, f"{name} lies on a mesh that this rank is no part of"
    for size, at, placement in zip(tensor.device_mesh.shape, coordinate, tensor.placements, strict=True):
        if isinstance(placement, Replicate):
            replicas, replica = replicas * size, replica * size + at
        else:
            over_rows = type(placement) is Shard and placement.dim == 0 and shards == 1
            assert over_rows, f"{name} is placed as {tensor.placements}: checkpoints know shards over rows and replicas"
            shards, shard = size, at
    return shards, shard, replicas, replica


def total_bytes(pieces: Iterable[Piece]) -> int:
    """Size of the whole tensors, over all ranks."""
    return sum(prod(piece.shape) * piece.local.element_size() for piece in pieces)


def in_file_order(pieces: Iterable[Piece]) -> list[Piece]:
    """What this rank writes of something, wide elements first: so all of them are aligned."""
    return sorted((piece for piece in pieces if len(piece.own)), key=lambda piece: -piece.local.element_size())


def header_of(pieces: Sequence[Piece]) -> bytes:
    """What a safetensors file of `pieces` begins with: the length of a JSON object, and that object."""
    described: dict[str, Any] = {}
    rows: dict[str, list[int]] = {}
    end = 0
    for piece in pieces:
        begin, end = end, end + piece.written().nbytes
        shape = list(piece.shape)
        if len(piece.own) < (total := shape[0] if shape else 1):
            rows[piece.name] = [piece.own.start, total]
            shape[0] = len(piece.own)
        described[piece.name] = {"dtype": _CODES[piece.local.dtype], "shape": shape, "data_offsets": [begin, end]}
    about = {"format": "pt", **({"rows": json.dumps(rows)} if rows else {})}
    text = json.dumps({"__metadata__": about, **described}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_stream(stream: IO[bytes], header: bytes, blocks: Iterable[Tensor]) -> dict[str, int | str]:
    """Write flat tensors of the CPU one after the other; return size and checksum, as manifests hold them."""
    digest, size = xxhash.xxh3_128(), 0
    for content in chain([memoryview(header)], map(as_bytes, blocks)):
        digest.update(content)
        stream.write(content)
        size += len(content)
    return {"bytes": size, "xxh3_128": digest.hexdigest()}


def as_bytes(flat: Tensor) -> memoryview:
    """The memory of a contiguous tensor of the CPU."""
    memory: Any = flat.view(-1).view(torch.uint8).numpy()
    return memoryview(memory)


@dataclass(frozen=True)
class Stored:
    """Some rows of a tensor, in a file from byte `offset` on."""

    file: Location
    offset: int
    rows: range


@dataclass(frozen=True)
class StoredTensor:
    """Where the rows of a tensor lie, over all files."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    places: tuple[Stored, ...]


def read_headers(files: Sequence[Location], *, folder: Location) -> dict[str, StoredTensor]:
    """All tensors in the files of a checkpoint's part, `folder`, that its manifest names: no others were verified.

    Errors: there are none, one that cannot be read or contradicts another.
    """
    if not files:
        raise UserError(f"{folder} holds no {SUFFIX} files")
    with ThreadPoolExecutor(min(_READERS, len(files))) as pool:
        headers = list(pool.map(_read_header, files))
    found: dict[str, StoredTensor] = {}
    for file, (header, size) in zip(files, headers, strict=True):
        for name, stored in _tensors_of(file, header, size=size):
            known = found.get(name, stored)
            if (known.dtype, known.shape) != (stored.dtype, stored.shape):
                raise DamagedFileError(
                    f"{file} cannot be read as safetensors: {shown(name)} is {stored.dtype} "
                    f"{stored.shape} here, {known.dtype} {known.shape} before"
                )
            places = () if known is stored else known.places
            found[name] = StoredTensor(stored.dtype, stored.shape, places + stored.places)
    for name, tensor in found.items():
        _check_whole(name, tensor, folder=folder)
    return found


def _read_header(file: Location) -> tuple[bytes, int]:
    """The JSON text after the eight bytes of its length, and the size of the file."""
    length = bytearray(8)
    try:
        size = size_of(file)
        read_into(file, 0, memoryview(length))
        text_bytes = int.from_bytes(length, "little")
        if text_bytes > min(size - 8, _HEADER_LIMIT):
            raise EOFError(f"a header of {text_bytes} bytes in a file of {size}")
        text = bytearray(text_bytes)
        read_into(file, 8, memoryview(text))
    except EOFError as error:
        raise DamagedFileError(f"{file} cannot be read as safetensors: {error}") from None
    return bytes(text), size


class _Entry(BaseModel):
    dtype: str
    shape: Annotated[tuple[Natural, ...], Field(max_length=_MOST_DIMENSIONS)]
    data_offsets: tuple[Natural, Natural]


def _tensors_of(file: Location, header: bytes, *, size: int) -> Iterator[tuple[str, StoredTensor]]:
    origin = f"{file} cannot be read as safetensors: its header"
    values = parse_json(Object, header, origin=origin)
    about = check(dict[str, str], values.pop("__metadata__", {}), origin=origin)
    parts = parse_json(dict[str, tuple[Natural, Natural]], about.get("rows", "{}").encode(), origin=origin)
    for name, entry in check(dict[str, _Entry], values, origin=origin).items():
        shape, dtype = entry.shape, _DTYPES.get(entry.dtype)
        first, total = parts.get(name, (0, shape[0] if shape else 1))
        rows = range(first, first + (shape[0] if shape else 1))
        begin, end = entry.data_offsets
        fits = dtype is not None and end - begin == prod(shape) * dtype.itemsize and 8 + len(header) + end <= size
        if dtype is None or not fits or rows.stop > total:
            raise DamagedFileError(
                f"{file} cannot be read as safetensors: {shown(name)} is {shown(entry.dtype)} {shape} in bytes {begin} "
                f"to {end}, {rows} of {total}, in a file of {size}"
            )
        whole = (total, *shape[1:]) if shape else ()
        yield name, StoredTensor(dtype, whole, (Stored(file, 8 + len(header) + begin, rows),))


def _check_whole(name: str, tensor: StoredTensor, *, folder: Location) -> None:
    """Raise for rows that no file has, before there is memory for them."""
    done, total = 0, tensor.shape[0] if tensor.shape else 1
    for first, stop in [*sorted((place.rows.start, place.rows.stop) for place in tensor.places), (total, total)]:
        if first > done:
            raise DamagedFileError(f"{folder} lacks rows {done} to {first - 1} of {shown(name)}")
        done = max(done, stop)


def check_fit(stored: Mapping[str, StoredTensor], wanted: Mapping[str, Tensor], *, where: Location) -> None:
    """Errors: tensors that are missing, too many, of another shape or no floats; the first few are named."""
    faults = [f"{name} is missing" for name in wanted if name not in stored]
    faults += [f"{name} is too many" for name in stored if name not in wanted]
    faults += [
        f"{name}: expected floats {tuple(tensor.shape)}, found {stored[name].dtype} {stored[name].shape}"
        for name, tensor in wanted.items()
        if name in stored and (stored[name].shape != tuple(tensor.shape) or not stored[name].dtype.is_floating_point)
    ]
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"{where} does not fit this model: {'; '.join(faults[:3])}{more}")


@torch.no_grad()
def read_tensor(stored: StoredTensor, target: Piece) -> None:
    """Fill the rows that this rank holds, and read no others; `read_headers` has seen that the files hold them."""
    done = target.held.start
    for place in sorted(stored.places, key=lambda place: place.rows.start):
        rows = range(max(done, place.rows.start), min(target.held.stop, place.rows.stop))
        if not rows:
            continue
        elements = prod(target.shape[1:])
        offset = place.offset + (rows.start - place.rows.start) * elements * stored.dtype.itemsize
        local = target.local[rows.start - target.held.start : rows.stop - target.held.start]
        _read_elements(place.file, offset, local.view(-1), dtype=stored.dtype)
        done = rows.stop
    assert done == target.held.stop, f"{target.name}: rows {done} to {target.held.stop - 1} lie in no file"


def _read_elements(file: Location, offset: int, target: Tensor, *, dtype: torch.dtype) -> None:
    """Read into `target`, flat, of any device and dtype; where it is neither the file's, through a block."""
    direct = target.device.type == "cpu" and target.dtype == dtype
    per_block = BLOCK // dtype.itemsize
    block = target[:0] if direct else torch.empty(min(per_block, target.numel()), dtype=dtype)
    for start in range(0, target.numel(), per_block):
        part = target[start : start + per_block]
        into = part if direct else block[: part.numel()]
        try:
            read_into(file, offset + start * dtype.itemsize, as_bytes(into))
        except EOFError as error:
            raise UserError(f"{error}; the checkpoint is damaged") from None
        if not direct:
            part.copy_(into)
