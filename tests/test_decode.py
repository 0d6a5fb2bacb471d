"""Decoding against its references: no cache, each prompt alone, formulas in float64, transformers' processors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline.config import ModelConfig
from pipeline.data.tokenizer import TextTokenizer, load_tokenizer
from pipeline.errors import UserError
from pipeline.generate import decode
from pipeline.generate.decode import Options, Token, generate, to_bf16, window_start
from pipeline.generate.logits import draw, heat, keep_min_p, keep_top_k, keep_top_p, penalise_repetition
from pipeline.generate.text import Piece, RowText, finished, write
from pipeline.model.transformer import Decoder, build_model, initialise

CONTEXT = 16
PROMPTS = [[5, 9, 2], list(range(60, 100)), [7], list(range(CONTEXT)), list(range(CONTEXT + 1))]
FAMILIES: list[dict[str, Any]] = [
    {"position": "learned"},
    {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False},
    {"position": "sinusoidal", "norm_position": "post"},
    {"position": "none"},
    {"position": "rotary", "n_kv_heads": 2, "qk_norm": True},
    {"position": "learned", "windows": (3, None), "n_kv_heads": 1},
]
Ids = dict[tuple[int, int], list[int]]


def make_model(n_tokens: int = 101, seed: int = 3, **settings: Any) -> Decoder:
    sizes = {"n_layers": 2, "n_heads": 4, "d_model": 32, "context_length": CONTEXT, "init_std": 0.4, **settings}
    model = build_model(ModelConfig.model_validate(sizes), n_tokens=n_tokens)
    initialise(model, seed=seed)
    return model.eval()


def ids(model: Decoder, prompts: Sequence[Sequence[int]], **options: Any) -> Ids:
    made: Ids = {}
    for token in generate(model, prompts, options=Options(**{"max_new_tokens": 70, "temperature": 0.0, **options})):
        assert token.id is not None
        made.setdefault((token.prompt, token.sample), []).append(token.id)
    return made


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_step_in_fixed_tensors_reads_the_same(family: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA replays as a graph: rows that ended are still computed, and more keys are visible than there are."""
    model = make_model(**family)
    expected = ids(model, PROMPTS, num_samples=2, temperature=0.7)
    made = decode._Reader.__init__

    def fixed(reader: Any, *arguments: Any, **options: Any) -> None:
        made(reader, *arguments, **options)
        reader.step = decode.FixedStep(reader.model, reader.cache)

    monkeypatch.setattr(decode._Reader, "__init__", fixed)
    monkeypatch.setattr(decode, "KEYS_AT_ONCE", 5)
    assert ids(model, PROMPTS, num_samples=2, temperature=0.7) == expected


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return load_tokenizer("bytes")


# Which context each token is predicted from.


@pytest.mark.parametrize("context", [1, 2, 3, 16, 17])
def test_windows_fit_hold_the_newest_token_and_move_rarely(context: int) -> None:
    starts = [window_start(n, context_length=context) for n in range(1, 10 * context + 1)]
    lengths = [n - start for n, start in enumerate(starts, 1)]
    assert all(1 <= length <= context for length in lengths)
    assert starts == sorted(starts)
    assert not any(starts[:context])
    kept = max(context // 2, 1)
    moved = [length for length, old, new in zip(lengths[1:], starts, starts[1:], strict=False) if new != old]
    assert set(moved) == {kept}


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_greedy_with_cache_is_greedy_by_whole_forward_passes(family: dict[str, Any]) -> None:
    model = make_model(**family)
    made = ids(model, PROMPTS)
    for number, prompt in enumerate(PROMPTS):
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(70):
                window = tokens[window_start(len(tokens), context_length=CONTEXT) :]
                tokens.append(int(model(torch.tensor([window]))[0, -1].argmax()))
        assert made[number, 0] == tokens[len(prompt) :]
    assert made == ids(model, PROMPTS, cache=False)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_batch_of_unequal_prompts_equals_each_alone(family: dict[str, Any]) -> None:
    model = make_model(**family)
    together = ids(model, PROMPTS)
    assert len({len(set(row)) for row in together.values()}) > 1, "rows that repeat one token prove nothing"
    for number, prompt in enumerate(PROMPTS):
        assert together[number, 0] == ids(model, [prompt])[0, 0]


def test_sampled_text_depends_on_its_prompt_and_sample_number_only() -> None:
    model = make_model()
    large = ids(model, PROMPTS, temperature=1.0, num_samples=3)
    assert len({tuple(row) for row in large.values()}) == len(large), "all samples differ"
    assert ids(model, PROMPTS[:2], temperature=1.0) == {key: large[key] for key in ((0, 0), (1, 0))}
    assert ids(model, PROMPTS, temperature=1.0, num_samples=3, batch_rows=4) == large
    assert ids(model, PROMPTS, temperature=1.0, num_samples=3, cache=False) == large
    assert ids(model, PROMPTS, temperature=1.0, num_samples=3, seed=4)[0, 0] != large[0, 0]


def test_rows_that_end_leave_the_batch_and_change_no_other() -> None:
    model = make_model()
    whole = ids(model, PROMPTS, temperature=1.0)
    eos = whole[1, 0][4]
    expected = {key: row[: row.index(eos)] if eos in row else row for key, row in whole.items()}
    ended: dict[tuple[int, int], list[Token]] = {}
    options = Options(max_new_tokens=70)
    for token in generate(model, PROMPTS, options=options, eos_ids=[eos]):
        ended.setdefault((token.prompt, token.sample), []).append(token)
    for key, row in expected.items():
        assert [token.id for token in ended[key] if token.id is not None] == row
        assert [token.finish for token in ended[key][:-1]] == [None] * (len(ended[key]) - 1)
        assert ended[key][-1].finish == ("eos" if eos in whole[key] else "length")
    assert len({len(row) for row in expected.values()}) > 2, "rows must end at different times"


def test_equal_prompts_share_one_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = make_model(), []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda tokens, **rest: read.append(tuple(tokens.shape)) or forward(tokens, **rest)
    )
    list(generate(model, [[1, 2, 3, 4]], options=Options(max_new_tokens=2, num_samples=8)))
    assert read == [(1, 3), (8, 1), (8, 1)]


def test_rows_of_the_padded_vocabulary_are_never_made() -> None:
    model = make_model(n_tokens=3, vocab_size=64)
    with torch.no_grad():
        model.embedding.tokens.weight[3:] *= 100  # would win every draw
    assert set(ids(model, [[0], [1]], temperature=2.0, max_new_tokens=200)[0, 0]) == {0, 1, 2}
    assert set(ids(model, [[0], [1]])[0, 0]) <= {0, 1, 2}


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_bf16_predicts_nearly_what_fp32_does(family: dict[str, Any]) -> None:
    # Free-running texts part after a near-tie, so the first tokens of many prompts are compared.
    prompts = [[a, b] for a in range(0, 100, 7) for b in range(0, 100, 9)]
    exact = ids(make_model(**family), prompts, max_new_tokens=1, batch_rows=1000)
    rounded = ids(to_bf16(make_model(**family)), prompts, max_new_tokens=1, batch_rows=1000)
    assert np.mean([exact[key] == rounded[key] for key in exact]) > 0.9
    low = to_bf16(make_model(**family))
    assert {len(row) for row in ids(low, PROMPTS).values()} == {70}  # through the cache and window restarts too


def test_damaged_weights_and_wrong_prompts_are_told() -> None:
    model = make_model()
    with pytest.raises(UserError, match="no tokens"):
        generate(model, [[1], []], options=Options())
    with pytest.raises(UserError, match=r"token 101.* 0 to 100"):
        generate(model, [[1, 101]], options=Options())
    with torch.no_grad():
        model.embedding.tokens.weight[5] = math.nan
    with pytest.raises(UserError, match="NaN"):
        list(generate(model, [[5]], options=Options()))


def test_all_options_out_of_range_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        Options(
            max_new_tokens=0,
            temperature=-1,
            top_k=0,
            top_p=0,
            min_p=2,
            repetition_penalty=0,
            num_samples=0,
            batch_rows=0,
        )
    for name in ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_samples"):
        assert f"{name} must be" in str(caught.value)
    for bad in (math.nan, math.inf):
        with pytest.raises(UserError):
            Options(temperature=bad)


# From logits to tokens.


def random_logits(rows: int = 6, words: int = 50) -> torch.Tensor:
    return torch.randn(rows, words, generator=torch.Generator().manual_seed(1)) * 3


def assert_same_choice(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), rtol=1e-5, atol=1e-7)
    assert torch.equal(ours.isinf(), theirs.isinf())


def test_filters_equal_those_of_transformers() -> None:
    logits, prompt = random_logits(), torch.arange(30).view(6, 5)
    for temperature in (0.3, 1.0, 2.5):
        assert_same_choice(heat(logits, temperature=temperature), TemperatureLogitsWarper(temperature)(prompt, logits))
    for k in (1, 7, 50, 80):
        assert_same_choice(keep_top_k(logits, k=k), TopKLogitsWarper(k)(prompt, logits))
    for p in (0.01, 0.5, 0.9, 0.999):
        assert_same_choice(keep_top_p(logits, p=p), TopPLogitsWarper(p)(prompt, logits))
    for p in (0.01, 0.2, 1.0):
        assert_same_choice(keep_min_p(logits, p=p), MinPLogitsWarper(p)(prompt, logits))
    seen = torch.zeros(6, 50, dtype=torch.bool).scatter(1, prompt, True)
    for penalty in (0.8, 1.3):
        ours = penalise_repetition(logits, seen=seen, penalty=penalty)
        torch.testing.assert_close(ours, RepetitionPenaltyLogitsProcessor(penalty)(prompt, logits))


def test_a_temperature_near_zero_is_greedy() -> None:
    cold = heat(random_logits(), temperature=5e-324)
    assert torch.equal(draw(cold, uniforms=torch.full((6,), 0.999, dtype=torch.float64)), random_logits().argmax(-1))


def test_draws_follow_the_softmax() -> None:
    logits = random_logits(rows=1, words=20).expand(200_000, 20)
    uniforms = torch.rand(200_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    counts = np.bincount(draw(logits, uniforms=uniforms).numpy(), minlength=20)
    weights = np.exp(logits[0].double().numpy())
    expected = weights / weights.sum() * 200_000
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi-square, 19 degrees of freedom, 0.1 %


def test_generated_tokens_follow_the_softmax() -> None:
    model = make_model(n_tokens=11)
    with torch.no_grad():
        probabilities = model(torch.tensor([[4, 2]]))[0, -1].double().softmax(-1).numpy()
    made = ids(model, [[4, 2]], temperature=1.0, max_new_tokens=1, num_samples=4000, batch_rows=4000)
    counts = np.bincount([row[0] for row in made.values()], minlength=11)
    expected = probabilities * 4000
    assert ((counts - expected) ** 2 / expected).sum() < 29.6  # 10 degrees of freedom, 0.1 %


def test_excluded_tokens_are_never_drawn_even_at_the_ends() -> None:
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 2.0, -math.inf]]).expand(2, 5)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniforms=ends).tolist() == [1, 3]


def test_filters_act_in_generation() -> None:
    model = make_model()
    greedy = ids(model, PROMPTS)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert ids(model, PROMPTS, temperature=1.0, **options) == greedy
    penalised = ids(model, [[7, 8]], repetition_penalty=1e6, max_new_tokens=60)[0, 0]
    assert len(set(penalised) - {7, 8}) == 60, "prompt and generated tokens are both avoided"


# Text.


def spell(tokenizer: TextTokenizer, tokens: Sequence[int], stops: Sequence[str] = ()) -> tuple[list[str], str]:
    row = RowText(tokenizer, context=[], stops=stops)
    pieces = []
    for token in tokens:
        pieces.append(row.push(token))
        if row.stopped:
            return pieces, "".join(pieces)
    pieces.append(row.flush())
    return pieces, "".join(pieces)


def test_characters_of_several_tokens_come_out_whole(tokenizer: TextTokenizer) -> None:
    text = "aé你😀z"
    pieces, joined = spell(tokenizer, tokenizer.encode(text))
    assert joined == text
    assert [piece for piece in pieces if piece] == list(text)


def test_streamed_bytes_join_to_the_decoded_whole(tokenizer: TextTokenizer) -> None:
    draws = np.random.default_rng(5)
    for _ in range(300):
        tokens = draws.choice(
            [0x61, 0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0x98, 0x80, 256], size=draws.integers(1, 12)
        ).tolist()
        assert spell(tokenizer, tokens)[1] == tokenizer.decode(tokens)
    assert spell(tokenizer, [0x61, 0xF0, 0x9F])[1] == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one\n\ntwo", ["\n\n"], "one"),
        ("aab aac", ["aac"], "aab "),
        ("ababac", ["abac"], "ab"),
        ("abcd", ["abcd", "bc"], "a"),  # "bc" is complete first
        ("xyz", ["yz", "xyz"], ""),  # both complete at once: the longer
        ("almost sto", ["stop"], "almost sto"),
        ("你😀好", ["😀"], "你"),
    ],
)
def test_stop_strings_cut_the_text_however_it_is_tokenised(
    tokenizer: TextTokenizer, text: str, stops: list[str], expected: str
) -> None:
    one_token_each = load_tokenizer("chars", texts=[text])
    merged = load_tokenizer("train:300", texts=[text] * 50)
    for spelling in (tokenizer, one_token_each, merged):
        assert spell(spelling, spelling.encode(text), stops)[1] == expected


def joined(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_writing_stops_at_a_string_and_says_so(tokenizer: TextTokenizer) -> None:
    model = make_model(n_tokens=257)
    options = Options(max_new_tokens=60)
    whole = joined(list(write(model, tokenizer, ["hi"], options=options)))
    assert whole == tokenizer.decode(ids(model, [tokenizer.encode("hi")], temperature=1.0, max_new_tokens=60)[0, 0])
    stop = whole[20:22]
    pieces = list(write(model, tokenizer, ["hi"], options=options, stops=[stop]))
    assert joined(pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish == "stop"
    assert len(pieces) < 60
    with pytest.raises(UserError, match="empty stop"):
        write(model, tokenizer, ["hi"], options=options, stops=[""])


def test_an_empty_prompt_starts_from_eos(tokenizer: TextTokenizer) -> None:
    model = make_model(n_tokens=257)
    pieces = list(write(model, tokenizer, [""], options=Options(max_new_tokens=9)))
    assert [piece.token for piece in pieces] == ids(model, [[256]], temperature=1.0, max_new_tokens=9)[0, 0]


def test_a_prompt_that_ends_in_a_replacement_character_is_not_repeated(tokenizer: TextTokenizer) -> None:
    model = make_model(n_tokens=257)
    prompt = "a\N{REPLACEMENT CHARACTER}"
    pieces = list(write(model, tokenizer, [prompt], options=Options(max_new_tokens=9)))
    assert joined(pieces) == tokenizer.decode([piece.token for piece in pieces if piece.token is not None])


def test_finished_samples_come_in_order_and_as_soon_as_they_can() -> None:
    def piece(prompt: int, sample: int, text: str, finish: Any = None) -> Piece:
        return Piece(prompt, sample, text, token=1, finish=finish)

    events = [
        piece(0, 0, "a"),
        piece(0, 1, "x", "eos"),
        piece(1, 0, "y", "stop"),
        piece(0, 0, "b", "length"),
        piece(1, 1, "z", "eos"),
    ]
    made = finished(iter(events))
    assert [(sample.prompt, sample.sample, sample.text, sample.finish) for sample in made] == [
        (0, 0, "ab", "length"),
        (0, 1, "x", "eos"),
        (1, 0, "y", "stop"),
        (1, 1, "z", "eos"),
    ]
    rest = iter(events)
    assert next(finished(rest)).text == "ab"
    assert len(list(rest)) == 1, "it did not wait for the last event"
