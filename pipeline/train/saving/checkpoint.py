"""Checkpoints: a folder that bears its final name only when it is complete and verified.

    step-00001000/model/00001-of-00004.safetensors       weights under the plain model's names
                  optimizer/00001-of-00004.safetensors   moments, named <parameter>.<moment>
                  state.json  config.yaml  tokenizer.json
                  manifest.json                          size and xxh3-128 of every file, written last

In: such a folder, a model, its optimizer. Out: what they hold, on any number of ranks and under any strategy, whatever
wrote it. `store` writes them, `pieces` says which rank writes and reads what, `storage` where they lie.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from pipeline.cli import config_from_values
from pipeline.config import Config
from pipeline.errors import UserError, nearest
from pipeline.model.transformer import Decoder, build_without_memory, check_size, give_memory
from pipeline.train.saving.manifest import read_manifest
from pipeline.train.saving.pieces import Piece, StoredTensor, check_fit, read_headers, read_tensor
from pipeline.train.saving.storage import (
    MANIFEST,
    Location,
    Shelf,
    entries,
    fingerprint,
    is_file,
    is_folder,
    locate,
    names_a_checkpoint,
    read_bytes,
    size_of,
)
from pipeline.train.state import FORMAT, TrainState
from pipeline.untrusted import (
    LARGEST_YAML,
    DamagedFileError,
    IrregularFileError,
    Object,
    check,
    parse_json,
    parse_yaml,
    shown,
)

PAUSES = (0.2, 1.0, 5.0)  # seconds before a file that could not be read is tried again
LASTING = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)  # trying again tells the same

Read = TypeVar("Read")


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer holds per parameter, {<parameter>.<moment>: tensor}; nothing before its first update.

    Counts of updates are left out: state.json has them.
    """
    found = {}
    for name, parameter in _parameters(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.dim():
                assert value.shape == parameter.shape, f"{name}.{key} is {value.shape}, its parameter {parameter.shape}"
                found[f"{name}.{key}"] = value
    return found


def restore(checkpoint: Location, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Read weights and moments in place, each rank its rows only; the count of updates comes from state.json.

    Moments are made as the checkpoint has them, so an optimizer needs none before. Errors: anything that does not fit.
    """
    state = read_state(checkpoint)
    weights = _read_weights(checkpoint, model)
    moments = _headers(checkpoint, "optimizer")
    targets = _make_moments(moments, weights, model=model, optimizer=optimizer, updates=state.updates)
    _read_tensors(moments, targets, where=checkpoint)
    return state


def restore_weights(checkpoint: Location, *, model: nn.Module) -> TrainState:
    """Read weights in place, each rank its rows only. Errors: anything that does not fit."""
    state = read_state(checkpoint)
    _read_weights(checkpoint, model)
    return state


def load_model(checkpoint: Location, *, device: torch.device) -> tuple[Decoder, Config]:
    """The trained model of a checkpoint folder, in float32 and evaluation mode, on one process."""
    config, n_tokens = read_config(checkpoint), read_state(checkpoint).n_tokens
    stored = _headers(checkpoint, "model")
    check_size(config.model, n_tokens=n_tokens, tensors=len(stored), where=str(checkpoint))
    model = build_without_memory(config.model, n_tokens=n_tokens)
    check_fit(stored, model.state_dict(), where=checkpoint)
    model = give_memory(model, device)
    _read_tensors(stored, dict(model.state_dict()), where=checkpoint)
    return model.eval(), config


def resolve_checkpoint(path: str | Path) -> Location:
    """A checkpoint itself, or the newest intact one of a run folder or of a folder of checkpoints."""
    place = locate(path)
    if not is_folder(place):
        siblings = [str(sibling) for sibling in entries(place.parent)] if is_folder(place.parent) else []
        raise UserError(f"no folder {place}{nearest(str(place), siblings)}")
    if names_a_checkpoint(place) or is_file(place / "state.json"):
        findings = inspect(place)
        if not findings.intact:
            what = "is damaged" if findings.damage else "may not be read"
            raise UserError(f"checkpoint {place} {what}: {'; '.join((*findings.damage, *findings.closed))}")
        return place
    folder = place
    if not Shelf.at(place).checkpoints():
        settings = place / "config.yaml"
        folder = checkpoint_folder(_read_settings(settings), place) if is_file(settings) else place / "checkpoints"
    newest = newest_intact(folder, warn=_to_stderr)
    if newest is None:
        raise UserError(f"{place} is neither a checkpoint nor a run with one in {folder}")
    return newest


def checkpoint_folder(config: Config, run: Location | None = None) -> Location:
    """Where the checkpoints of a run are kept: where its settings say, or in its folder, which may have been moved."""
    elsewhere = config.checkpoint.folder
    return (run or Path(config.run_dir)) / "checkpoints" if elsewhere is None else locate(elsewhere)


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)


def newest_intact(folder: Location, *, warn: Callable[[str], None]) -> Location | None:
    """The newest checkpoint that verifies; damaged ones are named through `warn`. None: there never was one.

    Errors: there are checkpoints and all of them are damaged.
    """
    found = list_checkpoints(folder)
    for checkpoint in reversed(found):
        findings = inspect(checkpoint)
        if findings.intact:
            return checkpoint
        warn(findings.told(checkpoint))
    if found:
        raise UserError(none_usable(folder))
    return None


def none_usable(folder: Location) -> str:
    """What is said when nothing is left to go on from."""
    return (
        f"every checkpoint in {folder} is damaged or may not be read; mend that or move the folder away to start over"
    )


def list_checkpoints(folder: Location) -> list[Location]:
    """Complete ones, oldest first; none where there is no folder. Errors: a folder that may not be read."""
    try:
        return Shelf.at(folder).checkpoints()
    except OSError as error:  # taken for an empty folder, it would start the run anew
        raise UserError(f"the checkpoints in {folder} cannot be listed: {error.strerror or error}") from error


def verify(checkpoint: Location) -> list[str]:
    """What is wrong with a checkpoint: file, expected and found; empty when it is intact. Errors: as `inspect`."""
    findings = inspect(checkpoint)
    return [*findings.damage, *findings.closed]


@dataclass(frozen=True)
class Findings:
    """What speaks against a checkpoint. damage: files that are lost or changed. closed: ones that may not be read."""

    damage: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()

    @property
    def intact(self) -> bool:
        """Whether a run may go on from it."""
        return not self.damage and not self.closed

    def told(self, checkpoint: Location) -> str:
        """What is said of a checkpoint that is not intact."""
        what = "is damaged and passed over" if self.damage else "may not be read and is passed over, left as it is"
        return f"warning: checkpoint {checkpoint} {what}: {'; '.join((*self.damage, *self.closed))}"


def inspect(checkpoint: Location, *, part: int = 0, parts: int = 1) -> Findings:
    """Compare a checkpoint's files with its manifest; of `parts` who share the work each looks at its part of them.

    Errors: a file that cannot be read for a reason that may pass, though it was tried several times: then nobody knows
    whether the checkpoint is good, and to take it for a damaged one would throw good work away.
    """
    try:
        expected = _patiently(read_manifest, checkpoint, file=checkpoint / MANIFEST)
    except FileNotFoundError:
        return Findings(damage=(f"{MANIFEST} is missing",))
    except DamagedFileError as error:
        return Findings(damage=(str(error),))
    except OSError as error:
        return Findings(closed=(f"{MANIFEST}: {error.strerror or error}",))
    damage: list[str] = []
    closed: list[str] = []
    for name, wanted in list(expected.items())[part::parts]:
        expected_size = f"{name}: expected {wanted['bytes']} bytes with checksum {wanted['xxh3_128']}"
        try:
            size = _patiently(size_of, checkpoint / name, file=checkpoint / name)
            if size != wanted["bytes"]:  # then its content says nothing, and there may be very much of it
                damage.append(f"{expected_size}, found {size} bytes")
                continue
            found = _patiently(fingerprint, checkpoint / name, file=checkpoint / name)
        except IrregularFileError as error:
            damage.append(str(error))
            continue
        except OSError as error:
            (damage if isinstance(error, FileNotFoundError) else closed).append(f"{name}: {error.strerror or error}")
            continue
        if found != wanted:
            damage.append(f"{expected_size}, found {found['bytes']} bytes with {found['xxh3_128']}")
    return Findings(tuple(damage), tuple(closed))


def _patiently(read: Callable[[Location], Read], of: Location, *, file: Location) -> Read:
    """Read again what could not be read for a reason that may pass: a stale handle, a time-out, a shaken network.

    Errors: ValueError, and those OSErrors that say what will not pass (`LASTING`); a `UserError` for all others.
    """
    for pause in (*PAUSES, None):
        try:
            return read(of)
        except (*LASTING, ValueError):
            raise
        except Exception as error:
            if not isinstance(error, OSError) and isinstance(file, Path):
                raise  # a bug; clients of object stores have errors of their own
            if pause is None:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
                raise UserError(
                    f"{file} cannot be read after {len(PAUSES) + 1} tries: {reason}. Whether the checkpoint is damaged "
                    "is not known, so nothing was changed\n  look at the file system or the network and run the same "
                    "command again; if it stays so, move that checkpoint away to go on from an earlier one"
                ) from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def read_state(checkpoint: Location) -> TrainState:
    """state.json, checked."""
    path = checkpoint / "state.json"
    try:
        values = parse_json(Object, read_bytes(path), origin=path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if values.get("format") != FORMAT:  # first: another format has other keys
        raise UserError(
            f"{checkpoint} has format {shown(values.get('format'))}, this version reads {FORMAT}: "
            "go on with the version that wrote it, or start another run"
        )
    return check(TrainState, values, origin=path)


def read_config(checkpoint: Location) -> Config:
    """The settings that the checkpoint was written under."""
    return _read_settings(checkpoint / "config.yaml")


def _read_settings(file: Location) -> Config:
    try:
        content = read_bytes(file, limit=LARGEST_YAML)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    return config_from_values(parse_yaml(content, origin=file), origin=str(file))


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Under plain names. Through state_dict, which also brings FSDP's parameters back to their sharded form."""
    tensors = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}


def _read_weights(checkpoint: Location, model: nn.Module) -> dict[str, StoredTensor]:
    stored = _headers(checkpoint, "model")
    _read_tensors(stored, dict(model.state_dict()), where=checkpoint)
    return stored


def _headers(checkpoint: Location, part: str) -> dict[str, StoredTensor]:
    """What the manifest's files of a part hold: a stray file, from a copy of another checkpoint, is never opened."""
    try:
        named = read_manifest(checkpoint)
    except OSError as error:
        raise UserError(f"{checkpoint / MANIFEST} cannot be read: {error}") from None
    files = [checkpoint / name for name in named if name.startswith(f"{part}/")]
    try:
        return read_headers(files, folder=checkpoint / part)
    except OSError as error:
        raise UserError(f"{checkpoint} cannot be read: {error}") from error


def _make_moments(
    stored: dict[str, StoredTensor],
    weights: dict[str, StoredTensor],
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    updates: int,
) -> dict[str, Tensor]:
    """Room for the moments that are stored, in place of all that the optimizer held."""
    parameters = _parameters(model)
    group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    optimizer.state.clear()
    targets = {}
    for name, moment in stored.items():
        of, _, key = name.rpartition(".")
        parameter = parameters.get(of)
        if parameter is None or parameter not in group_of:
            continue  # reported as too many
        # In the parameter's precision where it was so before, which may have been another.
        dtype = parameter.dtype if moment.dtype == weights[of].dtype else moment.dtype
        targets[name] = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        state = optimizer.state[parameter]
        state[key] = targets[name]
        on_device = group_of[parameter].get("fused") or group_of[parameter].get("capturable")
        if "betas" in group_of[parameter]:  # Adam's kind corrects its bias by a count of updates
            device = parameter.device if on_device else torch.device("cpu")
            state["step"] = torch.tensor(float(updates), dtype=torch.float32, device=device)
    return targets


def _read_tensors(stored: dict[str, StoredTensor], targets: dict[str, Tensor], *, where: Location) -> None:
    check_fit(stored, targets, where=where)
    for name, tensor in targets.items():
        try:
            read_tensor(stored[name], Piece.of(name, tensor, rank=0, world_size=1))
        except OSError as error:
            raise UserError(f"{where} cannot be read: {error}") from error
