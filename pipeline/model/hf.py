"""To and from Hugging Face checkpoints: safetensors, config.json and tokenizer files, without `transformers`.

In: a `Decoder`, or a folder that `AutoModelForCausalLM` reads. Out: the other one. GPT-2, Llama and Qwen3 (Llama
with normalised queries and keys) are expressed; anything else is refused with the list of what does not fit.
Sections: names of tensors, settings, writing, reading.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.model.transformer import Decoder, build_model

Settings = dict[str, Any]

_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu2": "relu2"}
_SYNONYMS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}  # other spellings that GPT-2 folders use
# Buffers of old versions of transformers, not weights.
_BUFFERS = re.compile(r"(\.attn\.(masked_)?bias|rotary_emb\.inv_freq)$")


@dataclass(frozen=True)
class _Family:
    """How an architecture names things. Modules are written without the `base` prefix, which some files lack."""

    architecture: str
    base: str
    layers: str
    top: Mapping[str, str]
    """Name of a module there -> its name here."""
    block: Mapping[str, tuple[str, ...]]
    """The same inside a layer; several names here are one module there, their outputs side by side."""
    transposed: bool
    """Matrices of layers are stored (in, out), as OpenAI's Conv1D did."""
    settings: Callable[[ModelConfig], tuple[Settings, list[str]]]
    """config.json for our settings, and what it cannot express."""
    parse: Callable[[Settings], tuple[Settings, list[str]]]
    """Our settings for a config.json, and what we cannot express."""


@dataclass(frozen=True)
class _Entry:
    """One tensor there and the equal parts of it here."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool


def _entries(family: _Family, ours: Mapping[str, Tensor], *, n_layers: int) -> Iterator[_Entry]:
    modules = [(f"{family.base}.{theirs}", (mine,), False) for theirs, mine in family.top.items()]
    for i in range(n_layers):
        prefix = f"{family.base}.{family.layers}.{i}."
        for theirs, mine in family.block.items():
            modules.append((prefix + theirs, tuple(f"stack.blocks.{i}.{m}" for m in mine), family.transposed))
    modules.append(("lm_head", ("head",), False))
    for theirs, names, transposed in modules:
        for kind in ("weight", "bias"):
            if f"{names[0]}.{kind}" in ours:
                yield _Entry(f"{theirs}.{kind}", tuple(f"{name}.{kind}" for name in names), transposed)


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


def _gpt2_settings(config: ModelConfig) -> tuple[Settings, list[str]]:
    misfits = _misfits(
        config,
        norm=("layernorm",),
        position=("learned",),
        mlp=tuple(_ACTIVATIONS),
        bias=(True,),
        kv_heads=(config.n_heads,),
        qk_norm=(False,),
    )
    return {
        "model_type": "gpt2",
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_embd": config.d_model,
        "n_inner": config.hidden,
        "n_positions": config.context_length,
        "activation_function": _ACTIVATIONS.get(config.mlp),
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
    }, misfits


def _llama_settings(config: ModelConfig) -> tuple[Settings, list[str]]:
    misfits = _misfits(
        config, norm=("rmsnorm",), position=("rotary",), mlp=("swiglu",), bias=(False,), qk_norm=(False,)
    )
    return {"model_type": "llama", "mlp_bias": False, **_llama_like_settings(config)}, misfits


def _qwen3_settings(config: ModelConfig) -> tuple[Settings, list[str]]:
    misfits = _misfits(config, norm=("rmsnorm",), position=("rotary",), mlp=("swiglu",), bias=(False,), qk_norm=(True,))
    return {"model_type": "qwen3", "use_sliding_window": False, **_llama_like_settings(config)}, misfits


def _llama_like_settings(config: ModelConfig) -> Settings:
    return {
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_size": config.d_model,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.context_length,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # read by transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # and by 5
        "attention_bias": False,
        "attention_dropout": config.dropout,
    }


def _misfits(config: ModelConfig, **accepted: tuple[Any, ...]) -> list[str]:
    """What no family expresses, and the settings that are not among the `accepted` ones."""
    wanted = {"norm_position": ("pre",), "logit_soft_cap": (None,), **accepted}
    found = [
        f"{key} {getattr(config, key)} (it has {' or '.join(map(str, values))})"
        for key, values in wanted.items()
        if getattr(config, key) not in values
    ]
    if any(window is not None and window < config.context_length for window in config.windows):
        found.append(f"windows {list(config.windows)} (it looks back on everything)")
    return found


def _parse_gpt2(values: Settings) -> tuple[Settings, list[str]]:
    activation = values.get("activation_function", "gelu_new")
    mlp = {theirs: mine for mine, theirs in _ACTIVATIONS.items()} | _SYNONYMS
    fixed = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    misfits = _differing(values, fixed)
    if activation not in mlp:
        misfits.append(f"activation_function {activation!r} (supported: {', '.join(sorted(mlp))})")
    return {
        "n_layers": values["n_layer"],
        "n_heads": values["n_head"],
        "d_model": values["n_embd"],
        "d_ff": values.get("n_inner") or 4 * values["n_embd"],
        "context_length": values["n_positions"],
        "norm": "layernorm",
        "norm_eps": values.get("layer_norm_epsilon", 1e-5),
        "position": "learned",
        "mlp": mlp.get(activation, "gelu_tanh"),
        "bias": True,
        "tie_embeddings": values.get("tie_word_embeddings", True),
    }, misfits


def _parse_llama(values: Settings) -> tuple[Settings, list[str]]:
    parsed, misfits = _parse_llama_like(values)
    return parsed, misfits + _differing(values, {"mlp_bias": False})


def _parse_qwen3(values: Settings) -> tuple[Settings, list[str]]:
    parsed, misfits = _parse_llama_like(values)
    return parsed | {"qk_norm": True}, misfits + _differing(values, {"use_sliding_window": False})


def _parse_llama_like(values: Settings) -> tuple[Settings, list[str]]:
    heads, width = values["num_attention_heads"], values["hidden_size"]
    misfits = _differing(values, {"hidden_act": "silu", "attention_bias": False, "head_dim": width // heads})
    rope: Settings = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        misfits.append(f"scaled rotary positions {kind!r} (supported: default)")
    misfits += _differing({**values, **rope}, {"partial_rotary_factor": 1.0})
    return {
        "n_layers": values["num_hidden_layers"],
        "n_heads": heads,
        "n_kv_heads": values.get("num_key_value_heads") or heads,
        "d_model": width,
        "d_ff": values["intermediate_size"],
        "context_length": values["max_position_embeddings"],
        "norm": "rmsnorm",
        "norm_eps": values.get("rms_norm_eps", 1e-6),
        "position": "rotary",
        "rope_theta": rope.get("rope_theta", values.get("rope_theta", 10000.0)),
        "mlp": "swiglu",
        "bias": False,
        "tie_embeddings": values.get("tie_word_embeddings", False),
    }, misfits


def _differing(values: Settings, wanted: Settings) -> list[str]:
    """Keys present with another value than the one that is the default there and the only one here."""
    return [
        f"{key} {values[key]!r} (supported: {value!r})"
        for key, value in wanted.items()
        if values.get(key) is not None and values[key] != value
    ]
