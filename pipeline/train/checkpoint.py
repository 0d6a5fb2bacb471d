"""Checkpoints: a folder that bears its final name only when it is complete and verified.

    step-00001000/model/*.safetensors       weights under the plain model's names
                  optimizer/*.safetensors   moments, named <parameter>.<moment>
                  state.json  config.yaml  tokenizer.json
                  manifest.json             size and xxh3-128 of every file, written last

In: a model, its optimizer, a `TrainState`. Out: that folder, or the state read back from it on any number of
ranks. Tensors go through `torch.distributed.checkpoint` into safetensors; nothing is pickled.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
import xxhash
import yaml
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from pipeline.cli import config_from_values, read_yaml
from pipeline.config import Config, resolved
from pipeline.errors import UserError, nearest
from pipeline.files import fsync_folder
from pipeline.model.transformer import Decoder, build_model
from pipeline.train.runtime import Runtime
from pipeline.train.state import FORMAT, TrainState

_NAME = re.compile(r"step-(\d{8,})")


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, config: Config, *, tokenizer_json: bytes, runtime: Runtime) -> None:
        self.folder = folder
        self.config = config
        self.tokenizer_json = tokenizer_json
        self.runtime = runtime

    def clean(self) -> None:
        """Remove what a killed process left under temporary names; never anything else."""
        if self.runtime.is_main and self.folder.is_dir():
            for leftover in sorted(self.folder.glob(".step-*.partial")) + sorted(self.folder.glob(".step-*.removed")):
                shutil.rmtree(leftover)

    def newest(self) -> Path | None:
        """The newest checkpoint that verifies, on every rank; see `newest_intact`.

        Damaged ones are set aside as `step-N.damaged`, where retention does not count them.
        """
        chosen = newest_intact(self.folder, warn=self.runtime.say)
        self.runtime.barrier()  # every rank has looked before anything is renamed
        if chosen is not None and self.runtime.is_main:
            for damaged in list_checkpoints(self.folder):
                if step_of(damaged) > step_of(chosen):
                    names = (damaged.with_name(f"{damaged.name}.damaged{number or ''}") for number in count())
                    damaged.rename(next(name for name in names if not name.exists()))
        return chosen

    def save(self, state: TrainState, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
        """Write, verify, rename, then apply retention. Errors: a full disk, weights that are not finite.

        Whatever fails, the checkpoints written before are untouched and nothing bears a final name.
        """
        final = self.folder / f"step-{state.step:08d}"
        partial = self.folder / f".{final.name}.partial"
        try:
            if self.runtime.is_main:
                self._begin(partial, model, optimizer)
            self.runtime.barrier()
            _write_tensors(partial / "model", dict(model.state_dict()))
            _write_tensors(partial / "optimizer", optimizer_tensors(model, optimizer))
            self.runtime.barrier()
            if self.runtime.is_main:
                self._commit(partial, final, state)
        except (OSError, CheckpointException) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(self._explain(error, final)) from error
        if self.runtime.is_main:
            self._retain()
        self.runtime.barrier()
        return final

    def _begin(self, partial: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise UserError(f"{name} has values that are not finite: no checkpoint is written of such weights")
        self.folder.mkdir(parents=True, exist_ok=True)
        needed = sum(t.nbytes for t in (*model.state_dict().values(), *optimizer_tensors(model, optimizer).values()))
        free = shutil.disk_usage(self.folder).free
        if free < needed * 1.01:
            raise OSError(errno.ENOSPC, f"{needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free")
        shutil.rmtree(partial, ignore_errors=True)
        for part in ("model", "optimizer"):
            (partial / part).mkdir(parents=True)

    def _commit(self, partial: Path, final: Path, state: TrainState) -> None:
        (partial / "state.json").write_text(state.model_dump_json(indent=2) + "\n", encoding="utf-8")
        text = yaml.safe_dump(resolved(self.config), sort_keys=False)
        (partial / "config.yaml").write_text(text, encoding="utf-8")
        (partial / "tokenizer.json").write_bytes(self.tokenizer_json)
        files = {str(path.relative_to(partial)): _fingerprint(path, sync=True) for path in _files(partial)}
        manifest = partial / "manifest.json"
        manifest.write_text(json.dumps({"format": FORMAT, "files": files}, indent=2) + "\n", encoding="utf-8")
        _fingerprint(manifest, sync=True)
        for folder in (partial / "model", partial / "optimizer", partial):
            fsync_folder(folder)
        faults = verify(partial)
        if faults:
            raise OSError(errno.EIO, "what was written does not read back: " + "; ".join(faults))
        partial.rename(final)
        fsync_folder(self.folder)

    def _retain(self) -> None:
        """Keep the newest `keep` and, for ever, multiples of `keep_every`."""
        milestone = self.config.checkpoint.keep_every
        for old in list_checkpoints(self.folder)[: -self.config.checkpoint.keep]:
            if milestone is None or step_of(old) % milestone:
                removed = old.with_name(f".{old.name}.removed")  # renamed first: no half-deleted final name
                old.rename(removed)
                shutil.rmtree(removed)

    def _explain(self, error: BaseException, final: Path) -> str:
        last = list_checkpoints(self.folder)
        safe = f"the last intact checkpoint is {last[-1]}" if last else "there is no earlier checkpoint"
        reason = error.strerror if isinstance(error, OSError) else str(error).strip().splitlines()[-1]
        return f"could not save {final}: {reason}\n  {safe}; make room and run the same command again"


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments as {<parameter>.<moment>: tensor}, created as zeros where there was no step yet."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            moments = optimizer.state[parameter]
            if not moments:
                moments.update(
                    step=torch.zeros((), dtype=torch.float32, device=parameter.device),
                    exp_avg=torch.zeros_like(parameter, requires_grad=False),
                    exp_avg_sq=torch.zeros_like(parameter, requires_grad=False),
                )
            found.update({f"{name}.{key}": value for key, value in moments.items() if key != "step"})
    return found


def restore(checkpoint: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Read weights and moments in place; the count of updates comes from state.json."""
    state = read_state(checkpoint)
    _read_tensors(checkpoint / "model", dict(model.state_dict()))
    _read_tensors(checkpoint / "optimizer", optimizer_tensors(model, optimizer))
    for moments in optimizer.state.values():
        moments["step"].fill_(float(state.step))
    return state


def load_model(checkpoint: Path, *, device: torch.device) -> tuple[Decoder, Config]:
    """The trained model of a checkpoint folder, in float32 and evaluation mode, on one process."""
    config = read_config(checkpoint)
    model = build_model(config.model, n_tokens=read_state(checkpoint).n_tokens).to(device)
    _read_tensors(checkpoint / "model", dict(model.state_dict()))
    return model.eval(), config


def resolve_checkpoint(path: Path) -> Path:
    """A checkpoint folder itself, or the newest intact checkpoint of a run folder."""
    if not path.is_dir():
        siblings = sorted(str(p) for p in path.parent.glob("*")) if path.parent.is_dir() else []
        raise UserError(f"no folder {path}{nearest(str(path), siblings)}")
    if _NAME.fullmatch(path.name) or (path / "state.json").is_file():
        faults = verify(path)
        if faults:
            raise UserError(f"checkpoint {path} is damaged: {'; '.join(faults)}")
        return path
    newest = newest_intact(path / "checkpoints", warn=_to_stderr)
    if newest is None:
        raise UserError(f"{path} is neither a checkpoint nor a run with one in {path / 'checkpoints'}")
    return newest


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)


def newest_intact(folder: Path, *, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are named through `warn`. None: there never was one.

    Errors: there are checkpoints and all of them are damaged.
    """
    found = list_checkpoints(folder)
    for checkpoint in reversed(found):
        faults = verify(checkpoint)
        if not faults:
            return checkpoint
        warn(f"warning: checkpoint {checkpoint} is damaged and passed over: {'; '.join(faults)}")
    if found:
        raise UserError(f"every checkpoint in {folder} is damaged; move the folder away to start over")
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders under final names, oldest first."""
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def verify(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint folder: file, expected and found; empty when it is intact."""
    try:
        expected = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"manifest.json is missing or unreadable ({type(error).__name__})"]
    faults = []
    for name, wanted in sorted(expected.items()):
        path = checkpoint / name
        try:
            found = _fingerprint(path)
        except OSError as error:
            faults.append(f"{name}: {error.strerror}")
            continue
        if found != wanted:
            faults.append(
                f"{name}: expected {wanted['bytes']} bytes with checksum {wanted['xxh3_128']}, "
                f"found {found['bytes']} bytes with {found['xxh3_128']}"
            )
    return faults


def read_state(checkpoint: Path) -> TrainState:
    """state.json, checked."""
    path = checkpoint / "state.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = values["format"]  # first: another format has other keys
        if found == FORMAT:
            return TrainState.model_validate(values)
    except (OSError, ValueError, KeyError, TypeError) as error:  # pydantic's is a ValueError
        raise UserError(f"{path} cannot be read: {error}") from None
    raise UserError(
        f"{checkpoint} has format {found}, this version reads {FORMAT}: "
        "go on with the version that wrote it, or start another run"
    )


def read_config(checkpoint: Path) -> Config:
    """The settings that the checkpoint was written under."""
    path = checkpoint / "config.yaml"
    return config_from_values(read_yaml(path), origin=str(path))


def _write_tensors(folder: Path, tensors: dict[str, Any]) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _alone_or_not() as alone:
        save(tensors, storage_writer=writer, no_dist=alone)


def _read_tensors(folder: Path, tensors: dict[str, Any]) -> None:
    try:
        with _alone_or_not() as alone:
            load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except CheckpointException as error:
        raise UserError(f"{folder} does not fit this model: {str(error).strip().splitlines()[-1]}") from error


@contextmanager
def _alone_or_not() -> Iterator[bool]:
    """Whether there is no process group; PyTorch would warn of that, each time, as if it were a mistake."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield not torch.distributed.is_initialized()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _fingerprint(path: Path, *, sync: bool = False) -> dict[str, int | str]:
    """Size and checksum; with `sync` the file is also forced to disk."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        if sync:
            os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}
