"""Hugging Face folders, both ways, against `transformers` itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pipeline.config import ModelConfig
from pipeline.data.tokenizer import load_tokenizer
from pipeline.errors import UserError
from pipeline.generate.decode import Options, generate
from pipeline.model.hf import is_hf_folder, load_hf, save_hf
from pipeline.model.transformer import Decoder, build_model, initialise

Files = dict[str, bytes]
N_TOKENS = 257  # no multiple of 64
LLAMA: dict[str, Any] = {"norm": "rmsnorm", "position": "rotary", "mlp": "swiglu", "bias": False}
OURS: list[dict[str, Any]] = [
    {},
    {"mlp": "gelu_tanh", "tie_embeddings": False},
    {"mlp": "relu2", "bias": False, "norm_eps": 1e-3},
    LLAMA,
    {**LLAMA, "n_kv_heads": 2, "tie_embeddings": False, "rope_theta": 500.0, "norm_eps": 1e-3},
    {**LLAMA, "n_kv_heads": 1, "vocab_size": 300},
    {**LLAMA, "n_kv_heads": 2, "qk_norm": True},
]


def make_model(**settings: Any) -> Decoder:
    sizes = {"n_layers": 2, "n_heads": 4, "d_model": 32, "d_ff": 72, "context_length": 64, "init_std": 0.25, **settings}
    model = build_model(ModelConfig.model_validate(sizes), n_tokens=N_TOKENS)
    initialise(model, seed=1)
    scatter_vectors(model)
    return model.eval()


@torch.no_grad()
def scatter_vectors(model: torch.nn.Module) -> None:
    """Norm weights of 1 and biases of 0 would hide a wrong place."""
    stream = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn(parameter.shape, generator=stream) * 0.2)


@pytest.fixture(scope="module")
def tokenizer_files() -> dict[str, bytes]:
    return load_tokenizer("bytes").exported(context_length=64)


@torch.no_grad()
def assert_same_model(ours: Decoder, theirs: Any) -> None:
    tokens = torch.randint(0, N_TOKENS, (3, 64), generator=torch.Generator().manual_seed(3))
    difference = (ours(tokens) - theirs(tokens).logits).abs().max()
    assert difference < 1e-4
    prompt = tokens[:1, :10]
    made = [event.id for event in generate(ours, prompt.tolist(), options=Options(max_new_tokens=50, temperature=0))]
    wanted = theirs.generate(
        prompt, max_new_tokens=50, min_new_tokens=50, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert made == wanted[0, 10:].tolist()
    assert len(set(made)) > 2, "a text of one token proves nothing"


@pytest.mark.parametrize("settings", OURS, ids=str)
def test_ours_in_transformers_and_back(settings: dict[str, Any], tokenizer_files: Files, tmp_path: Path) -> None:
    model, folder = make_model(**settings), tmp_path / "new" / "hf"
    save_hf(model, folder, tokenizer_files=tokenizer_files, eos_id=256)
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.config.vocab_size == theirs.get_input_embeddings().num_embeddings == N_TOKENS
    assert_same_model(model, theirs.eval())
    assert_same_model(load_hf(folder), theirs.eval())
    assert sorted(path.name for path in folder.parent.iterdir()) == ["hf"], "no temporary folder is left"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_theirs_here(family: str, shard: str, tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(4)
    common: dict[str, Any] = {"vocab_size": N_TOKENS, "tie_word_embeddings": tied, "initializer_range": 0.2}
    rotary = {
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
        **common,
    }
    theirs: Any
    if family == "gpt2":
        theirs = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **common))
    elif family == "llama":
        theirs = LlamaForCausalLM(LlamaConfig(**rotary))
    else:
        theirs = Qwen3ForCausalLM(Qwen3Config(**rotary))
    scatter_vectors(theirs)
    theirs.eval().save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    ours = load_hf(tmp_path)
    assert not ours.training
    assert (ours.head is None) == tied
    assert_same_model(ours, theirs)


def test_the_tokenizer_travels_with_its_eos(tokenizer_files: Files, tmp_path: Path) -> None:
    save_hf(make_model(), tmp_path / "hf", tokenizer_files=tokenizer_files, eos_id=256)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "héllo, wörld . 你好 ' s\n"
    assert theirs.encode(text) == load_tokenizer("bytes").encode(text)
    assert theirs.decode(theirs.encode(text)) == text
    assert (theirs.eos_token, theirs.eos_token_id, theirs.model_max_length) == ("<|endoftext|>", 256, 64)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").generation_config.eos_token_id == 256
    assert is_hf_folder(tmp_path / "hf")
    assert load_tokenizer(str(tmp_path / "hf")).end_ids == {256}


def test_weights_of_older_files_load(tokenizer_files: Files, tmp_path: Path) -> None:
    """As openai-community/gpt2 is stored: no prefix, buffers among the weights; Llama folders of transformers 4."""
    model, folder = make_model(), tmp_path / "gpt2"
    save_hf(model, folder, tokenizer_files=tokenizer_files, eos_id=256)
    tensors = load_file(folder / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor.half() for name, tensor in tensors.items()}
    buffers = {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file({**old, **buffers}, folder / "model.safetensors")
    loaded = load_hf(folder)
    assert loaded.embedding.tokens.weight.dtype == torch.float32
    tokens = torch.arange(64)[None]
    torch.testing.assert_close(loaded(tokens), model(tokens), atol=0.05, rtol=0.05)
    model, folder = make_model(**LLAMA, rope_theta=300.0), tmp_path / "llama"
    save_hf(model, folder, tokenizer_files=tokenizer_files, eos_id=256)
    change_config(folder, rope_parameters=None, rope_scaling=None)
    torch.testing.assert_close(load_hf(folder)(tokens), model(tokens))


def test_a_model_that_no_family_expresses_is_refused_with_every_reason(tokenizer_files: Files, tmp_path: Path) -> None:
    model = make_model(norm_position="post", position="sinusoidal", windows=(8,), logit_soft_cap=30.0, n_kv_heads=2)
    with pytest.raises(UserError) as caught:
        save_hf(model, tmp_path / "hf", tokenizer_files=tokenizer_files, eos_id=256)
    gpt2, llama = (line for line in str(caught.value).splitlines() if "GPT2" in line or "Llama" in line)
    for feature in ("norm_position post", "position sinusoidal", "windows [8]", "logit_soft_cap 30", "kv_heads 2"):
        assert feature in gpt2
    for feature in ("norm layernorm", "mlp gelu ", "bias True"):
        assert feature in llama
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_and_nothing_half_written_stays(
    tokenizer_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").touch()
    with pytest.raises(UserError, match="not an empty folder"):
        save_hf(make_model(), tmp_path / "used", tokenizer_files=tokenizer_files, eos_id=256)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.model.hf.save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(UserError, match="disk full"):
            save_hf(make_model(), tmp_path / "hf", tokenizer_files=tokenizer_files, eos_id=256)
    assert [path.name for path in tmp_path.iterdir()] == ["used"]
    (tmp_path / "empty").mkdir()
    save_hf(make_model(), tmp_path / "empty", tokenizer_files=tokenizer_files, eos_id=256)
    assert is_hf_folder(tmp_path / "empty")


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({}, {"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM'; supported: GPT2LMHeadModel, LlamaForCausalLM"),
        ({}, {"architectures": None}, "architecture 'none'"),
        ({}, {"activation_function": "silu"}, "activation_function 'silu'"),
        ({}, {"scale_attn_by_inverse_layer_idx": True, "add_cross_attention": True}, "layer_idx True.*cross_attention"),
        ({}, {"n_embd": "wide"}, "n_embd: .*integer, got 'wide'"),
        ({}, {"vocab_size": None}, "lacks or garbles"),
        ({}, {"n_head": 5}, "multiple of n_heads 5"),
        ({}, {"n_embd": 64, "n_inner": 72}, r"wte.weight is F32 \(257, 32\), wanted floats \(257, 64\)"),
        ({}, {"n_layer": 3}, "h.2.ln_1.weight is missing"),
        ({}, {"n_layer": 1}, "h.1.* has no place"),
        ({}, {"tie_word_embeddings": False}, "lm_head.weight is missing"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaled rotary positions 'linear'"),
        (LLAMA, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "scaled rotary positions 'llama3'"),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        (LLAMA, {"attention_bias": True, "mlp_bias": True}, "attention_bias True.*mlp_bias True"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (LLAMA, {"head_dim": 16}, "head_dim 16"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
        ({**LLAMA, "qk_norm": True}, {"use_sliding_window": True}, "use_sliding_window True"),
        ({**LLAMA, "qk_norm": True}, {"layer_types": ["sliding_attention"]}, "sliding_attention"),
    ],
)
def test_folders_that_mean_something_else_are_refused(
    settings: dict[str, Any], changes: dict[str, Any], message: str, tokenizer_files: Files, tmp_path: Path
) -> None:
    save_hf(make_model(**settings), tmp_path / "hf", tokenizer_files=tokenizer_files, eos_id=256)
    change_config(tmp_path / "hf", **changes)
    with pytest.raises(UserError, match=message):
        load_hf(tmp_path / "hf")


def test_missing_and_damaged_files_are_named(tokenizer_files: Files, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    with pytest.raises(UserError, match=r"config\.json"):
        load_hf(folder)
    save_hf(make_model(), folder, tokenizer_files=tokenizer_files, eos_id=256)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cannot read .*model\.safetensors"):
        load_hf(folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        load_hf(folder)
    index = {"weight_map": {"transformer.wte.weight": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-1\.safetensors"):
        load_hf(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        load_hf(folder)
