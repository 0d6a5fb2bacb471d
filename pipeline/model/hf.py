"""To and from Hugging Face checkpoints: safetensors, config.json and tokenizer files, without `transformers`.

In: a `Decoder`, or a folder that `AutoModelForCausalLM` reads. Out: the other one. See hf_families.py for what fits.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.model.hf_families import FAMILIES, Entry, Family, FolderConfig, Settings, entries
from pipeline.model.transformer import Decoder, build_without_memory, check_size, give_memory
from pipeline.untrusted import FileName, check_regular, read_json, shown

T = TypeVar("T")

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# Buffers of old versions of transformers, not weights.
_BUFFERS = re.compile(r"(\.attn\.(masked_)?bias|rotary_emb\.inv_freq)$")


def save_hf(model: Decoder, folder: Path, *, tokenizer_files: Mapping[str, bytes], eos_id: int) -> None:
    """Write `folder` so that `AutoModelForCausalLM` and `AutoTokenizer` read it: float32 weights, no padding rows.

    `tokenizer_files`: those of the tokenizer, by name. The folder appears complete or not at all. Raises `UserError`
    for a folder in use, and a model that no architecture of Hugging Face's expresses, with all that does not fit.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: name a new one")
    family, settings = _family_of(model.config)
    ends = {"bos_token_id": eos_id, "eos_token_id": eos_id}  # a document of the training data begins after an EOS
    files: dict[str, Settings] = {
        "config.json": {
            "architectures": [family.architecture],
            **settings,
            "vocab_size": model.n_tokens,
            "tie_word_embeddings": model.config.tie_embeddings,
            "initializer_range": model.config.init_std,
            "dtype": "float32",
            **ends,
        },
        "generation_config.json": ends,
    }
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        save_file(_their_tensors(model, family), partial / WEIGHTS, metadata={"format": "pt"})
        (partial / WEIGHTS).chmod(partial.stat().st_mode & 0o666)  # safetensors leaves 0600, whatever the umask
        for name, data in tokenizer_files.items():
            (partial / name).write_bytes(data)
        for name, content in files.items():
            (partial / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_hf(folder: Path) -> Decoder:
    """Read a folder that `transformers` saved, sharded or not: float32 weights on the CPU, in evaluation mode.

    `n_tokens` is its vocab_size. Dropout, a setting of training, is 0. Raises `UserError` for missing or damaged
    files and for everything about the model that ours would compute differently.
    """
    values = _read_config(folder)
    named = (values.get("architectures") or ["none"])[0]
    family = next((family for family in FAMILIES if family.architecture == named), None)
    if family is None:
        supported = ", ".join(family.architecture for family in FAMILIES)
        raise UserError(f"{folder} holds the architecture {shown(named)}; supported: {supported}")
    config, n_tokens = _our_config(values, family, origin=folder / "config.json")
    files = _TensorFiles(folder)
    check_size(config, n_tokens=n_tokens, tensors=len(files.shapes), where=str(folder))
    model = build_without_memory(config, n_tokens=n_tokens)
    places = _places(model, family, files, tied=config.tie_embeddings)
    model = give_memory(model, torch.device("cpu")).eval()
    _fill(model, places, files)
    return model


def is_hf_folder(folder: Path) -> bool:
    """Whether `folder` describes itself as a Hugging Face checkpoint."""
    return (folder / "config.json").is_file()


def _family_of(config: ModelConfig) -> tuple[Family, Settings]:
    refusals = []
    for family in FAMILIES:
        settings, misfits = family.settings(config)
        if not misfits:
            return family, settings
        refusals.append(f"  {family.architecture}: {'; '.join(misfits)}")
    raise UserError("no architecture of Hugging Face's that we write fits this model:\n" + "\n".join(refusals))


def _our_config(values: Settings, family: Family, *, origin: Path) -> tuple[ModelConfig, int]:
    try:
        settings, misfits = family.parse(values)
        n_tokens: int = values["vocab_size"]
    except KeyError as error:
        raise UserError(f"{origin} lacks or garbles {error}, a setting of {family.architecture}") from None
    if values.get("quantization_config") is not None:
        misfits.append("quantization_config (supported: float weights)")
    if misfits:
        raise UserError(f"{origin} asks for what this model does not have: {'; '.join(misfits)}")
    try:
        return ModelConfig.model_validate(settings), n_tokens
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise UserError(f"{origin}: {faults}") from None


@torch.no_grad()
def _parts(model: Decoder) -> dict[str, Tensor]:
    """Views of the model's parameters, with keys and values apart and without the padding of the vocabulary."""
    parts: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if ".key_value." in name:
            parts[name.replace(".key_value.", ".key.")], parts[name.replace(".key_value.", ".value.")] = tensor.chunk(2)
        elif name in ("embedding.tokens.weight", "head.weight"):
            parts[name] = tensor[: model.n_tokens]
        else:
            parts[name] = tensor
    return parts


def _their_tensors(model: Decoder, family: Family) -> dict[str, Tensor]:
    ours = _parts(model)
    if family.biased:  # a model without biases is one whose biases are zero
        for name, tensor in list(ours.items()):
            if name.startswith("stack.") and name.endswith("weight"):
                ours.setdefault(name.removesuffix("weight") + "bias", tensor.new_zeros(tensor.shape[0]))
    theirs: dict[str, Tensor] = {}
    for entry in entries(family, ours, n_layers=model.config.n_layers):
        tensor = torch.cat([ours.pop(name) for name in entry.ours])
        theirs[entry.theirs] = (tensor.t() if entry.transposed else tensor).float().cpu().contiguous()
    assert not ours, f"{family.architecture} has no place for {sorted(ours)}"
    return theirs


def _places(model: Decoder, family: Family, files: _TensorFiles, *, tied: bool) -> list[tuple[str, Entry]]:
    """Which stored tensor goes where. Raises `UserError` for tensors missing, left over, or of another shape or type.

    The model may be on the meta device: only shapes are looked at.
    """
    ours = _parts(model)
    left, faults, places = set(files.shapes), [], []
    for entry in entries(family, ours, n_layers=model.config.n_layers):
        name = entry.theirs if entry.theirs in files.shapes else entry.theirs.removeprefix(f"{family.base}.")
        parts = [ours[part] for part in entry.ours]
        wanted = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        if name not in files.shapes:
            faults.append(f"{entry.theirs} is missing")
            continue
        left.discard(name)
        shape, kind = files.shapes[name], files.kinds[name]
        if (shape[::-1] if entry.transposed else shape) != wanted or kind not in _FLOATS:
            faults.append(f"{name} is {kind} {shape}, wanted floats {wanted} by config.json")
        places.append((name, entry))
    faults += [
        f"{shown(name)} has no place in the model"
        for name in sorted(left)
        if not _BUFFERS.search(name) and not (tied and name == "lm_head.weight")
    ]
    if faults:
        more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise UserError(f"the tensors in {files.folder} do not fit:\n  " + "\n  ".join(faults[:10]) + more)
    return places


@torch.no_grad()
def _fill(model: Decoder, places: list[tuple[str, Entry]], files: _TensorFiles) -> None:
    """Copy every tensor to its place."""
    for parameter in model.parameters():
        parameter.zero_()  # the rows that pad the vocabulary stay so
    ours = _parts(model)
    for name, entry in places:
        tensor = files.read(name)
        tensor = tensor.t() if entry.transposed else tensor
        for target, part in zip(entry.ours, tensor.chunk(len(entry.ours)), strict=True):  # equal parts, by their shapes
            ours[target].copy_(part)


class _Index(BaseModel):
    weight_map: dict[str, FileName]


class _TensorFiles:
    """The tensors of a folder, in one file or in shards, read one at a time; `shapes` and `kinds` by their headers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / WEIGHTS_INDEX).is_file():
            self._file_of: dict[str, str] | None = dict(_read(_Index, folder / WEIGHTS_INDEX).weight_map)
            files = sorted(set(self._file_of.values()))
        elif (folder / WEIGHTS).exists():
            self._file_of, files = None, [WEIGHTS]
        else:
            raise UserError(f"{folder} has neither {WEIGHTS} nor {WEIGHTS_INDEX}; pickled weights (.bin) are not read")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.kinds: dict[str, str] = {}
        for file in files:
            self._look(file)
        gone = sorted(set(self._file_of or ()) - self.shapes.keys())
        if gone:
            raise UserError(f"{folder / WEIGHTS_INDEX} names {shown(gone[0])}, which its file lacks; get it again")

    def _look(self, name: str) -> None:
        with self._open(name) as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                if self._file_of is None or self._file_of.get(key) == name:
                    part = file.get_slice(key)
                    self.shapes[key], self.kinds[key] = tuple(part.get_shape()), str(part.get_dtype())

    def read(self, name: str) -> Tensor:
        file_name = WEIGHTS if self._file_of is None else self._file_of[name]
        with self._open(file_name) as file:
            try:
                tensor: Tensor = file.get_tensor(name)
            except SafetensorError as error:
                raise UserError(f"cannot read {name} of {self.folder / file_name}: {error}") from None
        return tensor

    def _open(self, name: str) -> Any:
        try:
            check_regular(self.folder / name)
            return safe_open(self.folder / name, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {self.folder / name}: {error}; get it again") from None


def _read(schema: type[T], file: Path) -> T:
    try:
        return read_json(schema, file)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error}") from None


def _read_config(folder: Path) -> Settings:
    return _read(FolderConfig, folder / "config.json").model_dump(exclude_none=True)
