"""The checkpoints of one run: written beside training, counted, and found again.

In: a model, its optimizer, a `TrainState`. Out: a checkpoint (see `checkpoint`) under its final name, or one error on
every rank; the newest that is intact. `flush` does the writing.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from pipeline.config import Config, resolved
from pipeline.errors import UserError, sized
from pipeline.train.processes.pulse import PATIENCE, Elsewhere, is_consequence
from pipeline.train.runtime import Runtime
from pipeline.train.saving.checkpoint import Findings, inspect, list_checkpoints, none_usable, optimizer_tensors
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
        self._closed: set[str] = set()  # names of checkpoints that may not be read
        self._waited = 0.0

    def clean(self) -> None:
        """Make the folder; remove what a killed process left under temporary names, and nothing else.

        Errors: a folder that may not be used, or is not the same one for all ranks.
        """
        if self.runtime.is_main:
            with _told(self.folder):
                self._shelf.make_folder()
                for leftover in self._shelf.leftovers():
                    self._shelf.clear(leftover)
        if self.runtime.world_size > 1:
            self._check_shared()

    def _check_shared(self) -> None:
        """Disks of single nodes would each get a part of every checkpoint, of which none could be read."""
        probe = self.folder / _PROBE
        if self.runtime.is_main:
            with _told(self.folder):
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

    def newest(self, *, scheduled: bool = False) -> Location | None:
        """The newest checkpoint that verifies, the same on all ranks, which share the work of looking.

        Damaged ones are named and set aside, where retention does not count them; those that may not be read are named
        and left. None: there never was one. scheduled: what a stop saved between multiples of `checkpoint.every` is
        taken only where nothing else is left. Errors: there are checkpoints and none of them can be used, or one
        cannot be read for a reason that may pass.
        """
        every = self.config.checkpoint.every
        seen = list_checkpoints(self.folder)
        if scheduled:
            seen.sort(key=lambda checkpoint: (step_of(checkpoint) % every == 0, step_of(checkpoint)))
        with self.runtime.pulse.unhurried("verifying checkpoints"):
            return self._newest([checkpoint.name for checkpoint in seen])

    def _newest(self, seen: list[str]) -> Location | None:
        """The last of `seen`, as the first rank has them, that verifies."""
        names: list[str] = self._channel.exchange({"names": seen})[0]["names"]  # the first rank's view is everybody's
        damaged: list[Location] = []
        for checkpoint in (self.folder / name for name in reversed(names)):
            findings = self._inspected(checkpoint)
            if findings.intact:
                self._closed.discard(checkpoint.name)
                break
            self.runtime.say(findings.told(checkpoint))
            if findings.damage:
                damaged.append(checkpoint)
            else:
                self._closed.add(checkpoint.name)
        else:
            if names:
                raise UserError(none_usable(self.folder))
            return None
        if self.runtime.is_main:
            for one in damaged:
                self._shelf.set_aside(one)
        return checkpoint

    def _inspected(self, checkpoint: Location) -> Findings:
        """What all ranks together found. Errors: on all of them, what one could not read."""
        message: dict[str, Any] = {"damage": [], "closed": [], "failure": ""}
        try:
            found = inspect(checkpoint, part=self.runtime.rank, parts=self.runtime.world_size)
            message.update({"damage": found.damage, "closed": found.closed})
        except UserError as error:
            message["failure"] = str(error)
        heard = self._channel.exchange(message)
        failures = [other["failure"] for other in heard if other["failure"]]
        if failures:
            raise UserError(failures[0])
        damage, closed = (
            tuple(dict.fromkeys(fault for other in heard for fault in other[kind]))  # each once
            for kind in ("damage", "closed")
        )
        return Findings(damage, closed)

    def forget_after(self, step: int) -> None:
        """Remove what was saved after `step`, to which the run has gone back: it would be taken for the newest."""
        if self.runtime.is_main:
            try:
                later = [old for old in self._shelf.checkpoints() if step_of(old) > step]
                self._remove([old for old in later if old.name not in self._closed], self._shelf.remove)
            except Exception as error:  # the run has what it needs; `_retain` does not count them
                self.runtime.say(f"warning: checkpoints after step {step} could not be removed: {error}")

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
        retain = partial(self._retain, state.step)
        flush = Flush(save, shelf=self._shelf, channel=self._channel, retain=retain, version=FORMAT)
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

    @contextmanager
    def completing(self) -> Iterator[None]:
        """Where training fails within, the checkpoint under way is completed before the error goes on its way.

        Ranks write on threads of their own, which go on while a rank that has not failed waits for this one in
        training. It takes at most half the time after which such a rank would call this one hung; alone three times
        as long as a step may take. What was not completed is told beside the error.
        """
        try:
            yield
        except Exception as error:
            flush = self._flush
            if flush is not None and flush.ident is not None:
                pulse, alone = self.runtime.pulse, self.runtime.world_size == 1
                # where another rank is gone, no thread can go on
                gone = not alone and is_consequence(error) and not isinstance(error, Elsewhere)
                with pulse.unhurried(f"waiting until step {flush.save.step} is saved, after a failure"):
                    flush.join(0.0 if gone else pulse.limit / 2 * (PATIENCE if alone else 1.0))
                try:
                    self._complete(flush)
                except Exception as second:
                    _tell_beside(error, str(second))
            raise

    def _complete(self, flush: Flush) -> None:
        """As `finish`, of one that was waited for. Errors: also that it is not done yet, and so lost."""
        if flush.is_alive():
            self._flush = None
            raise UserError(f"{self._shelf.final(flush.save.step)} was being written and is lost")
        self.finish()

    def reserve(self, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Begin to make the host memory that copies of this rank's share will need, where making it takes long."""
        if not self.config.checkpoint.asynchronous:
            return
        flats = ([piece.written() for piece in pieces] for pieces in self._pieces(model, optimizer))
        weights, moments = (sum(flat.nbytes for flat in part if flat.device.type == "cuda") for part in flats)
        if weights:
            self._host.reserve(weights + (moments or _MOMENTS * weights))

    def requirements(self, state: TrainState, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> DiskNeeds:
        """What the checkpoints from `state` to the end of the run need, moments not yet made included."""
        weights, moments = (total_bytes(pieces) for pieces in self._pieces(model, optimizer))
        each = weights + (moments or _MOMENTS * weights)
        settings, last = self.config.checkpoint, self.config.total_steps
        present = [step_of(checkpoint) for checkpoint in list_checkpoints(self.folder)]
        first = state.step - state.step % settings.every + settings.every
        to_come = {*range(first, last + 1, settings.every), *([last] if last > state.step else [])}
        at_once = len(present)
        if to_come:
            # There are most while the first is written, when older ones are not yet removed, or the last one, when
            # most are kept for ever: the newest `keep` before it, and of those before them the milestones.
            before = sorted({*present, *to_come})[:-1]
            for_ever = [step for step in before[: -settings.keep] if self._is_milestone(step)]
            at_once = max(len(present) + 1, len(before[-settings.keep :]) + len(for_ever) + 1)
        return DiskNeeds(each, at_once, (at_once - len(present)) * each, self._shelf.free_bytes())

    def _pieces(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[list[Piece], list[Piece]]:
        """Of weights and moments."""
        rank, world = self.runtime.rank, self.runtime.world_size

        def pieces(tensors: Mapping[str, Tensor]) -> list[Piece]:
            return [Piece.of(name, tensor, rank=rank, world_size=world) for name, tensor in tensors.items()]

        return pieces(model.state_dict()), pieces(optimizer_tensors(model, optimizer))

    def _retain(self, saved: int) -> None:
        """Keep the newest `keep` up to step `saved` and, for ever, multiples of `keep_every`.

        Also the one that a spike would send the run back to. What was removed in part goes first. Errors: the first
        one, after all that can be removed is.
        """
        settings = self.config.checkpoint
        self._closed.discard(self._shelf.final(saved).name)  # written anew
        counted = [old for old in self._shelf.checkpoints() if step_of(old) <= saved and old.name not in self._closed]
        kept = counted[-settings.keep :]
        if self.config.train.rolls_back:
            kept += [old for old in counted if step_of(old) % settings.every == 0][-1:]
        surplus = [old for old in counted if old not in kept and not self._is_milestone(step_of(old))]
        under_way = self._shelf.workplace(saved)
        halves = [place for place in self._shelf.leftovers() if place != under_way]
        try:
            self._remove(halves, self._shelf.clear)
        finally:
            self._remove(surplus, self._shelf.remove)

    def _is_milestone(self, step: int) -> bool:
        every = self.config.checkpoint.keep_every
        return every is not None and step % every == 0

    @staticmethod
    def _remove(places: list[Location], remove: Callable[[Location], None]) -> None:
        """All of them. Errors: the first one, after the others were tried."""
        first: Exception | None = None
        for place in places:
            try:
                remove(place)
            except Exception as error:  # clients of object stores have errors of their own
                first = first or error
        if first is not None:
            raise first

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


def _tell_beside(error: Exception, text: str) -> None:
    """Have a second failure told with `error`, which stays what it is."""
    match error:
        case UserError():
            error.args = (f"{error}\n  {text}",)
        case OSError() if error.strerror:
            error.strerror += f"\n  {text}"
        case _:
            error.add_note(text)


@contextmanager
def _told(folder: Location) -> Iterator[None]:
    """Errors of the file system as the user's."""
    try:
        yield
    except OSError as error:
        raise UserError(f"checkpoints cannot be kept in {folder}: {error.strerror or error}") from error
