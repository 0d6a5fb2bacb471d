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
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.model.hf_families import FAMILIES, Family, Settings, entries
from pipeline.model.transformer import Decoder, build_model

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
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
    values = _read_json(folder / "config.json")
    named = (values.get("architectures") or ["none"])[0]
    family = next((family for family in FAMILIES if family.architecture == named), None)
    if family is None:
        supported = ", ".join(family.architecture for family in FAMILIES)
        raise UserError(f"{folder} holds the architecture {named}; supported: {supported}")
    config, n_tokens = _our_config(values, family, origin=folder / "config.json")
    model = build_model(config, n_tokens=n_tokens).eval()
    _fill(model, family, _TensorFiles(folder), tied=config.tie_embeddings)
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
        n_tokens = int(values["vocab_size"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{origin} lacks or garbles a setting of {family.architecture}: {error}") from None
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


@torch.no_grad()
def _fill(model: Decoder, family: Family, files: _TensorFiles, *, tied: bool) -> None:
    """Copy every tensor to its place; none may be missing, left over or of another shape."""
    for parameter in model.parameters():
        parameter.zero_()  # the rows that pad the vocabulary stay so
    ours = _parts(model)
    left, faults = set(files.names), []
    for entry in entries(family, ours, n_layers=model.config.n_layers):
        name = entry.theirs if entry.theirs in files.names else entry.theirs.removeprefix(f"{family.base}.")
        places = [ours[part] for part in entry.ours]
        shape = (sum(place.shape[0] for place in places), *places[0].shape[1:])
        if name not in files.names:
            faults.append(f"{entry.theirs} is missing")
            continue
        left.discard(name)
        tensor = files.read(name)
        tensor = tensor.t() if entry.transposed else tensor
        if tensor.shape != shape or not tensor.is_floating_point():
            faults.append(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, wanted floats {shape} by config.json")
            continue
        for place, part in zip(places, tensor.chunk(len(places)), strict=True):  # equal parts, by their shapes
            place.copy_(part)
    faults += [
        f"{name} has no place in the model"
        for name in sorted(left)
        if not _BUFFERS.search(name) and not (tied and name == "lm_head.weight")
    ]
    if faults:
        more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise UserError(f"the tensors in {files.folder} do not fit:\n  " + "\n  ".join(faults[:10]) + more)


class _TensorFiles:
    """The tensors of a folder, in one file or in shards, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / WEIGHTS_INDEX).is_file():
            weight_map = _read_json(folder / WEIGHTS_INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"{folder / WEIGHTS_INDEX} has no 'weight_map'")
            self._file_of: dict[str, str] = weight_map
        elif (folder / WEIGHTS).is_file():
            with self._open(WEIGHTS) as file:
                self._file_of = dict.fromkeys(file.keys(), WEIGHTS)
        else:
            raise UserError(f"{folder} has neither {WEIGHTS} nor {WEIGHTS_INDEX}; pickled weights (.bin) are not read")

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def read(self, name: str) -> Tensor:
        with self._open(self._file_of[name]) as file:
            try:
                tensor: Tensor = file.get_tensor(name)
            except SafetensorError as error:
                raise UserError(f"cannot read {name} of {self.folder / self._file_of[name]}: {error}") from None
        return tensor

    def _open(self, name: str) -> Any:
        try:
            return safe_open(self.folder / name, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {self.folder / name}: {error}; get it again") from None


def _read_json(file: Path) -> Settings:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold a JSON object, got a {type(content).__name__}")
    return content
