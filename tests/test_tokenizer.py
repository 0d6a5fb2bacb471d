"""Tokenizers: exact both ways, the same on every run, special-token text is text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pipeline.data.tokenizer import EOS, TextTokenizer, load_tokenizer
from pipeline.errors import UserError

NASTY = [
    "",
    " ",
    "a<|endoftext|>b",
    "<|endoftext|>",
    "emoji 👩‍👩‍👧‍👦 and 日本語",
    "e\u0301 combining",
    "CR\r\nLF\n\n\n   spaces\t\ttabs",
    "12345678901234567890",
    "\0 zero",
    "\ufeffmark",
    "don't we'll I'VE",
]
CORPUS = ["the cat sat on the mat\n" * 20, "a dog and the cat", "日本語 text", *NASTY]

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
BYTES = load_tokenizer("bytes")
TRAINED = load_tokenizer("train:300", texts=CORPUS)


@given(ANY_TEXT)
@settings(deadline=None, max_examples=200)
def test_bytes_are_utf8_bytes(text: str) -> None:
    ids = BYTES.encode(text)
    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


@given(st.lists(ANY_TEXT, max_size=5))
@settings(deadline=None, max_examples=100)
def test_a_trained_tokenizer_knows_all_text(texts: list[str]) -> None:
    ids, lengths = TRAINED.encode_batch(texts)
    assert len(lengths) == len(texts)
    start = 0
    for text, length in zip(texts, lengths, strict=True):
        assert TRAINED.decode(ids[start : start + length]) == text
        start += length
    assert TRAINED.eos_id not in ids
    assert start == len(ids)


def test_sizes_and_ends() -> None:
    assert (BYTES.vocab_size, BYTES.eos_id, BYTES.eos_token) == (257, 256, EOS)
    assert TRAINED.vocab_size == 300
    assert TRAINED.tokenizer.id_to_token(TRAINED.eos_id) == EOS


def test_training_is_deterministic() -> None:
    again = load_tokenizer("train:300", texts=CORPUS)
    other = load_tokenizer("train:300", texts=CORPUS[:1])
    assert again.fingerprint == TRAINED.fingerprint != other.fingerprint


def test_characters_are_sorted_and_exact() -> None:
    text = "".join(NASTY)
    tokenizer = load_tokenizer("chars", texts=NASTY)
    alphabet = sorted(set(text))
    ids = tokenizer.encode(text)
    assert ids == [alphabet.index(character) for character in text]
    assert tokenizer.decode(ids) == text
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (len(alphabet) + 1, len(alphabet))


def test_an_unknown_character_is_named_never_dropped() -> None:
    tokenizer = load_tokenizer("chars", texts=["abc\n"])
    with pytest.raises(UserError, match=r"'é' \(U\+00E9\) is not among the 4 characters"):
        tokenizer.encode("abé")
    with pytest.raises(UserError, match="'<'"):
        tokenizer.encode("a<|endoftext|>")


@pytest.mark.parametrize("tokenizer", [BYTES, TRAINED, load_tokenizer("chars", texts=CORPUS)])
def test_the_file_alone_is_the_tokenizer(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in CORPUS:
        if EOS not in text:
            assert plain.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
            assert plain.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = TextTokenizer.from_file(path)
        assert (again.fingerprint, again.eos_id) == (tokenizer.fingerprint, tokenizer.eos_id)
        assert [again.encode(text) for text in CORPUS] == [tokenizer.encode(text) for text in CORPUS]


@pytest.mark.parametrize("tokenizer", [BYTES, TRAINED, load_tokenizer("chars", texts=NASTY)])
def test_special_token_text_is_text(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.decode([tokenizer.eos_id]) == EOS


def test_streaming_shows_whole_characters_only() -> None:
    for tokenizer in (BYTES, TRAINED):
        text = "né 日本 😀\n"
        stream = tokenizer.stream()
        parts = [stream.push(token) for token in tokenizer.encode(text)]
        assert "".join(parts) == text
        assert "\ufffd" not in "".join(parts)
    assert [BYTES.stream().push(token) for token in b"ab"] == ["a", "b"]


def test_truncation_padding_and_templates_of_a_file_are_off(tmp_path: Path) -> None:
    plain = Tokenizer.from_str(json.dumps(TRAINED.definition))
    plain.enable_truncation(3)
    plain.enable_padding(length=50)
    plain.save(str(tmp_path / "tokenizer.json"))
    tokenizer = TextTokenizer.from_file(tmp_path)
    text = CORPUS[0]
    assert tokenizer.encode(text) == TRAINED.encode(text)
    assert tokenizer.fingerprint == TRAINED.fingerprint


def test_eos_is_found_chosen_or_asked_for(tmp_path: Path) -> None:
    definition = json.dumps(TRAINED.definition).replace(EOS, "<stop>")
    (tmp_path / "tokenizer.json").write_text(definition)
    with pytest.raises(UserError, match=r"choose one with --eos TOKEN \(its special tokens: <stop>\)"):
        TextTokenizer.from_file(tmp_path)
    with pytest.raises(UserError, match=r"no token '<stopp>'.*did you mean '<stop>'"):
        TextTokenizer.from_file(tmp_path, eos="<stopp>")
    with pytest.raises(UserError, match="no token with the id 999"):
        TextTokenizer.from_file(tmp_path, eos=999)
    assert TextTokenizer.from_file(tmp_path, eos="<stop>").eos_id == TRAINED.eos_id
    assert TextTokenizer.from_file(tmp_path, eos=7).eos_id == 7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train:many", "wants a number of tokens of at least 257"),
        ("train:256", "wants a number of tokens of at least 257"),
        ("tokenizer.jsn/none.json", "no tokenizer file"),
        ("broken.json", "cannot read the tokenizer"),
        ("other.json", "has no 'model'"),
        ("odd.json", "is not a tokenizer.json that `tokenizers` understands"),
    ],
)
def test_bad_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "odd.json").write_text('{"model": {"type": "Unheard"}}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        load_tokenizer(name)


def test_an_unreachable_hub_says_what_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"(?s)cannot load the tokenizer 'no-such/name'.*--tokenizer PATH/tokenizer.json"
    ):
        load_tokenizer("no-such/name")
