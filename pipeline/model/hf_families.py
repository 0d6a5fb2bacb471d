"""The architectures of Hugging Face that our decoder can be: their names of tensors and their settings.

In: a `ModelConfig`, or the content of a config.json. Out: the other one, with the list of what does not fit.
GPT-2, Llama and Qwen3 (Llama with normalised queries and keys).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from pipeline.config import ModelConfig
from pipeline.untrusted import shown

Settings = dict[str, Any]

_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu2": "relu2"}
_SYNONYMS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}  # other spellings that GPT-2 folders use


class _Checked(BaseModel):
    """Types as they are written: no text or bool stands for a number. Keys that are not named may be anything."""

    model_config = ConfigDict(strict=True, extra="allow")


Size = Annotated[int, Field(gt=0, lt=2**31)]
Real = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Rope(_Checked):
    """Settings of rotary positions."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Real | None = None


class FolderConfig(_Checked):
    """A config.json, as far as the families below read it."""

    architectures: list[str] | None = None
    vocab_size: Size | None = None
    n_layer: Size | None = None
    n_head: Size | None = None
    n_embd: Size | None = None
    n_inner: Size | None = None
    n_positions: Size | None = None
    activation_function: str | None = None
    layer_norm_epsilon: Real | None = None
    num_hidden_layers: Size | None = None
    num_attention_heads: Size | None = None
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    hidden_size: Size | None = None
    intermediate_size: Size | None = None
    max_position_embeddings: Size | None = None
    rms_norm_eps: Real | None = None
    rope_theta: Real | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    layer_types: list[str] | None = None
    tie_word_embeddings: bool | None = None


@dataclass(frozen=True)
class Family:
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
    biased: bool
    """Every module of a layer, and the last norm, has a bias."""
    settings: Callable[[ModelConfig], tuple[Settings, list[str]]]
    """config.json for our settings, and what it cannot express."""
    parse: Callable[[Settings], tuple[Settings, list[str]]]
    """Our settings for a config.json, and what we cannot express."""


@dataclass(frozen=True)
class Entry:
    """One tensor there and the equal parts of it here."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool


def entries(family: Family, ours: Collection[str], *, n_layers: int) -> Iterator[Entry]:
    """How each parameter of a model with the parameters named `ours` is stored by `family`."""
    modules: list[tuple[str, tuple[str, ...], bool]] = [
        (f"{family.base}.{theirs}", (mine,), False) for theirs, mine in family.top.items()
    ]
    for i in range(n_layers):
        prefix = f"{family.base}.{family.layers}.{i}."
        for theirs, mine in family.block.items():
            modules.append((prefix + theirs, tuple(f"stack.blocks.{i}.{m}" for m in mine), family.transposed))
    modules.append(("lm_head", ("head",), False))
    for theirs, names, transposed in modules:
        for kind in ("weight", "bias"):
            if f"{names[0]}.{kind}" in ours:
                yield Entry(f"{theirs}.{kind}", tuple(f"{name}.{kind}" for name in names), transposed)


def _gpt2_settings(config: ModelConfig) -> tuple[Settings, list[str]]:
    misfits = _misfits(
        config,
        norm=("layernorm",),
        position=("learned",),
        mlp=tuple(_ACTIVATIONS),
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
        misfits.append(f"activation_function {shown(activation)} (supported: {', '.join(sorted(mlp))})")
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
    misfits += _layer_types(values)
    ropes: list[Settings] = [values.get("rope_scaling") or {}, values.get("rope_parameters") or {}]
    kinds = {str(rope.get("rope_type", rope.get("type", "default"))) for rope in ropes} - {"default"}
    if kinds:
        misfits.append(f"scaled rotary positions {shown(' and '.join(sorted(kinds)))} (supported: default)")
    for rope in (values, *ropes):
        misfits += _differing(rope, {"partial_rotary_factor": 1.0})
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
        "rope_theta": ropes[1].get("rope_theta", values.get("rope_theta", 10000.0)),
        "mlp": "swiglu",
        "bias": False,
        "tie_embeddings": values.get("tie_word_embeddings", False),
    }, misfits


def _differing(values: Settings, wanted: Settings) -> list[str]:
    """Keys present with another value than the one that is the default there and the only one here."""
    return [
        f"{key} {shown(values[key])} (supported: {value!r})"
        for key, value in wanted.items()
        if values.get(key) is not None and values[key] != value
    ]


def _layer_types(values: Settings) -> list[str]:
    kinds = sorted(set(values.get("layer_types") or ()) - {"full_attention"})
    return [f"layer_types {shown(', '.join(kinds))} (supported: full_attention)"] if kinds else []


_LLAMA_BLOCK = {
    "input_layernorm": ("attention_norm",),
    "self_attn.q_proj": ("attention.query",),
    "self_attn.k_proj": ("attention.key",),
    "self_attn.v_proj": ("attention.value",),
    "self_attn.o_proj": ("attention.out",),
    "post_attention_layernorm": ("mlp_norm",),
    "mlp.gate_proj": ("mlp.gate",),
    "mlp.up_proj": ("mlp.up",),
    "mlp.down_proj": ("mlp.down",),
}
_LLAMA_TOP = {"embed_tokens": "embedding.tokens", "norm": "stack.final_norm"}

FAMILIES = (
    Family(
        architecture="GPT2LMHeadModel",
        base="transformer",
        layers="h",
        top={"wte": "embedding.tokens", "wpe": "embedding.positions", "ln_f": "stack.final_norm"},
        block={
            "ln_1": ("attention_norm",),
            "attn.c_attn": ("attention.query", "attention.key", "attention.value"),
            "attn.c_proj": ("attention.out",),
            "ln_2": ("mlp_norm",),
            "mlp.c_fc": ("mlp.up",),
            "mlp.c_proj": ("mlp.down",),
        },
        transposed=True,
        biased=True,
        settings=_gpt2_settings,
        parse=_parse_gpt2,
    ),
    Family(
        architecture="LlamaForCausalLM",
        base="model",
        layers="layers",
        top=_LLAMA_TOP,
        block=_LLAMA_BLOCK,
        transposed=False,
        biased=False,
        settings=_llama_settings,
        parse=_parse_llama,
    ),
    Family(
        architecture="Qwen3ForCausalLM",
        base="model",
        layers="layers",
        top=_LLAMA_TOP,
        block={
            **_LLAMA_BLOCK,
            "self_attn.q_norm": ("attention.query_norm",),
            "self_attn.k_norm": ("attention.key_norm",),
        },
        transposed=False,
        biased=False,
        settings=_qwen3_settings,
        parse=_parse_qwen3,
    ),
)
