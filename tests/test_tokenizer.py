"""Tokenizers: exact both ways, the same on every run, special-token text is text."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.data import tokenizer_files, tokenizer_training
from pipeline.data.preparing.nasty import NASTY as WORSE
from pipeline.data.tokenizer import EOS, TextTokenizer, check_tokenizer_name, load_tokenizer
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
@settings(max_examples=200)
def test_bytes_are_utf8_bytes(text: str) -> None:
    ids = BYTES.encode(text)
    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


@given(st.lists(ANY_TEXT, max_size=5))
@settings(max_examples=100)
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


def test_vocabularies_end_with_their_highest_id() -> None:
    """As the library counts: it gives added tokens ids of its own, whatever their file says."""
    tokenizer = Tokenizer.from_str(json.dumps(TRAINED.definition))
    tokenizer.add_tokens(["a new one", "and another"])
    extended = json.loads(tokenizer.to_str())
    extended["added_tokens"][-1]["id"] = 900
    pieces = json.loads(Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("</s>", -9.0)], unk_id=0)).to_str())
    words = {"a": 7, "[UNK]": 1, EOS: 12}
    sparse = json.loads(Tokenizer(models.WordLevel(words, unk_token="[UNK]")).to_str())  # noqa: S106 - a token of text
    for definition, size in ((extended, 302), (pieces, 3), (sparse, 13)):
        ours = TextTokenizer.from_definition(definition, origin="test", eos="</s>" if definition is pieces else EOS)
        library = Tokenizer.from_str(json.dumps(definition)).get_vocab(with_added_tokens=True)
        assert ours.vocab_size == 1 + max(library.values()) == size


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
    for number in (999, -1, 2**40):
        with pytest.raises(UserError, match=f"no token with the id {number}"):
            TextTokenizer.from_file(tmp_path, eos=number)
    assert TextTokenizer.from_file(tmp_path, eos="<stop>").eos_id == TRAINED.eos_id
    assert TextTokenizer.from_file(tmp_path, eos=7).eos_id == 7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train:many", "wants a number of tokens of at least 257"),
        ("train:256", "wants a number of tokens of at least 257"),
        ("tokenizer.jsn/none.json", "no tokenizer file"),
        ("train:", "wants a number of tokens of at least 257"),
        ("train:³²⁰", "wants a number of tokens of at least 257"),
        ("nowhere/tokens.tiktoken", "no tokenizer file"),
        ("./folder", "no tokenizer file folder"),
        ("broken.json", "cannot read the tokenizer"),
        ("infinite.json", "cannot read the tokenizer: .*infinite.json cannot be read: it is not JSON"),
        ("sentence.model", "a SentencePiece model must be converted"),
        ("own.tiktoken", "must be that of a published encoding, gpt2.tiktoken, r50k_base.tiktoken, .*o200k_base"),
        ("gpt3.tiktoken", "did you mean 'gpt2'"),
        ("r50k_base.tiktoken", "r50k_base.tiktoken:2 is not a line of a tiktoken rank file.*got b'!!!"),
        ("p50k_base.tiktoken", "255 of the 256 single bytes have no rank"),
        ("cl100k_base.tiktoken", "the rank 100257, kept for <|endoftext|>, is b'ab'"),
        ("o200k_base.tiktoken", "two tokens share a rank"),
        ("byte", "unknown tokenizer 'byte'; did you mean bytes"),
        ("Chars", "did you mean chars"),
        ("char", "did you mean chars"),
        ("train", "did you mean train:N with a number of tokens"),
        ("train32000", "did you mean train:N with a number of tokens"),
        ("trian:500", "did you mean train:N with a number of tokens"),
        ("a b", "unknown tokenizer 'a b'; wanted: chars, bytes, train:N"),
        ("a/b/c", "unknown tokenizer 'a/b/c'"),
        ("other.json", "has no 'model'"),
    ],
)
def test_bad_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "infinite.json").write_text(json.dumps({**BYTES.definition, "dropout": float("nan")}))
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "sentence.model").write_bytes(b"\n\x0e\n\x05<unk>\xff")
    whole = {bytes([value]): value for value in range(256)}
    for file, ranks in {
        "own": whole,
        "gpt3": whole,
        "p50k_base": {b"a": 0},
        "cl100k_base": {**whole, b"ab": 100257},
        "o200k_base": {**whole, b"ab": 7},
    }.items():
        write_ranks(tmp_path / f"{file}.tiktoken", ranks)
    (tmp_path / "r50k_base.tiktoken").write_bytes(b"IQ== 0\n!!! 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenizer_files, "_hub_file", lambda name: pytest.fail(f"asked the hub for {name}"))
    message = message.replace("|", r"\|")
    with pytest.raises(UserError, match=message):
        check_tokenizer_name(name)
    with pytest.raises(UserError, match=message):
        load_tokenizer(name)


def test_good_names_pass_without_corpus_or_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_files, "_hub_file", lambda name: pytest.fail(f"asked the hub for {name}"))
    TRAINED.save(tmp_path / "tokenizer.json")
    write_ranks(tmp_path / "gpt2.tiktoken", {bytes([value]): value for value in range(256)})
    files = (str(tmp_path), str(tmp_path / "tokenizer.json"), str(tmp_path / "gpt2.tiktoken"))
    for name in ("bytes", "chars", "train:257", "gpt2", "bert-base-uncased", "t5-small", "Qwen/Qwen3-8B", *files):
        check_tokenizer_name(name)


def test_a_definition_that_tokenizers_rejects(tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text('{"model": {"type": "Unheard"}}')
    with pytest.raises(UserError, match=r"is not a tokenizer.json that `tokenizers` understands"):
        load_tokenizer(str(tmp_path / "odd.json"))


def write_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()))


def trained_ranks() -> dict[bytes, int]:
    """Ranks of a small BPE over words with many repeated letters and white space, where the order of merges shows."""
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split("|", behavior="removed")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    letters = [
        "ab" * n + "a" * m + "|" + " " * n + "\n" * m + "|" + "ba" * m + "b" * n for n in range(9) for m in range(9)
    ]
    letters += ["\n" * n + " " * m + "|" + "'\u017f'S" * n for n in range(9) for m in range(9)]
    bpe.train_from_iterator([*letters, *(text.replace(" ", "| ") for text in (*CORPUS, *WORSE))], trainer=trainer)
    byte_of = {symbol: value for value, symbol in enumerate(tokenizer_files.byte_symbols())}
    tokens = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    ranks = {bytes(byte_of[symbol] for symbol in token): rank for token, rank in tokens}
    # a word that no merge reaches, and words that (?i:'s) cuts in two
    return ranks | {b"jqxzj": len(ranks), b"'Sab": len(ranks) + 1, "'\u017fab".encode(): len(ranks) + 2}


def published_pattern(encoding: Callable[[], dict[str, Any]]) -> str:
    """The pattern of a published encoding, without fetching its ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
        return str(encoding()["pat_str"])


RANKS = trained_ranks()
PATTERNS = {
    "gpt2": openai_public.r50k_pat_str,
    "p50k_base": openai_public.r50k_pat_str,
    "cl100k_base": published_pattern(openai_public.cl100k_base),
    "o200k_base": published_pattern(openai_public.o200k_base),
}
TIKTOKEN: dict[str, tuple[tiktoken.Encoding, TextTokenizer]] = {}


@pytest.fixture(scope="module")
def tiktoken_pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[tiktoken.Encoding, TextTokenizer]]:
    folder = tmp_path_factory.mktemp("ranks")
    for name, pattern in PATTERNS.items():
        write_ranks(folder / f"{name}.tiktoken", RANKS)
        theirs = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=RANKS, special_tokens={})
        TIKTOKEN[name] = theirs, load_tokenizer(str(folder / f"{name}.tiktoken"))
    return TIKTOKEN


SPACES = st.lists(st.sampled_from([*" \n\r\tab'stSAÉé1.,!\u3000\x85日\u017f\u0301", "jqxzj"]), max_size=30).map("".join)


@pytest.mark.parametrize("name", PATTERNS)
@given(text=SPACES | ANY_TEXT | st.text("ab", max_size=40))
@settings(max_examples=300)
def test_rank_files_give_the_ids_of_tiktoken(
    tiktoken_pairs: dict[str, tuple[tiktoken.Encoding, TextTokenizer]], name: str, text: str
) -> None:
    theirs, ours = tiktoken_pairs[name]
    assert ours.encode(text) == theirs.encode_ordinary(text)
    assert ours.decode(ours.encode(text)) == text


def test_rank_files_bring_their_special_tokens(
    tiktoken_pairs: dict[str, tuple[tiktoken.Encoding, TextTokenizer]],
) -> None:
    for theirs, ours in tiktoken_pairs.values():
        for text in (*NASTY, *WORSE, "'Sab", "x'\u017fab", "jqxzj"):
            assert ours.encode(text) == theirs.encode_ordinary(text)
    found = {name: (ours.eos_token, ours.eos_id, ours.vocab_size) for name, (_, ours) in tiktoken_pairs.items()}
    assert found == {
        "gpt2": (EOS, 50256, 50257),
        "p50k_base": (EOS, 50256, 50257),
        "cl100k_base": (EOS, 100257, 100277),
        "o200k_base": (EOS, 199999, 200019),
    }
    o200k = tiktoken_pairs["o200k_base"][1]
    assert o200k.decode([200018]) == "<|endofprompt|>"


def test_a_token_that_merging_cannot_reach_is_still_a_word() -> None:
    ranks = {bytes([value]): value for value in range(256)} | {b"abc": 256, b"cd": 257, b"bcd": 258}
    assert list(tokenizer_files.recover_merges(ranks)) == [(b"c", b"d"), (b"b", b"cd")]


def cache_of_the_hub(folder: Path, name: str, content: bytes) -> None:
    """What a download leaves behind, as the hub's client documents it."""
    model, commit = folder / f"models--{name.replace('/', '--')}", "0" * 40
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    (model / "snapshots" / commit).mkdir(parents=True)
    (model / "snapshots" / commit / "tokenizer.json").write_bytes(content)


def test_a_cached_tokenizer_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: pytest.fail("asked the network"))
    cache_of_the_hub(tmp_path, "owner/name", TRAINED.definition_json)
    assert load_tokenizer("owner/name").fingerprint == TRAINED.fingerprint


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            lambda: OSError("Name or service not known"),
            r"(?s)Name or service not known.*--tokenizer PATH/tokenizer.json",
        ),
        (lambda: missing_file(), "has no tokenizer.json; convert its tokenizer"),
    ],
)
def test_the_hub_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception], message: str
) -> None:
    asked: list[str] = []

    def unreachable(url: str, *, timeout: float) -> None:
        assert timeout <= 10
        asked.append(url)
        raise error()

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    started = time.monotonic()
    with pytest.raises(UserError, match=message):
        load_tokenizer("no-such/name")
    assert asked == ["https://huggingface.co/no-such/name/resolve/main/tokenizer.json"]
    assert time.monotonic() - started < 5


def test_a_hub_that_does_not_answer_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where requests vanish: each address of the hub is tried in vain, one after the other."""
    answered = Event()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url, *, timeout: answered.wait(30))
    monkeypatch.setattr(tokenizer_files, "HUB_TIMEOUT", 0.05)
    try:
        with pytest.raises(UserError, match=r"'no-such/name' from .* hub: the hub did not answer within 0\.05 s"):
            load_tokenizer("no-such/name")
    finally:
        answered.set()


def test_what_the_cache_of_the_hub_holds_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models--some--name"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    load_tokenizer("bytes").save(folder / "snapshots" / "abc" / "tokenizer.json")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("get_hf_file_metadata", "hf_hub_download"):
        monkeypatch.setattr(f"huggingface_hub.{name}", lambda *_, **__: pytest.fail("sent a request"))
    assert load_tokenizer("some/name").fingerprint == load_tokenizer("bytes").fingerprint


def missing_file() -> Exception:
    from huggingface_hub.errors import EntryNotFoundError

    return EntryNotFoundError("404")


def test_an_unreachable_hub_says_what_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"(?s)cannot load the tokenizer 'no-such/name'.*--tokenizer PATH/tokenizer.json"
    ):
        load_tokenizer("no-such/name")


# what ends documents is in none


PIECES = {"<unk>": 0.0, "</s>": 0.0, "▁": -2.0, "a": -1.0, "b": -1.5, "ab": -1.8, "<": -3.0, "/": -3.0, "s": -3.0,
          ">": -3.0, "s>": -4.0, "</": -9.0}  # fmt: skip


def unigram() -> Tokenizer:
    """As T5's: the end is a special token and at the same time a piece of the model, with the best of scores."""
    tokenizer = Tokenizer(models.Unigram(list(PIECES.items()), unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def best_pieces(text: str) -> list[str]:
    """The pieces of the highest sum of scores, of all ways to write `text` without the end."""

    def ways(rest: str) -> Iterator[tuple[float, list[str]]]:
        if not rest:
            yield 0.0, []
        for piece, score in PIECES.items():
            if piece not in ("<unk>", "</s>") and rest.startswith(piece):
                yield from ((score + more, [piece, *others]) for more, others in ways(rest[len(piece) :]))

    return max(ways("▁" + text.replace(" ", "▁")))[1]


@pytest.mark.parametrize("text", ["a</s>b", "</s>", "ab </s></s> ab", "<</s>>s", "a b", "</s"])
def test_a_model_that_knows_the_end_writes_its_text_in_other_pieces(text: str) -> None:
    plain = unigram()
    plain.encode_special_tokens = True
    assert ("</s>" in text) == ("</s>" in plain.encode(text).tokens), "what the library does is the reason for this"
    tokenizer = TextTokenizer.from_definition(json.loads(plain.to_str()), origin="t5").ending_documents(origin="t5")
    assert tokenizer.eos_id == 1
    ids, lengths = tokenizer.encode_batch(["ab", text, "b"])
    assert [tokenizer.tokenizer.id_to_token(i) for i in tokenizer.encode(text)] == best_pieces(text)
    assert ids.tolist() == [*tokenizer.encode("ab"), *tokenizer.encode(text), *tokenizer.encode("b")]
    assert lengths.tolist() == [2, len(tokenizer.encode(text)), 2]
    assert tokenizer.decode(tokenizer.encode(text)) == text == plain.decode(plain.encode(text).ids, False)


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_merges_do_not_come_to_the_end(ignore_merges: bool) -> None:
    vocabulary = {letter: number for number, letter in enumerate(["a", "b", "c", "ab", "abc", "bc"])}
    merges = [("a", "b"), ("ab", "c"), ("b", "c")]
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
    bpe.decoder = decoders.Fuse()
    bpe.add_special_tokens(["ab"])
    tokenizer = TextTokenizer.from_definition(json.loads(bpe.to_str()), origin="bpe", eos="ab")
    assert [tokenizer.tokenizer.id_to_token(i) for i in tokenizer.encode("cab")] == ["c", "a", "b"]
    if not ignore_merges:
        assert [tokenizer.tokenizer.id_to_token(i) for i in tokenizer.encode("abab")] == ["a", "b", "a", "b"]
    bpe.add_special_tokens(["b"])
    single = TextTokenizer.from_definition(json.loads(bpe.to_str()), origin="bpe", eos="b")
    with pytest.raises(UserError, match="'b' of bpe cannot end documents, for it stands for text"):
        single.ending_documents(origin="bpe")


def test_words_that_are_the_end_are_written_in_other_pieces() -> None:
    vocabulary = {"[UNK]": 0, "[SEP]": 1, "a": 2, "[": 3, "S": 4, "##E": 5, "##P": 6, "##]": 7}
    unknown = "[UNK]"
    pieces = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    pieces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pieces.add_special_tokens(["[SEP]", "[UNK]"])
    tokenizer = TextTokenizer.from_definition(json.loads(pieces.to_str()), origin="wordpiece")
    assert tokenizer.encode("a [SEP] a") == [2, 3, 4, 5, 6, 7, 2]
    assert (tokenizer.eos_id, tokenizer.unknown_id) == (1, 0)


def test_an_added_end_that_is_not_special_becomes_so() -> None:
    definition = TRAINED.definition
    for token in definition["added_tokens"]:
        token["special"] = False
    plain = Tokenizer.from_str(json.dumps(definition))
    plain.encode_special_tokens = True
    assert TRAINED.eos_id in plain.encode("a<|endoftext|>b").ids, "what the library does is the reason for this"
    tokenizer = TextTokenizer.from_definition(definition, origin="json", eos=EOS).ending_documents(origin="json")
    assert [tokenizer.encode(text) for text in CORPUS] == [TRAINED.encode(text) for text in CORPUS]
    assert tokenizer.fingerprint == TRAINED.fingerprint
    assert TRAINED.ending_documents(origin="") is TRAINED


def test_no_added_token_is_lost_when_the_end_becomes_special() -> None:
    """Two of one id, as files have them that were edited by hand: the library counts them anew."""
    definition = BYTES.definition
    (end,) = definition["added_tokens"]
    others = [{**end, "content": content, "id": 300, "special": False} for content in ("<a>", "<b>")]
    definition["added_tokens"] = [{**end, "special": False}, *others]
    plain = TextTokenizer.from_definition(definition, origin="json", eos=EOS)
    assert plain.encode("<a><b>") == plain.ending_documents(origin="json").encode("<a><b>") == [257, 258]


@pytest.mark.parametrize(
    ("tokenizer", "eos"),
    [
        (TRAINED, "x"),
        (TRAINED, "the"),
        (TRAINED, "Ġand"),
        (BYTES, "Ċ"),
        (BYTES, "ī"),  # a byte in the middle of characters
        (load_tokenizer("chars", texts=CORPUS), "\n"),
    ],
)
def test_a_token_that_stands_for_text_cannot_end_documents(tokenizer: TextTokenizer, eos: str) -> None:
    chosen = TextTokenizer.from_definition(tokenizer.definition, origin="own.json", eos=eos)
    with pytest.raises(UserError, match=r"of own\.json cannot end documents.*its special tokens: <\|endoftext\|>"):
        chosen.ending_documents(origin="own.json")


def test_a_word_that_no_text_comes_to_can_end_documents() -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # cuts the end into three
    tokenizer = TextTokenizer.from_definition(json.loads(words.to_str()), origin="words", eos="</s>")
    assert tokenizer.ending_documents(origin="words") is tokenizer


# training


def plainly_trained(size: int, texts: list[str]) -> dict[str, Any]:
    """What the library makes of whole words."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    plain.train_from_iterator(texts, trainer)
    content: dict[str, Any] = json.loads(plain.to_str())
    return content


def test_words_of_ordinary_length_are_trained_on_whole() -> None:
    texts = [*CORPUS, "x" * 512, "é" * 256, "the " + "ab" * 200]
    assert load_tokenizer("train:400", texts=texts).definition == plainly_trained(400, texts)


@pytest.mark.parametrize("run", [" ", "\n", "x", "-", "7", "é", "ab", "日"])
def test_a_long_run_does_not_hold_training_up(run: str) -> None:
    began = time.monotonic()
    trained = load_tokenizer("train:600", texts=[*CORPUS, f"a{run * 1_000_000}b"])
    assert time.monotonic() - began < 60  # whole, such a word takes hours
    text = f"the cat{run * 2000} sat"
    assert trained.decode(trained.encode(text)) == text


def test_training_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_training, "REPORT_SECONDS", 0.0)
    told: list[str] = []
    load_tokenizer("train:400", texts=CORPUS, report=told.append)
    assert "reading the sample for the tokenizer: 0.0 million characters, 0 s" in told
    assert any(line.startswith("training a tokenizer of 400 tokens on 0.0 million characters: ") for line in told)
    load_tokenizer("chars", texts=CORPUS, report=told.append)
    assert told[-1].startswith("reading the characters of the corpus: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_training_can_be_interrupted(number: signal.Signals, tmp_path: Path) -> None:
    letters = random.Random(1)
    words = [["".join(letters.choices("abcdefghijklmnop", k=9)) for _ in range(900)] for _ in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": " ".join(line)}) + "\n" for line in words))
    program = (
        "import sys, data_prep; from pipeline.data import tokenizer_training; from pipeline.errors import run_command;"
        "tokenizer_training.REPORT_SECONDS = 0.1; run_command(data_prep.main)"
    )
    command = [sys.executable, "-uc", program, "a.jsonl", "--output", "out", "--tokenizer", "train:60000"]
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert any(line.startswith("training a tokenizer of 60,000 tokens") for line in process.stdout)
            began = time.monotonic()
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert time.monotonic() - began < 20
    assert process.returncode == 75
    assert "stopped: units that are done are kept; go on with: python" in errors
    assert "Traceback" not in errors
