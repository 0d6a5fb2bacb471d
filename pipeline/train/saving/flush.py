"""How a checkpoint gets from memory to its name: beside training, or in its way.

In: what each rank writes, as blocks of host memory. Out: a checkpoint on the shelf, or one error that every rank learns
of. Three rounds, each of which goes on only when all ranks succeeded:

1. the first rank makes an empty place, having looked for room;
2. each rank writes its files, forces them to disk and reads them back;
3. the first rank adds state, settings and tokenizer, looks for every file, writes the manifest and gives the name.

Ranks talk through a process group of their own, so nothing mixes with what training sends. A rank that dies breaks the
round for all: what was written bears no name, and the next start removes it.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from errno import EIO, ENOSPC
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from typing_extensions import override

from pipeline.errors import UserError, sized
from pipeline.train.saving.manifest import manifest_of
from pipeline.train.saving.pieces import (
    BLOCK,
    SUFFIX,
    Piece,
    as_bytes,
    header_of,
    in_file_order,
    total_bytes,
    write_stream,
)
from pipeline.train.saving.storage import (
    MANIFEST,
    Location,
    Shelf,
    fingerprint,
    size_of,
    write_bytes,
    writing,
)

PARTS = ("model", "optimizer")

_PATIENCE = timedelta(hours=2)  # the slowest rank may need so much longer to write than the fastest
_COPIERS = 8  # threads that copy host memory; more would wait for it
_ALIGNMENT = 16  # of a tensor within a block: the widest element has 8 bytes
_SPARE = 1.01  # of the room that a checkpoint needs: file systems keep books, too

Files = dict[str, dict[str, int | str]]


class Channel:
    """Ranks telling each other short messages, in JSON, away from training. Alone it is quiet."""

    def __init__(self, *, rank: int, world_size: int) -> None:
        """All ranks construct it at the same time."""
        self.rank = rank
        self.world_size = world_size
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE) if world_size > 1 else None

    def exchange(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        """Everybody's message, by rank; waits for all. Errors: RuntimeError when a rank is gone."""
        text = json.dumps(message).encode()
        if self._group is None:
            return [json.loads(text)]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(text)]), group=self._group)
        longest = max(int(size) for size in sizes)
        own = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)
        texts = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(texts, own, group=self._group)
        return [json.loads(text.numpy().tobytes()) for text in texts]


class HostBlocks:
    """Host memory that tensors are copied to on their way to disk; kept for the next time.

    Blocks are of one size, so nothing is lost to fragments, and pinned where tensors come from a GPU: copies then run
    while the CPU goes on, in the order of the GPU's stream, before whatever changes the tensors next.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._block, self._used = 0, 0
        self._reserving: threading.Thread | None = None
        self.nbytes = 0  # of the latest snapshot

    def reserve(self, nbytes: int) -> None:
        """Pin memory for `nbytes` in a thread: training does not wait for it at the first checkpoint.

        Where there is too little, the first checkpoint tells. The interpreter waits for the block in work when it ends:
        a daemon that it ends within C++ would abort the process, whose exit code would then be lost.
        """
        self._reserving = threading.Thread(target=self._reserve, args=(-(-nbytes // BLOCK),), name="reserve")
        self._reserving.start()

    def _reserve(self, blocks: int) -> None:
        with suppress(RuntimeError):
            while len(self._blocks) < blocks and threading.main_thread().is_alive():
                self._blocks.append(torch.empty(BLOCK, dtype=torch.uint8, pin_memory=True))

    def snapshot(self, flats: Iterable[Tensor]) -> list[list[Tensor]]:
        """Copies of flat tensors, each as one or more blocks. They are good until the next call."""
        if self._reserving is not None:
            self._reserving.join()
        self._block, self._used = 0, 0
        pairs = [list(self._places(flat)) for flat in flats]
        self.nbytes = self._block * BLOCK + self._used
        on_host = []
        for place, part in chain.from_iterable(pairs):
            if part.device.type == "cpu":
                on_host.append((place, part))
            else:
                place.copy_(part, non_blocking=True)  # on this thread, whose stream it is
        with ThreadPoolExecutor(min(torch.get_num_threads(), _COPIERS)) as pool:
            list(pool.map(_copy, on_host))
        return [[place for place, _ in parts] for parts in pairs]

    def stream(self, flat: Tensor) -> Iterator[Tensor]:
        """The same elements block by block, as they are in host memory, else copied. Each is good until the next."""
        for part in torch.split(flat, BLOCK // flat.element_size()):
            if part.device.type == "cpu":
                yield part
            else:
                copies = self.snapshot([part])[0]
                torch.cuda.current_stream(part.device).synchronize()
                yield from copies

    def _places(self, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Where a flat tensor is copied to, and what of it."""
        done, width = 0, flat.element_size()
        while done < flat.numel():
            if self._used + width > BLOCK:
                self._block, self._used = self._block + 1, 0
            if self._block == len(self._blocks):
                self._blocks.append(torch.empty(BLOCK, dtype=torch.uint8, pin_memory=flat.device.type == "cuda"))
            count = min(flat.numel() - done, (BLOCK - self._used) // width)
            place = self._blocks[self._block][self._used : self._used + count * width]
            yield place.view(flat.dtype), flat[done : done + count]
            done += count
            self._used += -(-count * width // _ALIGNMENT) * _ALIGNMENT


def _copy(pair: tuple[Tensor, Tensor]) -> None:
    """Host memory to host memory, in one thread, without Python's lock.

    `Tensor.copy_` would divide each tensor among PyTorch's threads, which wait for the slowest: where another process
    has one of the cores that took two to three times as long as a queue of copies (benchmarks/checkpoint.py).
    """
    target, source = (np.asarray(as_bytes(tensor)) for tensor in pair)
    np.copyto(target, source)


@dataclass(frozen=True)
class Save:
    """One rank's share of a checkpoint: per part its pieces in file order and, of each piece, the blocks to write."""

    step: int
    pieces: dict[str, list[Piece]]
    blocks: dict[str, list[Iterable[Tensor]]]
    texts: dict[str, bytes]
    nbytes: int  # of the whole checkpoint, over all ranks
    copied: tuple[torch.device, torch.Event] | None  # the blocks are filled


def plan(pieces: dict[str, list[Piece]], *, step: int, texts: dict[str, bytes], host: HostBlocks, copy: bool) -> Save:
    """With `copy` all that this rank writes is copied now, else while it is written."""
    nbytes = sum(total_bytes(pieces[part]) for part in PARTS)
    ordered = {part: in_file_order(pieces[part]) for part in PARTS}
    flats = {part: [piece.written() for piece in ordered[part]] for part in PARTS}
    copied = None
    if copy:
        copies = iter(host.snapshot(chain.from_iterable(flats.values())))
        blocks: dict[str, list[Iterable[Tensor]]] = {part: [next(copies) for _ in flats[part]] for part in PARTS}
        cuda = next((flat.device for flat in chain.from_iterable(flats.values()) if flat.device.type == "cuda"), None)
        if cuda is not None:
            copied = (cuda, torch.Event("cuda"))
            copied[1].record()
    else:
        blocks = {part: [host.stream(flat) for flat in flats[part]] for part in PARTS}
    return Save(step, ordered, blocks, texts, nbytes, copied)


class Flush(threading.Thread):
    """Writes one checkpoint: `start` beside the caller, `run` in its way. A failure is kept for who asks.

    A daemon: when a rank is gone, the process ends and does not wait; see `CheckpointStore.completing`.
    """

    def __init__(self, save: Save, *, shelf: Shelf, channel: Channel, retain: Callable[[], None], version: int) -> None:
        super().__init__(name=f"checkpoint-{save.step}", daemon=True)
        self.save = save
        self.shelf = shelf
        self.channel = channel
        self.retain = retain
        self.version = version
        self.place = shelf.workplace(save.step)
        self.failure: Exception | None = None
        self.warning = ""
        self.seconds = 0.0

    @override
    def run(self) -> None:
        began = time.perf_counter()
        main = self.channel.rank == 0
        try:
            self._together(self._prepare if main else _nothing)
            files = self._together(self._write)
            self._together((lambda: self._commit(files)) if main else _nothing)
        except Exception as error:  # whatever it is: told on the main thread, see `CheckpointStore.poll`
            self.failure = error
        self.seconds = time.perf_counter() - began
        if main and self.failure is None:
            try:
                self.retain()
            except Exception as error:  # whatever it is, this one is saved; tried again after the next one
                self.warning = f"warning: older checkpoints could not be removed: {error or repr(error)}"

    def _together(self, work: Callable[[], Files]) -> Files:
        """One round: what all ranks made. Errors: this rank's, or one that names the first rank that failed."""
        made: Files = {}
        failure: Exception | None = None
        try:
            made = work()
        except Exception as error:  # told to the others first
            failure = error
        known = isinstance(failure, UserError | OSError)
        told = None if failure is None else [known, socket.gethostname(), str(failure) or repr(failure)]
        heard = self.channel.exchange({"files": made, "failure": told})
        failed = [(rank, *message["failure"]) for rank, message in enumerate(heard) if message["failure"]]
        if failed and self.channel.rank == 0:
            with suppress(OSError):  # what is left bears no name, and the next start tries again
                self.shelf.clear(self.place)
        if failure is not None:
            raise failure
        if failed:
            rank, users, host, message = failed[0]
            raise (UserError if users else RuntimeError)(f"rank {rank} on {host}: {message}")
        return {name: about for message in heard for name, about in message["files"].items()}

    def _prepare(self) -> Files:
        free = self.shelf.free_bytes()
        if free is not None and free < self.save.nbytes * _SPARE:
            raise OSError(ENOSPC, f"{sized(self.save.nbytes)} needed, {sized(free)} free")
        self.shelf.make(self.place)
        return {}

    def _write(self) -> Files:
        if self.save.copied is not None:
            device, filled = self.save.copied
            torch.cuda.set_device(device)  # a thread begins with the first one, and would take memory of it
            filled.synchronize()
        files: Files = {}
        for part in PARTS:
            name = f"{part}/{self.channel.rank + 1:05d}-of-{self.channel.world_size:05d}{SUFFIX}"
            pieces = self.save.pieces[part]
            pairs = zip(pieces, self.save.blocks[part], strict=True)
            blocks = chain.from_iterable(_finite(p, b) if part == "model" else b for p, b in pairs)
            with writing(self.place / name) as stream:
                files[name] = write_stream(stream, header_of(pieces), blocks)
            _read_back(self.place / name, files[name])
        return files

    def _commit(self, files: Files) -> Files:
        for name, expected in files.items():
            found = size_of(self.place / name)
            if found != expected["bytes"]:
                raise OSError(EIO, f"{name} has {found} bytes instead of {expected['bytes']}")
        texts: Files = {}
        for name, content in self.save.texts.items():
            texts[name] = self._write_text(name, content)
        self._write_text(MANIFEST, manifest_of({**files, **texts}, version=self.version))
        self.shelf.publish(self.save.step)
        return {}

    def _write_text(self, name: str, content: bytes) -> dict[str, int | str]:
        about: dict[str, int | str] = {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
        write_bytes(self.place / name, content)
        _read_back(self.place / name, about)
        return about


def _nothing() -> Files:
    return {}


def _read_back(file: Location, expected: dict[str, int | str]) -> None:
    found = fingerprint(file)
    if found != expected:
        raise OSError(EIO, f"{file} does not read back: wrote {expected}, found {found}")


def _finite(piece: Piece, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same blocks, looked at on the way: weights that are lost must not push out good ones."""
    for block in blocks:
        low, high = block.aminmax()  # both are NaN when one element is; no memory is needed
        if not (low.isfinite() and high.isfinite()):
            raise UserError(f"{piece.name} has values that are not finite: no checkpoint is written of such weights")
        yield block
