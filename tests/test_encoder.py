"""Fast encoding: the ids of `tokenizers` whoever encodes, long documents in parts, and differences are found."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from pipeline.data.preparing import encoder as encoder_module
from pipeline.data.preparing.cuts import WORD_PATTERNS, cut, divisible
from pipeline.data.preparing.encoder import Encoder, EncoderMismatch, Tokens, choose_encoder
from pipeline.data.preparing.nasty import NASTY, unicode_texts
from pipeline.data.tokenizer import EOS, TextTokenizer, load_tokenizer
from pipeline.errors import UserError

CORPUS = ["the cat sat on the mat.\nThe dog/cat said: 'it's 2024'\n" * 20, "日本語 text\n\n  \n", *NASTY]
TRAINED = load_tokenizer("train:400", texts=CORPUS)
BYTES = load_tokenizer("bytes")
CHARS = load_tokenizer("chars", texts=[*CORPUS, EOS])


def with_pattern(pattern: str) -> TextTokenizer:
    """A small byte-level BPE that cuts text into words by `pattern`."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, ".\n/x.\n/y !\n\n /z  \n"], trainer=trainer)
    return TextTokenizer.from_definition(json.loads(tokenizer.to_str()), origin="test")


PATTERNED = {pattern: with_pattern(pattern) for pattern in sorted(WORD_PATTERNS)}


def changed(tokenizer: TextTokenizer, **changes: Any) -> TextTokenizer:
    return TextTokenizer.from_definition({**tokenizer.definition, **changes}, origin="test")


def plainly(tokenizer: TextTokenizer, text: str) -> list[int]:
    """Ids as `tokenizers` alone gives them."""
    return list(tokenizer.tokenizer.encode(text, add_special_tokens=False).ids)


def added(token_id: int, content: str, **flags: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    return {"id": token_id, "content": content, **plain, **flags}


def chosen(tokenizer: TextTokenizer, sample: list[bytes], **asked: Any) -> tuple[str, str]:
    encoder, reason = choose_encoder(tokenizer, sample, **asked)
    return encoder.backend, reason


ATOMS = [
    *"\n\n\n\n\r\t/.' ab1é日!",
    "'s",
    "  ",
    "\u3000",
    "\xa0",
    "\u2028",
    "\x85",
    "\x1c",
    "e\u0301",
    "\ufeff",
    EOS,
    "\U0001f600",
]
MESSY = st.lists(st.sampled_from(ATOMS), max_size=40).map("".join)


ENCODERS = [
    (tokenizer, Encoder(tokenizer, backend=backend))
    for tokenizer in (TRAINED, BYTES)
    for backend in ("gigatoken", "tokenizers")
]


@given(texts=st.lists(MESSY | st.text(st.characters(exclude_categories=["Cs"])), max_size=6))
@settings(max_examples=60)
def test_ids_are_those_of_tokenizers(texts: list[str]) -> None:
    for tokenizer, encoder in ENCODERS:
        ids, lengths = encoder.encode([text.encode() for text in texts])
        assert (ids.dtype, lengths.dtype) == (np.uint16, np.int64)
        assert [part.tolist() for part in np.split(ids, np.cumsum(lengths))][:-1] == [
            plainly(tokenizer, text) for text in texts
        ]
        assert len(ids) == lengths.sum()
        ended, longer = encoder.encode([text.encode() for text in texts], end=7)
        assert ended.tolist() == [i for text in texts for i in [*plainly(tokenizer, text), 7]]
        assert np.array_equal(longer, lengths + 1)


@pytest.mark.parametrize("tokenizer", [TRAINED, BYTES, CHARS, *PATTERNED.values()])
@given(text=MESSY)
@settings(max_examples=150)
def test_parts_encode_to_the_ids_of_the_whole(tokenizer: TextTokenizer, text: str) -> None:
    assert divisible(tokenizer.definition)
    parts = [part.decode() for part in cut(text.encode(), 1)]
    assert "".join(parts) == text
    cutter = tokenizer.tokenizer.pre_tokenizer
    words = [word for word, _ in cutter.pre_tokenize_str(text)]
    assert [word for part in parts for word, _ in cutter.pre_tokenize_str(part)] == words
    if tokenizer is not CHARS:  # it lacks some of these characters
        assert [i for part in parts for i in plainly(tokenizer, part)] == plainly(tokenizer, text)


def test_prose_of_any_script_is_cut_at_its_lines() -> None:
    for line in ("A line.\n", "日本語の行。\n", "строка\n", "שלום\n", "line 1\n"):
        assert [len(part) for part in cut(line.encode() * 30, 1)] == [len(line.encode())] * 30
    assert [len(part) for part in cut(b"ab\n" * 100, 100)] == [102, 102, 96]
    for whole in (
        b"a\n\nb\n c \nd",
        b"a.\n/b",
        "a\n\u3000b\u3000\nc\n\u2003d\x85\ne".encode(),
        b"a" * 100,
        b"",
        b"a\n",
    ):
        assert list(cut(whole, 1)) == [whole]


def test_only_what_was_proven_is_cut() -> None:
    words = TRAINED.definition["pre_tokenizer"]
    assert not divisible({**TRAINED.definition, "normalizer": {"type": "NFC"}})
    assert not divisible({**TRAINED.definition, "pre_tokenizer": {**words, "add_prefix_space": True}})
    assert not divisible({**TRAINED.definition, "pre_tokenizer": {"type": "Metaspace"}})
    assert not divisible({**TRAINED.definition, "pre_tokenizer": None})
    assert not divisible(with_pattern(r"[^\n]+\n?[^\n]*|\n").definition)
    for token in (added(400, "<t>", lstrip=True), added(400, "<t>", rstrip=True), added(400, "a\nb")):
        assert not divisible({**TRAINED.definition, "added_tokens": [token]})
    assert divisible({**TRAINED.definition, "added_tokens": [added(400, "<t>"), added(401, "a\n", special=True)]})


def test_long_documents_go_to_tokenizers_in_bounded_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "The cat sat.\nit's 12\n\n  x\n/y\n" * 200
    monkeypatch.setattr(encoder_module, "PIECE_BYTES", 100)
    monkeypatch.setattr(encoder_module, "BATCH_BYTES", {"gigatoken": 500, "tokenizers": 500})
    seen: list[int] = []
    encode_batch = TextTokenizer.encode_batch

    def spy(self: TextTokenizer, texts: list[str]) -> Any:
        seen.append(sum(map(len, texts)))
        return encode_batch(self, texts)

    monkeypatch.setattr(TextTokenizer, "encode_batch", spy)
    for tokenizer in (TRAINED, BYTES, CHARS):
        ids, lengths = Encoder(tokenizer, backend="tokenizers").encode([b"cat", text.encode(), b"", text.encode()])
        assert max(seen) <= 500
        assert lengths.tolist() == [len(plainly(tokenizer, t)) for t in ("cat", text, "", text)]
        assert ids[lengths[0] : lengths[:2].sum()].tolist() == plainly(tokenizer, text)
        ended, _ = Encoder(tokenizer, backend="tokenizers").encode([b"", text.encode(), b"cat", b""], end=3)
        assert ended.tolist() == [3, *plainly(tokenizer, text), 3, *plainly(tokenizer, "cat"), 3, 3]


def test_gigatoken_is_chosen_where_it_agrees() -> None:
    sample = [text.encode() for text in CORPUS]
    for tokenizer in (TRAINED, BYTES):
        for asked in ("auto", "gigatoken"):
            assert chosen(tokenizer, sample, asked=asked) == ("gigatoken", "gives the same ids as tokenizers")
    assert chosen(TRAINED, sample, asked="tokenizers") == ("tokenizers", "asked for")
    backend, reason = chosen(CHARS, sample)
    assert backend == "tokenizers"
    assert "vocabularies of characters" in reason
    with pytest.raises(UserError, match=r"gigatoken cannot encode with this tokenizer: .*characters"):
        chosen(CHARS, sample, asked="gigatoken")


def test_added_tokens_and_templates_count_as_in_tokenizers() -> None:
    post = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": EOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {EOS: {"id": EOS, "ids": [TRAINED.eos_id], "tokens": [EOS]}},
    }
    tokens = [*TRAINED.definition["added_tokens"], added(400, "<tool>"), added(401, "<end>", special=True)]
    tokenizer = changed(TRAINED, added_tokens=tokens, post_processor=post)
    assert chosen(tokenizer, [])[0] == "gigatoken"
    text = f"a<tool>b<end>{EOS}"
    ids, _ = Encoder(tokenizer, backend="gigatoken").encode([text.encode()])
    assert 400 in ids
    assert not {401, TRAINED.eos_id} & set(ids.tolist())
    assert ids.tolist() == plainly(tokenizer, text)


def test_composing_characters_is_left_to_tokenizers() -> None:
    tokens = [*TRAINED.definition["added_tokens"], added(400, "<t>"), added(401, "<é>", normalized=True)]
    tokenizer = changed(TRAINED, normalizer={"type": "NFC"}, added_tokens=tokens)
    assert chosen(tokenizer, [])[0] == "gigatoken"
    encoder = Encoder(tokenizer, backend="gigatoken")
    texts = [
        "e\u0301",
        "a<t>\u0338b e\u0301",
        "<e\u0301>",
        "<\u00e9>",
        "<t>e\u00e9",
        "\u09fe\u0325x",
        "x\u1aeb\u0301y",
        "\ud55c",
    ]
    texts += [f"x{chr(code)}\u0325\u0301y" for code in range(0x300, 0x20000, 7) if not 0xD800 <= code < 0xE000]
    ids, lengths = encoder.encode([text.encode() for text in texts])
    got = [part.tolist() for part in np.split(ids, np.cumsum(lengths))][:-1]
    assert got == [plainly(tokenizer, text) for text in texts]
    assert got[0] == plainly(TRAINED, "\u00e9")


def test_gigatoken_is_refused_where_it_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    whole_words = changed(
        TRAINED, added_tokens=[*TRAINED.definition["added_tokens"], added(400, "<t>", single_word=True)]
    )
    backend, reason = chosen(whole_words, [])
    assert backend == "tokenizers"
    assert "the ids of 'a<t>b' (5 bytes) differ from token 1 on: gigatoken [400" in reason
    with pytest.raises(UserError, match="'a<t>b'"):
        chosen(whole_words, [], asked="gigatoken")
    backend, reason = chosen(changed(TRAINED, normalizer={"type": "Lowercase"}), [])
    assert backend == "tokenizers"
    assert "may normalize text otherwise (Lowercase)" in reason
    for normalizers in ([{"type": "NFC"}], [{"type": "Prepend", "prepend": "_"}, {"type": "NFC"}]):
        sequence = changed(TRAINED, normalizer={"type": "Sequence", "normalizers": normalizers})
        assert "may normalize text otherwise (Sequence)" in chosen(sequence, [])[1]
    random_merges = changed(TRAINED, model={**TRAINED.definition["model"], "dropout": 0.5})
    assert chosen(random_merges, [])[0] == "gigatoken", "it is off for both"
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert "not installed" in chosen(TRAINED, [])[1]


def break_gigatoken(monkeypatch: pytest.MonkeyPatch, fault: Callable[[bytes, Any], Any]) -> list[int]:
    """Let what gigatoken gives pass through `fault`; returns a list that grows by each loading."""
    loads: list[int] = []
    load = encoder_module._load_gigatoken

    def broken(definition: str, *, vocab_size: int) -> Callable[[bytes], Any]:
        loads.append(1)
        encode = load(definition, vocab_size=vocab_size)
        return lambda content: fault(content, encode(content))

    monkeypatch.setattr(encoder_module, "_load_gigatoken", broken)
    return loads


def panic(_: bytes, __: Any) -> Any:
    raise type("PanicException", (BaseException,), {})("index out of bounds")


def test_a_sample_of_the_corpus_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    break_gigatoken(monkeypatch, lambda content, ids: ids[:-1] if b"zebra" in content else ids)
    assert chosen(TRAINED, [b"a horse"])[0] == "gigatoken"
    backend, reason = chosen(TRAINED, [b"a horse", b"a zebra"])
    assert backend == "tokenizers"
    assert "the ids of 'a zebra' (7 bytes) differ" in reason


def test_a_rare_character_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    break_gigatoken(monkeypatch, lambda content, ids: ids[:-1] if "\U00012f90".encode() in content else ids)
    assert any("\U00012f90" in text for text in unicode_texts())  # first of a block newer than some tables
    assert chosen(TRAINED, [])[0] == "tokenizers"


@pytest.mark.parametrize("fault", [lambda content, ids: ids[:-1] if content == b"\n" else ids, panic])
def test_each_process_checks_what_it_loads(monkeypatch: pytest.MonkeyPatch, fault: Callable[[bytes, Any], Any]) -> None:
    break_gigatoken(monkeypatch, fault)
    with pytest.raises(EncoderMismatch, match=r"differ from token 0|gigatoken fails: index out of bounds"):
        Encoder(TRAINED, backend="gigatoken").encode([b"harmless"])


def test_ids_beyond_the_vocabulary_are_not_gigatokens_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    load = encoder_module._load_gigatoken
    monkeypatch.setattr(encoder_module, "_load_gigatoken", lambda content, vocab_size: load(content, vocab_size=200))
    with pytest.raises(EncoderMismatch, match="it has ids up to 399, the tokenizer up to 199"):
        Encoder(TRAINED, backend="gigatoken").encode([b"harmless"])


def test_ids_of_a_large_vocabulary_keep_their_value() -> None:
    words = {f"w{number}": number for number in range(70_000)}
    tokenizer = Tokenizer(models.WordLevel({**words, "[UNK]": 70_000, EOS: 70_001}, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    large = TextTokenizer.from_definition(json.loads(tokenizer.to_str()), origin="large", eos=EOS)
    ids, lengths = Encoder(large, backend="tokenizers").encode([b"w69999 w0", b"w65536"], end=large.eos_id)
    assert (ids.tolist(), lengths.tolist()) == ([69_999, 0, 70_001, 65_536, 70_001], [3, 2])


def test_the_audit_takes_the_same_documents_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [f"document number {number}".encode() for number in range(60_000)]
    taken = {content for content in contents if encoder_module.is_audited(content)}
    assert taken == {f"document number {number}".encode() for number in (28167, 36443, 36639, 45383, 47367)}
    alike = [b"a head " * 50 + content * 20 + b"a foot " * 50 for content in contents]  # but for their middle
    assert 1 <= sum(map(encoder_module.is_audited, alike)) <= 15
    encoder = Encoder(TRAINED, backend="gigatoken")
    encoder.encode(contents)
    assert (encoder.audited, encoder.documents) == (len(taken), len(contents))
    assert encoder.text_bytes == sum(map(len, contents))
    victim = sorted(taken)[0]
    break_gigatoken(monkeypatch, lambda content, ids: ids[::-1] if content == victim else ids)
    Encoder(TRAINED, backend="gigatoken").encode([content for content in contents[:500] if content not in taken])
    with pytest.raises(EncoderMismatch, match=f"{victim.decode()!r}.*differ from token 0"):
        Encoder(TRAINED, backend="gigatoken").encode(contents)


def test_only_short_pieces_are_audited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "AUDIT_ONE_IN", 1)
    monkeypatch.setattr(encoder_module, "AUDIT_BYTES", 1000)
    monkeypatch.setattr(encoder_module, "PIECE_BYTES", 500)
    encoder = Encoder(TRAINED, backend="gigatoken")
    encoder.encode([b"x" * 1001, b"y" * 1000, b"a line\n" * 100])  # too long; long enough; two parts
    assert encoder.audited == 3


def test_loading_anew_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [text.encode() * 50 for text in CORPUS]
    once, _ = Encoder(TRAINED, backend="gigatoken").encode(contents)
    for name, value in (("RELOAD_BYTES", 1000), ("SHARED_CACHE_BYTES", -(2**40))):
        with monkeypatch.context() as patch:
            loads = break_gigatoken(patch, lambda _, ids: ids)
            patch.setattr(encoder_module, name, value)
            patch.setattr(encoder_module, "BATCH_BYTES", {"gigatoken": 1000})
            often, _ = Encoder(TRAINED, backend="gigatoken").encode(contents)
            assert len(loads) > 5
            assert np.array_equal(once, often)


def test_workers_share_the_memory_for_remembered_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the process grows by a number of bytes with each batch, fewer workers load gigatoken anew less often."""
    grown = itertools.count(step=2**24)
    monkeypatch.setattr(encoder_module, "_resident_bytes", lambda: next(grown))
    monkeypatch.setattr(encoder_module, "BATCH_BYTES", {"gigatoken": 10})
    loaded = []
    for workers in (1, 4, 10**6):
        with monkeypatch.context() as patch:
            loads = break_gigatoken(patch, lambda _, ids: ids)
            Encoder(TRAINED, backend="gigatoken", workers=workers).encode([b"0123456789"] * 200)
            loaded.append(len(loads))
    assert 1 < loaded[0] < loaded[1] < loaded[2]


def test_documents_with_more_tokens_than_bytes_have_room() -> None:
    tokenizer = changed(BYTES, normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "bcdef"})
    ids, lengths = Encoder(tokenizer, backend="tokenizers").encode([b"a" * 100, b"x", b"aa"])
    assert bytes(ids.tolist()) == b"bcdef" * 100 + b"x" + b"bcdef" * 2
    assert lengths.tolist() == [500, 1, 10]
    tight = changed(BYTES, normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "bcd"})
    ids, _ = Encoder(tight, backend="tokenizers").encode([b"a"], end=256)  # no room is left for the end
    assert ids.tolist() == [*b"bcd", 256]


def test_unknown_characters_are_all_named() -> None:
    tokenizer = load_tokenizer("chars", texts=["abc\n"])
    encoder = Encoder(tokenizer, backend="tokenizers")
    with pytest.raises(UserError, match=r"characters '\?' \(U\+003F\), 'é' \(U\+00E9\) are not among the 4"):
        encoder.encode([b"abc", "é".encode(), b"?"])
    with pytest.raises(UserError, match=r"'0' .*'9' \(U\+0039\) and 3 more are not"):
        tokenizer.encode("0123456789xyz")


def test_special_text_is_counted_by_document() -> None:
    tokens = [*TRAINED.definition["added_tokens"], added(401, "[PAD]", special=True), added(402, "<tool>")]
    encoder = Encoder(changed(TRAINED, added_tokens=tokens), backend="tokenizers")
    yes = [EOS.encode(), b"a" + EOS.encode() * 2, b"x[PAD]"]
    assert encoder.special_text([*yes, b"", b"<|", b"<|endoftext", b"[PADD", b"<tool>", b"plain"]) == 3


@given(st.lists(st.text("<|ab>", min_size=1, max_size=4), min_size=1, max_size=5, unique=True), st.text("<|ab>"))
def test_tokens_are_found_wherever_they_are(tokens: list[str], text: str) -> None:
    found = Tokens([added(number, token) for number, token in enumerate(tokens)]).within(text.encode())
    assert found == any(token in text for token in tokens)


def test_the_unknown_token_is_known() -> None:
    assert Encoder(TRAINED, backend="tokenizers").unknown_id is None
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1, EOS: 2}, unk_token="[UNK]"))  # noqa: S106 - a token of text
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens([EOS])
    encoder = Encoder(TextTokenizer.from_definition(json.loads(words.to_str()), origin="w"), backend="tokenizers")
    assert encoder.unknown_id == 1
    assert encoder.encode([b"a b a"])[0].tolist() == [0, 1, 0]
    pieces = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), (EOS, -9.0)], unk_id=0))
    unigram = TextTokenizer.from_definition(json.loads(pieces.to_str()), origin="u", eos=EOS)
    assert Encoder(unigram, backend="tokenizers").unknown_id == 0
