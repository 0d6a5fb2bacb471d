"""The model against the formulas and against transformers, an implementation by others."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import ModelConfig
from pipeline.model.layers import (
    KVCache,
    Rotation,
    _attend_with_mask_on_cuda,
    attend,
    causal_blocks,
    causal_mask,
    sinusoid,
)
from pipeline.model.loss import SummedCrossEntropy
from pipeline.model.transformer import (
    Decoder,
    build_model,
    build_without_memory,
    count_parameters,
    flops_per_token,
    initialise,
)

VOCABULARY = 70


def make(**settings: Any) -> Decoder:
    config = ModelConfig.model_validate({"n_layers": 2, "n_heads": 4, "d_model": 32, "context_length": 24, **settings})
    model = build_model(config, n_tokens=VOCABULARY)
    initialise(model, seed=3)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():  # ones and zeros would hide mistakes
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.3)
    return model.eval()


def tokens(rows: int = 3, time: int = 24) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, time), generator=torch.Generator().manual_seed(1))


def naive_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """The formula, loop by loop, in float64: (B, H, T, D)."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                seen = [s for s in range(k.shape[2]) if allowed[b, 0, t, s]]
                scores = torch.stack([q[b, h, t] @ k[b, h // group, s] for s in seen]) / math.sqrt(q.shape[3])
                weights = (scores - scores.max()).exp() / (scores - scores.max()).exp().sum()
                out[b, h, t] = sum(w * v[b, h // group, s] for w, s in zip(weights, seen, strict=True))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_is_the_formula(dtype: torch.dtype, masked: bool, kv_heads: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4, 9, 8).to(dtype)
    k, v = torch.randn(2, kv_heads, 9, 8).to(dtype), torch.randn(2, kv_heads, 9, 8).to(dtype)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0] * 9])
    positions = torch.arange(9).expand(2, 9)
    allowed = causal_mask(positions, torch.arange(9), window=4, documents=documents)
    plain = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9)
    found = attend(q, k, v, mask=allowed if masked else None, dropout=0.0)
    expected = naive_attention(q, k, v, allowed if masked else plain)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=1e-6 if dtype == torch.float32 else 3e-2, rtol=1e-2)


def test_mask_is_causal_windowed_and_within_documents() -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1]])
    mask = causal_mask(torch.arange(5)[None], torch.arange(5), window=2, documents=documents)[0, 0]
    expected = [[int(k <= t and t - k < 2 and documents[0, t] == documents[0, k]) for k in range(5)] for t in range(5)]
    assert mask.int().tolist() == expected


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("with_documents", [False, True])
def test_blocks_allow_what_the_mask_allows(window: int | None, with_documents: bool) -> None:
    time = 300  # no multiple of a block
    documents = (torch.rand(2, time, generator=torch.Generator().manual_seed(1)) < 0.02).cumsum(1)
    given = documents if with_documents else None
    positions = torch.arange(time)[None]
    expected = causal_mask(positions, positions[0], window=window, documents=given).expand(2, -1, -1, -1)
    blocks = causal_blocks(time=time, window=window, documents=given, device=torch.device("cpu"))
    rows, queries = torch.arange(2)[:, None, None], torch.arange(time)[:, None]
    found = blocks.mask_mod(rows, torch.tensor(0), queries, torch.arange(time)).expand(2, -1, -1)
    assert torch.equal(found, expected[:, 0])
    # a block that is left out holds nothing that is allowed, and one that is taken whole nothing that is not
    dense = blocks.to_dense()[:, 0].bool().expand(2, -1, -1)
    tiled = F.pad(expected[:, 0], (0, 84, 0, 84)).view(2, 3, 128, 3, 128)
    assert torch.equal(dense, tiled.any(dim=4).any(dim=2))


def fits_flex(
    time: int, *, dtype: torch.dtype = torch.float32, device: str = "cuda", train: bool = False, **model: Any
) -> bool:
    config = ModelConfig.model_validate({"n_layers": 1, "n_heads": 6, "d_model": 96, "dropout": 0.1, **model})
    stack = build_without_memory(config, n_tokens=VOCABULARY).stack.train(train)
    with FakeTensorMode():  # no GPU is needed
        return stack._fits_flex(torch.empty(2, time, 96, dtype=dtype, device=device))


def test_only_what_flex_attention_can_do_goes_there() -> None:
    assert fits_flex(32, context_length=32)
    assert not fits_flex(32, context_length=32, dtype=torch.float64)
    assert not fits_flex(32, context_length=32, device="cpu")
    assert not fits_flex(32, context_length=32, train=True)  # there is dropout
    assert not fits_flex(32, context_length=32, d_model=48)  # narrow heads
    assert not fits_flex(32, context_length=32, n_kv_heads=2)  # three heads share keys
    assert fits_flex(128, context_length=128, n_kv_heads=2)


def test_lengths_below_the_context_are_not_compiled_one_by_one() -> None:
    """Decoding without a cache has one for each token."""
    assert not any(fits_flex(time, context_length=32) for time in range(1, 32))


def test_attention_by_blocks_is_attention_with_the_mask() -> None:
    """FlexAttention's own arithmetic, without its kernel: forward alone, as a CPU has no more of it."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 130, 16), torch.randn(2, 2, 130, 16), torch.randn(2, 2, 130, 16)
    documents = (torch.rand(2, 130) < 0.05).cumsum(1)
    positions = torch.arange(130)[None]
    mask = causal_mask(positions, positions[0], window=50, documents=documents)
    blocks = causal_blocks(time=130, window=50, documents=documents, device=torch.device("cpu"))
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        found = attend(q, k, v, mask=blocks, dropout=0.0)
    torch.testing.assert_close(found, attend(q, k, v, mask=mask, dropout=0.0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("time", [1, 5])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_shared_keys_with_a_mask_as_on_cuda(time: int, kv_heads: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, time, 8), torch.randn(3, kv_heads, 9, 8), torch.randn(3, kv_heads, 9, 8)
    allowed = torch.rand(3, 1, time, 9) < 0.6
    allowed[..., 0] = True
    found = _attend_with_mask_on_cuda(q, k, v, mask=allowed, dropout=0.0)
    torch.testing.assert_close(found.double(), naive_attention(q, k, v, allowed), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_of_cuda_is_cross_entropy(dtype: torch.dtype) -> None:
    """Over the tokens alone: surplus rows of the embedding add nothing, and neither do positions without a label."""
    draws = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(30, 128, generator=draws)).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (30,), generator=draws)
    labels[::7] = -100
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact[:, :VOCABULARY], labels, reduction="sum")
    (3 * expected).backward()
    found = SummedCrossEntropy.apply(logits, labels, VOCABULARY)
    (3 * found).backward()
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    close = {"atol": 1e-2, "rtol": 1e-2} if dtype == torch.bfloat16 else {"atol": 1e-6, "rtol": 1e-5}
    assert logits.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(logits.grad.double(), exact.grad, **close)
    assert not logits.grad[:, VOCABULARY:].any()
    assert not logits.grad[::7].any()


def test_rotation_turns_pairs_by_their_angle() -> None:
    x = torch.randn(1, 1, 5, 6, dtype=torch.float64)
    found = Rotation.of(torch.arange(5)[None], head_dim=6, theta=100.0).apply(x)
    for t in range(5):
        for i in range(3):
            angle = t * 100.0 ** (-2 * i / 6)
            a, b = x[0, 0, t, i].item(), x[0, 0, t, i + 3].item()
            assert found[0, 0, t, i].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-6)
            assert found[0, 0, t, i + 3].item() == pytest.approx(b * math.cos(angle) + a * math.sin(angle), abs=1e-6)


def test_sinusoid_is_the_papers() -> None:
    found = sinusoid(torch.arange(7)[None], 8)[0]
    for t in range(7):
        for i in range(4):
            assert found[t, 2 * i].item() == pytest.approx(math.sin(t / 10000 ** (2 * i / 8)), abs=1e-6)
            assert found[t, 2 * i + 1].item() == pytest.approx(math.cos(t / 10000 ** (2 * i / 8)), abs=1e-6)


def copy_into(target: torch.nn.Module, values: dict[str, torch.Tensor]) -> None:
    missing = set(target.state_dict()) - set(values)
    assert {name for name in missing if "inv_freq" not in name and ".attn.bias" not in name} <= {"lm_head.weight"}
    target.load_state_dict(values, strict=False)


@pytest.mark.parametrize("mlp", ["gelu", "gelu_tanh"])
def test_logits_and_gradients_equal_gpt2_of_transformers(mlp: str) -> None:
    ours = make(mlp=mlp)
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=24, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0,
            attn_pdrop=0, activation_function="gelu" if mlp == "gelu" else "gelu_new",
        )
    ).eval()  # fmt: skip
    state = ours.state_dict()
    values = {
        "transformer.wte.weight": state["embedding.tokens.weight"][:VOCABULARY],
        "transformer.wpe.weight": state["embedding.positions.weight"],
        "transformer.ln_f.weight": state["stack.final_norm.weight"],
        "transformer.ln_f.bias": state["stack.final_norm.bias"],
    }
    for layer in range(2):
        a, b = f"transformer.h.{layer}.", f"stack.blocks.{layer}."
        for kind in ("weight", "bias"):
            turn = (lambda w: w.T) if kind == "weight" else (lambda w: w)  # GPT-2 stores matrices transposed
            qkv = torch.cat([state[f"{b}attention.query.{kind}"], state[f"{b}attention.key_value.{kind}"]])
            values |= {
                f"{a}ln_1.{kind}": state[f"{b}attention_norm.{kind}"],
                f"{a}ln_2.{kind}": state[f"{b}mlp_norm.{kind}"],
                f"{a}attn.c_attn.{kind}": turn(qkv),
                f"{a}attn.c_proj.{kind}": turn(state[f"{b}attention.out.{kind}"]),
                f"{a}mlp.c_fc.{kind}": turn(state[f"{b}mlp.up.{kind}"]),
                f"{a}mlp.c_proj.{kind}": turn(state[f"{b}mlp.down.{kind}"]),
            }
    copy_into(reference, values)
    batch = tokens()
    theirs = reference(batch, labels=batch)
    torch.testing.assert_close(ours(batch), theirs.logits, atol=1e-5, rtol=1e-4)
    labels = torch.cat([batch[:, 1:], torch.full((3, 1), -100)], dim=1)
    loss = ours(batch, labels=labels) / (labels != -100).sum()
    torch.testing.assert_close(loss, theirs.loss)
    loss.backward()
    theirs.loss.backward()
    expected = reference.transformer.h[0].mlp.c_fc.weight.grad.T
    torch.testing.assert_close(ours.stack.blocks[0].mlp.up.weight.grad, expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_llama_of_transformers(tied: bool) -> None:
    ours = make(norm="rmsnorm", position="rotary", mlp="swiglu", bias=False, n_kv_heads=2, d_ff=80, tie_embeddings=tied)
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=24, rms_norm_eps=1e-5, rope_theta=10000.0,
            tie_word_embeddings=tied,
        )
    ).eval()  # fmt: skip
    state = ours.state_dict()
    values = {
        "model.embed_tokens.weight": state["embedding.tokens.weight"][:VOCABULARY],
        "model.norm.weight": state["stack.final_norm.weight"],
    }
    if not tied:
        values["lm_head.weight"] = state["head.weight"][:VOCABULARY]
    for layer in range(2):
        a, b = f"model.layers.{layer}.", f"stack.blocks.{layer}."
        key, value = state[f"{b}attention.key_value.weight"].chunk(2)
        values |= {
            f"{a}input_layernorm.weight": state[f"{b}attention_norm.weight"],
            f"{a}post_attention_layernorm.weight": state[f"{b}mlp_norm.weight"],
            f"{a}self_attn.q_proj.weight": state[f"{b}attention.query.weight"],
            f"{a}self_attn.k_proj.weight": key,
            f"{a}self_attn.v_proj.weight": value,
            f"{a}self_attn.o_proj.weight": state[f"{b}attention.out.weight"],
            f"{a}mlp.up_proj.weight": state[f"{b}mlp.up.weight"],
            f"{a}mlp.gate_proj.weight": state[f"{b}mlp.gate.weight"],
            f"{a}mlp.down_proj.weight": state[f"{b}mlp.down.weight"],
        }
    copy_into(reference, values)
    torch.testing.assert_close(ours(tokens()), reference(tokens()).logits, atol=1e-5, rtol=1e-4)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"norm": "rmsnorm", "norm_position": "post"},
    {"position": "rotary", "qk_norm": True, "n_kv_heads": 1},
    {"position": "sinusoidal", "mlp": "relu2", "bias": False},
    {"position": "none", "mlp": "swiglu", "windows": (4, None)},
    {"logit_soft_cap": 5.0, "tie_embeddings": False},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_no_position_sees_the_future(settings: dict[str, Any]) -> None:
    model = make(**settings)
    before, after = tokens(), tokens()
    after[:, 10:] = (after[:, 10:] + 1) % VOCABULARY
    first, second = model(before), model(after)
    torch.testing.assert_close(first[:, :10], second[:, :10])
    assert (first[:, 10] - second[:, 10]).abs().max() > 1e-4


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_cached_steps_equal_one_pass(settings: dict[str, Any]) -> None:
    model = make(**settings)
    batch = tokens()
    cache = KVCache(model.config, rows=3, capacity=24, dtype=torch.float32, device=torch.device("cpu"))
    first = model(batch[:, :7], cache=cache)
    rest = [
        model(batch[:, t : t + 1], positions=torch.full((3, 1), t), cache=cache, visible=t + 1) for t in range(7, 24)
    ]
    parts = [first, *rest]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(batch), atol=1e-5, rtol=1e-4)


def test_a_window_hides_what_is_older() -> None:
    model = make(n_layers=1, windows=(4,))
    before, after = tokens(), tokens()
    after[:, 0] = (after[:, 0] + 1) % VOCABULARY
    first, second = model(before), model(after)
    torch.testing.assert_close(first[:, 4:], second[:, 4:])
    assert (first[:, 3] - second[:, 3]).abs().max() > 1e-4


def test_documents_are_hidden_from_each_other() -> None:
    model = make(position="rotary")
    batch = tokens(rows=1)
    documents = torch.tensor([[0] * 9 + [1] * 15])
    whole = model(batch, documents=documents)
    torch.testing.assert_close(whole[:, 9:], model(batch[:, 9:]), atol=1e-5, rtol=1e-4)  # rotary is relative
    torch.testing.assert_close(whole[:, :9], model(batch[:, :9]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("position", ["learned", "rotary", "sinusoidal"])
@pytest.mark.parametrize("window", [None, 6])
def test_packed_documents_are_as_if_alone(position: str, window: int | None) -> None:
    """Positions that begin again with each document, and a mask: every document as in a row of its own."""
    model = make(position=position, windows=(window,))
    batch = tokens(rows=2)
    edges = [[0, 9, 10, 24], [0, 3, 17, 24]]
    documents, positions = torch.zeros(2, 24, dtype=torch.long), torch.zeros(2, 24, dtype=torch.long)
    for row, ends in enumerate(edges):
        for number, (start, stop) in enumerate(itertools.pairwise(ends)):
            documents[row, start:stop], positions[row, start:stop] = number, torch.arange(stop - start)
    whole = model(batch, documents=documents, positions=positions)
    for row, ends in enumerate(edges):
        for start, stop in itertools.pairwise(ends):
            alone = model(batch[row : row + 1, start:stop])
            torch.testing.assert_close(whole[row : row + 1, start:stop], alone, atol=1e-5, rtol=1e-4)


def test_positions_that_begin_again_hide_nothing() -> None:
    """Without a mask a packed row is plain causal attention: its first token reaches the last one."""
    positions = torch.cat([torch.arange(20), torch.arange(4)])[None]
    before = tokens(rows=1)
    after = before.clone()
    after[:, 0] = (after[:, 0] + 1) % VOCABULARY
    for windows in [(None,), (23,)]:  # the second needs a mask
        model = make(position="learned", windows=windows)
        change = (model(before, positions=positions) - model(after, positions=positions)).abs().amax(-1)[0]
        assert (change[:23] > 1e-6).all()


def test_soft_cap_bounds_logits() -> None:
    capped, plain = make(logit_soft_cap=0.5), make()
    torch.testing.assert_close(capped(tokens()), 0.5 * torch.tanh(plain(tokens()) / 0.5))


def test_padded_vocabulary_is_neither_seen_nor_trained() -> None:
    model = make()
    assert model.embedding.tokens.weight.shape[0] == 128
    batch = tokens()
    assert model(batch).shape[-1] == VOCABULARY
    model(batch, labels=batch).backward()
    grad = model.embedding.tokens.weight.grad
    assert grad is not None
    assert grad[VOCABULARY:].abs().max() == 0
    assert grad[:VOCABULARY].abs().max() > 0


def test_initial_weights_follow_the_table_and_the_name_alone() -> None:
    small = build_model(ModelConfig(n_layers=8, n_heads=4, d_model=256, context_length=64), n_tokens=500)
    wide = build_model(
        ModelConfig(n_layers=8, n_heads=4, d_model=256, context_length=64, position="rotary"), n_tokens=500
    )
    initialise(small, seed=1)
    initialise(wide, seed=1)
    for name, parameter in small.named_parameters():
        into_stream = name.endswith(("attention.out.weight", "mlp.down.weight"))
        if parameter.dim() == 2:
            expected = 0.02 / math.sqrt(16) if into_stream else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
        else:
            assert set(parameter.tolist()) == {1.0 if name.endswith("weight") else 0.0}, name
    shared = dict(wide.named_parameters())
    for name, parameter in small.named_parameters():
        if name in shared:
            assert torch.equal(parameter, shared[name])
    initialise(wide, seed=2)
    assert not torch.equal(small.embedding.tokens.weight, wide.embedding.tokens.weight)


def test_initial_rows_can_be_drawn_in_any_parts_and_do_not_ask_how_many_there_are() -> None:
    config = ModelConfig(n_layers=1, n_heads=2, d_model=600, context_length=8)  # blocks of 109 rows
    whole, longer = (build_model(config, n_tokens=rows) for rows in (300, 1000))
    initialise(whole, seed=1)
    initialise(longer, seed=1)
    embeddings = whole.embedding.tokens.weight
    assert torch.equal(embeddings, longer.embedding.tokens.weight[: len(embeddings)])
    assert not torch.equal(embeddings[:100], embeddings[109:209])
    for parts in (3, 7):
        for part in range(parts):
            model = build_model(config, n_tokens=300)

            def held(parameter: torch.Tensor, part: int = part, parts: int = parts) -> tuple[torch.Tensor, range]:
                size = -(-len(parameter) // parts)
                rows = range(len(parameter))[part * size : (part + 1) * size]
                parameter.fill_(math.nan)
                return parameter[rows.start : rows.stop], rows

            initialise(model, seed=1, held=held)
            for (name, found), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
                here = ~found.isnan()
                assert torch.equal(found[here], expected[here]), name
                size = -(-len(found) // parts)
                assert here[part * size : (part + 1) * size].all()


def test_a_model_in_float64_rounds_nothing_to_float32() -> None:
    """Its loss and gradient, with a step small enough, against the difference quotient."""
    model = make(logit_soft_cap=5.0).double()
    batch = tokens()
    loss = model(batch, labels=batch)
    loss.backward()
    weight, direction = model.stack.blocks[0].mlp.up.weight, torch.randn(128, 32, dtype=torch.float64)
    with torch.no_grad():
        losses = [model(batch, labels=batch) for step in (1e-6, -2e-6) if weight.add_(direction * step) is not None]
    assert loss.dtype == torch.float64
    assert ((losses[0] - losses[1]) / 2e-6).item() == pytest.approx((weight.grad * direction).sum().item(), rel=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"mlp": "swiglu", "n_kv_heads": 2, "d_ff": 96, "tie_embeddings": False}], ids=str
)
def test_flops_equal_what_pytorch_counts(settings: dict[str, Any]) -> None:
    model = build_model(
        ModelConfig.model_validate({"n_layers": 3, "n_heads": 4, "d_model": 64, "context_length": 64, **settings}),
        n_tokens=128,
    )
    initialise(model, seed=1)
    batch = torch.randint(0, 128, (2, 64))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(batch, labels=batch).backward()
    assert flops_per_token(model, context_length=64) * batch.numel() == pytest.approx(
        counter.get_total_flops(), rel=0.02
    )


def test_dropout_drops_in_training_only() -> None:
    model = make(dropout=0.5)
    assert torch.equal(model(tokens()), model(tokens()))
    model.train()
    torch.manual_seed(1)
    first = model(tokens())
    assert not torch.equal(first, model(tokens()))
    torch.manual_seed(1)
    assert torch.equal(first, model(tokens()))


def test_count_is_of_distinct_parameters() -> None:
    tied, untied = make(), make(tie_embeddings=False)
    assert count_parameters(untied) - count_parameters(tied) == 128 * 32
