"""The checkpoints of one run: written beside training, counted, and found again.

In: a model, its optimizer, a `TrainState`. Out: a checkpoint (see `checkpoint`) under its final name, or one error on
every rank; the newest that is intact. `flush` does the writing.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import yaml
from torch import Tensor, nn

from pipeline.config import Config, resolved
from pipeline.errors import UserError, sized
from pipeline.train.runtime import Runtime
from pipeline.train.saving.checkpoint import all_damaged, damage_of, list_checkpoints, optimizer_tensors, verify
from pipeline.train.saving.flush import PARTS, Channel, Flush, HostBlocks, plan
from pipeline.train.saving.pieces import Piece, total_bytes
from pipeline.train.saving.storage import Location, Shelf, is_file, step_of, write_bytes
from pipeline.train.state import FORMAT, TrainState

_MOMENTS = 2  # of an optimizer that has made no update: AdamW's, and none has more
_PROBE = ".seen-by-all"
_PROBE_SECONDS = 10.0  # that a network file system may take to show a new file


@dataclass(frozen=True)
class DiskNeeds:
    """What the checkpoints of a run take from now on, in bytes."""

    checkpoint: int
    """One of them."""
    at_once: int
    """How many there will be at most, the one under way included."""
    needed: int
    """Room beyond what is taken already."""
    free: int | None
    """Room there is; None where nobody can say."""

    @property
    def fits(self) -> bool:
        """Whether there is room."""
        return self.free is None or self.needed <= self.free


class CheckpointStore:
    """The checkpoints of one run. All ranks call its methods at the same points of the run."""

    def __init__(self, folder: Location, config: Config, *, tokenizer_json: bytes, runtime: Runtime) -> None:
        self.folder = folder
        self.config = config
        self.tokenizer_json = tokenizer_json
        self.runtime = runtime
        self._shelf = Shelf.at(folder)
        self._channel = Channel(rank=runtime.rank, world_size=runtime.world_size)
        self._host = HostBlocks()
        self._flush: Flush | None = None
        self._waited = 0.0

    def clean(self) -> None:
        """Remove what a killed process left under temporary names, and nothing else.

        Errors: a folder that may not be used, or is not the same one for all ranks.
        """
        if self.runtime.is_main:
            with _told(self.folder):
                for leftover in self._shelf.leftovers():
                    self._shelf.clear(leftover)
        if self.runtime.world_size > 1:
            self._check_shared()

    def _check_shared(self) -> None:
        """Disks of single nodes would each get a part of every checkpoint, of which none could be read."""
        probe = self.folder / _PROBE
        if self.runtime.is_main:
            with _told(self.folder):
                self._shelf.make_folder()
                write_bytes(probe, b"")
        self._channel.exchange({})
        until = time.monotonic() + _PROBE_SECONDS
        while not (seen := is_file(probe)) and time.monotonic() < until:
            time.sleep(0.1)
        heard = self._channel.exchange({"host": socket.gethostname(), "seen": seen})
        if self.runtime.is_main:
            self._shelf.clear(probe)
        blind = sorted({message["host"] for message in heard if not message["seen"]})
        if blind:
            raise UserError(
                f"{self.folder} of {heard[0]['host']} is not seen on {', '.join(blind)}: "
                "set run_dir or checkpoint.folder to one that all nodes share"
            )

    def newest(self) -> Location | None:
        """The newest checkpoint that verifies, the same on all ranks, which share the work of looking.

        Damaged ones are named and set aside, where retention does not count them. None: there never was one.
        Errors: there are checkpoints and all of them are damaged.
        """
        seen = [checkpoint.name for checkpoint in list_checkpoints(self.folder)]
        with self.runtime.pulse.unhurried("verifying checkpoints"):
            return self._newest(seen)

    def _newest(self, seen: list[str]) -> Location | None:
        names: list[str] = self._channel.exchange({"names": seen})[0]["names"]  # the first rank's view is everybody's
        damaged: list[Location] = []
        for checkpoint in (self.folder / name for name in reversed(names)):
            faults = verify(checkpoint, part=self.runtime.rank, parts=self.runtime.world_size)
            heard = self._channel.exchange({"faults": faults})
            if not any(message["faults"] for message in heard):
                break
            found = dict.fromkeys(fault for message in heard for fault in message["faults"])  # each once
            self.runtime.say(damage_of(checkpoint, list(found)))
            damaged.append(checkpoint)
        else:
            if damaged:
                raise UserError(all_damaged(self.folder))
            return None
        if self.runtime.is_main:
            for one in damaged:
                self._shelf.set_aside(one)
        return checkpoint

    def begin(self, state: TrainState, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take what is to be saved; it is written, verified and named beside training.

        Waits for an earlier one; for this one only with checkpoint.asynchronous false. Errors: see `poll`.
        """
        began = time.perf_counter()
        self.finish()
        asynchronous = self.config.checkpoint.asynchronous
        pieces = dict(zip(PARTS, self._pieces(model, optimizer), strict=True))
        texts = {
            "state.json": (state.model_dump_json(indent=2) + "\n").encode(),
            "config.yaml": yaml.safe_dump(resolved(self.config), sort_keys=False).encode(),
            "tokenizer.json": self.tokenizer_json,
        }
        save = plan(pieces, step=state.step, texts=texts, host=self._host, copy=asynchronous)
        flush = Flush(save, shelf=self._shelf, channel=self._channel, retain=self._retain, version=FORMAT)
        self._flush = flush
        if asynchronous:
            flush.start()
        else:
            with self.runtime.pulse.unhurried(f"saving step {state.step}"):
                flush.run()
        self._waited = time.perf_counter() - began
        if not asynchronous:
            self.finish()

    def poll(self) -> None:
        """Tell of a checkpoint that was finished meanwhile; costs nothing otherwise.

        Errors, each with what happened in the background as its cause: a full disk, weights that are not finite, a
        failure on another rank. Whatever fails, earlier checkpoints are untouched and nothing bears a final name.
        """
        if self._flush is not None and not self._flush.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is under way, if any. Errors: as `poll`."""
        flush, self._flush = self._flush, None
        if flush is None:
            return
        if flush.ident is not None:  # it was started, not run
            with self.runtime.pulse.unhurried(f"waiting until step {flush.save.step} is saved"):
                flush.join()
        final, size = self._shelf.final(flush.save.step), flush.save.nbytes
        if flush.failure is not None:
            raise self._explained(flush.failure, final) from flush.failure
        self.runtime.say(
            f"saved {final}: {sized(size)} in {flush.seconds:.2f} s ({sized(size / flush.seconds)}/s); "
            f"training waited {self._waited:.2f} s, copies take {sized(self._host.nbytes)} per rank"
        )
        if flush.warning:
            self.runtime.say(flush.warning)

    def requirements(self, state: TrainState, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> DiskNeeds:
        """What the checkpoints from `state` to the end of the run need, moments not yet made included."""
        weights, moments = (total_bytes(pieces) for pieces in self._pieces(model, optimizer))
        each = weights + (moments or _MOMENTS * weights)
        settings, last = self.config.checkpoint, self.config.total_steps
        present = len(list_checkpoints(self.folder))
        to_come = last // settings.every - state.step // settings.every + (last % settings.every > 0)
        for_ever = 0 if settings.keep_every is None else last // settings.keep_every
        at_once = min(present + to_come, settings.keep + 1 + for_ever)
        return DiskNeeds(each, at_once, max(at_once - present, 0) * each, self._shelf.free_bytes())

    def _pieces(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[list[Piece], list[Piece]]:
        """Of weights and moments."""
        rank, world = self.runtime.rank, self.runtime.world_size

        def pieces(tensors: Mapping[str, Tensor]) -> list[Piece]:
            return [Piece.of(name, tensor, rank=rank, world_size=world) for name, tensor in tensors.items()]

        return pieces(model.state_dict()), pieces(optimizer_tensors(model, optimizer))

    def _retain(self) -> None:
        """Keep the newest `keep` and, for ever, multiples of `keep_every`."""
        milestone = self.config.checkpoint.keep_every
        for old in list_checkpoints(self.folder)[: -self.config.checkpoint.keep]:
            if milestone is None or step_of(old) % milestone:
                self._shelf.remove(old)

    def _explained(self, failure: Exception, final: Location) -> Exception:
        """The same, told with what is still there; a bug stays a bug."""
        if not isinstance(failure, UserError | OSError):
            return RuntimeError(f"{final} could not be written")
        try:
            last = self._shelf.checkpoints()
            safe = f"the last intact checkpoint is {last[-1]}" if last else "there is no earlier checkpoint"
        except OSError:
            safe = f"{self.folder} cannot be read, either"
        reason = failure.strerror if isinstance(failure, OSError) and failure.strerror else failure
        return UserError(f"could not save {final}: {reason}\n  {safe}; mend it and run the same command again")


@contextmanager
def _told(folder: Location) -> Iterator[None]:
    """Errors of the file system as the user's."""
    try:
        yield
    except OSError as error:
        raise UserError(f"checkpoints cannot be kept in {folder}: {error.strerror or error}") from error
