"""What holds for tokenizers of every published shape: training, exports, prompts and streaming agree with the file."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Regex, Tokenizer, decoders, models
from transformers import AutoTokenizer

from pipeline.data import tokenizer_files
from pipeline.data.dataset import open_dataset
from pipeline.data.preparing.prepare import prepare
from pipeline.data.preparing.request import Request
from pipeline.data.tokenizer import TextTokenizer, load_tokenizer
from pipeline.errors import UserError
from pipeline.generate.text import RowText
from tests.tokenizer_shapes import BEGINS, ENDS, SHAPES, definition, write_folder
from tests.tokenizer_shapes import tokenizer as library

WORDS = [
    "the",
    "cat",
    "it's",
    "12345",
    "café",
    "日本",
    "🎉",
    "\n",
    "  ",
    "\x00",
    "A",
    "!",
    *ENDS.values(),
    *BEGINS.values(),
]
TEXT = st.lists(st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=12)


@cache
def ours(shape: str) -> TextTokenizer:
    content = json.loads(definition(shape))
    return TextTokenizer.from_definition(content, origin=shape, eos=ENDS[shape]).ending_documents(origin=shape)


# streaming


def ids_of(shape: str, number: int) -> list[int]:
    """Random ids, half of them bytes where there are tokens for bytes; some without a token."""
    draw, tokenizer = random.Random(f"{shape} {number}"), ours(shape)
    tokens = {i: str(tokenizer.tokenizer.id_to_token(i)) for i in range(tokenizer.vocab_size)}
    in_bytes = [i for i, token in tokens.items() if token.startswith("<0x")] or [*tokens]
    return [
        draw.choice(in_bytes) if draw.random() < 0.5 else draw.randrange(tokenizer.vocab_size + 2)
        for _ in range(draw.choice([1, 2, 3, 8, 60, 300]))
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_streamed_text_is_the_text_decoded_at_once(shape: str) -> None:
    for number in range(200):
        ids = ids_of(shape, number)
        stream = ours(shape).stream()
        parts = [stream.push(token) for token in ids] + [stream.finish()]
        assert "".join(parts) == library(shape).decode(ids, skip_special_tokens=False) == ours(shape).decode(ids)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompt", ["the cat", "a ", "café 日本", "é", "", "\ufffd", "cat\n"])
def test_a_row_goes_on_where_its_prompt_ends(shape: str, prompt: str) -> None:
    tokenizer = ours(shape)
    context = tokenizer.prompt(prompt)
    for number in range(40):
        ids = ids_of(shape, number)
        row = RowText(tokenizer, context=context, stops=())
        text = "".join(row.push(token) for token in ids) + row.flush()
        before, whole = tokenizer.decode(context), tokenizer.decode([*context, *ids])
        if whole.startswith(before) and prompt != "\ufffd":  # else wrong bytes make those of the prompt unreadable
            assert text == whole.removeprefix(before)
        assert "\ufffd" not in text or "\ufffd" in tokenizer.decode(ids)


def test_bytes_that_fit_nothing_are_replaced_and_others_come_out_whole() -> None:
    llama = ours("llama2")
    of = {value: int(llama.tokenizer.token_to_id(f"<0x{value:02X}>")) for value in range(256)}
    word = int(llama.tokenizer.token_to_id("▁the"))

    def parts(*ids: int) -> list[str]:
        stream = llama.stream(context=llama.encode("a"))
        return [*(stream.push(number) for number in ids), stream.finish()]

    accent, wrong = [of[0xC3], of[0xA9]], of[0xFF]
    assert parts(*accent, word) == ["", "", "é the", ""]
    assert parts(*accent) == ["", "", "é"]
    assert "".join(parts(wrong, word)) == "\ufffd the"
    assert "".join(parts(*accent, wrong, word)) == "\ufffd\ufffd\ufffd the"  # as the library decodes them together
    assert "".join(parts(of[0xE6], of[0x97])) == "\ufffd\ufffd"


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("th", "X")]
        ),
        decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex(r"\s+$"), "")]),
        decoders.Sequence([decoders.ByteLevel(), decoders.Replace("e", "")]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip("t", 2, 0)]),
        decoders.Sequence([decoders.Fuse(), decoders.ByteFallback()]),
        decoders.BPEDecoder("e"),
        decoders.WordPiece(cleanup=True),
        decoders.CTC(),
    ],
    ids=str,
)
def test_any_decoder_streams_what_it_decodes(decoder: Any) -> None:
    plain = library("llama2")
    content = json.loads(plain.to_str()) | {"decoder": None}
    if decoder is not None:
        plain.decoder = decoder
        content = json.loads(plain.to_str())
    tokenizer = TextTokenizer.from_definition(content, origin="odd", eos="</s>")
    for number in range(60):
        ids = ids_of("llama2", number)
        stream = tokenizer.stream()
        assert "".join([*(stream.push(token) for token in ids), stream.finish()]) == tokenizer.decode(ids)


# the default encoding of an export is what training did


def exported(folder: Path, tokenizer: TextTokenizer) -> Any:
    """What transformers makes of an export."""
    folder.mkdir(parents=True)
    for name, content in tokenizer.exported(context_length=8).items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("exports")
    return {shape: exported(folder / shape, ours(shape)) for shape in SHAPES}


@pytest.mark.parametrize("shape", SHAPES)
@given(words=TEXT)
@settings(max_examples=60)
def test_an_export_encodes_by_default_as_training_did(exports: dict[str, Any], shape: str, words: list[str]) -> None:
    text = "".join(words)
    ids = ours(shape).encode(text)
    assert exports[shape](text).input_ids == exports[shape].encode(text) == ids
    assert ours(shape).eos_id not in ids
    assert exports[shape].eos_token_id == exports[shape].bos_token_id == ours(shape).eos_id


@pytest.mark.parametrize("shape", ["llama2", "gpt2", "t5"])
def test_what_a_file_does_by_default_and_training_not_is_off_and_told(shape: str, tmp_path: Path) -> None:
    plain = library(shape)
    plain.enable_truncation(4)
    plain.enable_padding(length=50)
    content = json.loads(plain.to_str())
    if shape != "t5":
        content["model"]["dropout"] = 0.5
    tokenizer = TextTokenizer.from_definition(content, origin=shape, eos=ENDS[shape]).ending_documents(origin=shape)
    text = "the cat sat on the mat, and it's the dog's turn"
    assert {tuple(tokenizer.encode(text)) for _ in range(20)} == {tuple(ours(shape).encode(text))}
    theirs = exported(tmp_path / "hf", tokenizer)
    assert {tuple(theirs(text).input_ids) for _ in range(20)} == {tuple(ours(shape).encode(text))}
    told = " | ".join(tokenizer.notes)
    assert "cuts texts off by default (truncation); here it does not" in told
    assert "fills texts up by default (padding); here it does not" in told
    assert ("leaves out merges at random (dropout 0.5)" in told) == (shape != "t5")


def test_what_is_put_around_a_text_by_default_is_told() -> None:
    told = {shape: [note for note in ours(shape).notes if " each text by default" in note] for shape in SHAPES}
    assert {shape for shape, notes in told.items() if notes} == {"llama2", "llama3", "mistral", "gemma", "t5", "bert"}
    assert told["llama3"][0].startswith(
        "the tokenizer puts <|begin_of_text|> before each text by default; documents are"
    )
    assert "puts [CLS] before and [SEP] after each text" in told["bert"][0]
    assert "puts </s> after each text" in told["t5"][0]


# prompts to a folder


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "kimi"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False},
        {"split_special_tokens": True, "model_max_length": 3},
    ],
    ids=str,
)
def test_a_prompt_is_encoded_as_its_folder_does_by_default(shape: str, config: dict[str, Any], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", shape, **config)
    tokenizer = load_tokenizer(str(folder))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    theirs = AutoTokenizer.from_pretrained(folder)
    bare = theirs("the", add_special_tokens=False).input_ids
    whole = theirs("the").input_ids
    ended = len(whole) > len(bare) and whole[-1] == theirs.eos_token_id
    for text in ("the cat", f"a{ENDS[shape]}b {BEGINS.get(shape, '')}c", "  café\n", "<|im_start|>the"):
        wanted = theirs(text).input_ids
        assert tokenizer.prompt(text) == (wanted[:-1] if ended else wanted)
    begins = theirs("").input_ids[:1] if whole[0] != bare[0] else [theirs.bos_token_id or theirs.eos_token_id]
    assert tokenizer.prompt("") == begins


def test_the_prompt_of_a_checkpoint_is_encoded_as_its_training_was() -> None:
    for shape in SHAPES:
        assert ours(shape).prompt("the cat") == ours(shape).encode("the cat")
        assert ours(shape).prompt("") == [ours(shape).eos_id]


# the end of documents


@pytest.mark.parametrize(
    ("shape", "files", "end", "note"),
    [
        ("gemma", {}, "<eos>", None),  # not </s>, an ordinary token
        ("gemma", {"tokenizer_config.json": {"eos_token": "</s>"}}, "</s>", None),
        ("gemma", {"special_tokens_map.json": {"eos_token": {"content": "<mask>"}}}, "<mask>", None),
        ("gemma", {"config.json": {"eos_token_id": 4}}, "<mask>", None),
        (
            "gemma",
            {"generation_config.json": {"eos_token_id": [1, 4]}},
            "<eos>",
            "'<eos>' (1, by generation_config.json), not with '<mask>' (4,",
        ),
        (
            "gemma",
            {"tokenizer_config.json": {"eos_token": "<eos>"}, "config.json": {"eos_token_id": [1, 2]}},
            "<eos>",
            "'<eos>' (1, by tokenizer_config.json), not with '<bos>' (2, by config.json); --eos TOKEN chooses",
        ),
        (
            "gemma",
            {"tokenizer_config.json": {"eos_token": "<none>"}, "config.json": {"eos_token_id": 99999}},
            "<eos>",
            None,
        ),
        ("qwen", {"tokenizer_config.json": {"eos_token": "<|im_end|>"}}, "<|im_end|>", None),
        ("qwen", {"tokenizer_config.json": {"eos_token": None}}, "<|endoftext|>", None),
        (
            "llama3",
            {},
            "<|end_of_text|>",
            "'<|end_of_text|>' (321, by its name), not with '<|eot_id|>' (323, by its name)",
        ),
        ("bert", {}, "[SEP]", None),
        ("t5", {}, "</s>", None),
        ("kimi", {}, "[EOS]", None),
    ],
    ids=str,
)
def test_documents_end_with_what_the_folder_says_else_a_special_token(
    shape: str, files: dict[str, Any], end: str, note: str | None, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(definition(shape))
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = load_tokenizer(str(path))
        assert tokenizer.eos_token == end
        assert bool(tokenizer.choice) == (note is not None)
        assert note is None or note in tokenizer.choice
        assert load_tokenizer(str(path), eos="<mask>" if shape == "gemma" else end).choice == ""


def test_an_ordinary_token_is_taken_for_an_end_only_when_asked_for(tmp_path: Path) -> None:
    content = json.loads(definition("gemma"))
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] != "<eos>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="has no special token known to end documents; choose one with --eos TOKEN"):
        load_tokenizer(str(tmp_path))
    asked = load_tokenizer(str(tmp_path), eos="</s>").ending_documents(origin="gemma")
    assert asked.eos_id == asked.tokenizer.token_to_id("</s>")
    assert asked.eos_id not in asked.encode("a </s> b")


def test_roles_are_found_in_files_and_by_name() -> None:
    found = {
        shape: {role: ours(shape).tokenizer.id_to_token(n) for role, n in ours(shape).others.items()}
        for shape in SHAPES
    }
    assert found["gemma"] == {"bos": "<bos>", "pad": "<pad>", "mask": "<mask>"}
    assert found["bert"] == {"pad": "[PAD]", "mask": "[MASK]"}
    assert found["gpt2"] == {}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json cannot be read: .*got \[\]; mend or remove it"),
        ("tokenizer_config.json", '{"eos_token": 5}', r"tokenizer_config\.json cannot be read: eos_token: "),
        ("tokenizer_config.json", '{"split_special_tokens": "yes"}', "cannot be read: split_special_tokens: "),
        ("special_tokens_map.json", '{"eos_token": ["a"]}', r"special_tokens_map\.json cannot be read: eos_token: "),
        ("generation_config.json", '{"eos_token_id": [1, "2"]}', r"generation_config\.json .* eos_token_id\.1: "),
        ("config.json", '{"eos_token_id": 1.5}', r"config\.json cannot be read: eos_token_id"),
        ("config.json", "{", r"config\.json cannot be read: it is not JSON"),
        ("config.json", "[" * 100_000, r"config\.json cannot be read: it is not JSON"),
    ],
)
def test_a_damaged_file_beside_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    write_folder(tmp_path, "gemma")
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(str(tmp_path))


def test_the_hub_says_what_a_folder_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import EntryNotFoundError

    remote, cache_folder = write_folder(tmp_path / "remote", "qwen"), tmp_path / "cache"

    def download(name: str, file: str, *, etag_timeout: float) -> str:
        assert (name, etag_timeout) == ("some/qwen", tokenizer_files.HUB_TIMEOUT)
        if not (remote / file).exists():
            raise EntryNotFoundError("404")
        cache_folder.mkdir(exist_ok=True)
        (cache_folder / file).write_bytes((remote / file).read_bytes())
        return str(cache_folder / file)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert load_tokenizer("some/qwen").eos_id == ours("qwen").eos_id
    assert sorted(path.name for path in cache_folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


# ids of added tokens


def test_added_tokens_behind_a_hole_keep_their_ids(tmp_path: Path) -> None:
    said = {entry["content"]: entry["id"] for entry in json.loads(definition("kimi"))["added_tokens"]}
    assert library("kimi").token_to_id("[PAD]") != said["[PAD]"], "what the library does is the reason for this"
    tokenizer = load_tokenizer(str(write_folder(tmp_path / "kimi", "kimi"))).ending_documents(origin="kimi")
    theirs = exported(tmp_path / "hf", tokenizer)
    for token, number in said.items():
        assert tokenizer.tokenizer.token_to_id(token) == theirs.convert_tokens_to_ids(token) == number
        assert number not in tokenizer.encode(f"a {token} b {token}")
    assert tokenizer.vocab_size == 1 + max(said.values())
    assert tokenizer.encode("the cat") == library("kimi").encode("the cat").ids


@pytest.mark.parametrize("fault", ["hole in a list", "two of one id", "id of a word", "other id than the vocabulary's"])
def test_added_tokens_that_cannot_have_their_ids_are_refused(fault: str, tmp_path: Path) -> None:
    content = json.loads(definition("t5" if fault == "hole in a list" else "gpt2"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    last = len(content["model"]["vocab"]) + len(content["added_tokens"])
    places = {
        "hole in a list": last + 7,
        "two of one id": last - 1,
        "id of a word": 5,
        "other id than the vocabulary's": 90_000,
    }
    token = "the" if fault == "other id than the vocabulary's" else "<new>"
    content["added_tokens"].append({"id": places.get(fault, 90_000), "content": token, **flags})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"gives the added token '[^']+' the id \d+, but `tokenizers` puts it at \d+"):
        load_tokenizer(str(tmp_path))


# preparations


def write_texts(file: Path) -> list[str]:
    texts = [f"the cat {number} sat on </s> the <eos> mat, it's café 日本" for number in range(130)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def prepared(folder: Path, tokenizer: Path, *, console: Console | None = None, **settings: Any) -> Any:
    request = Request(inputs=(str(folder / "a.jsonl"),), tokenizer=str(tokenizer), val_fraction=0.0, **settings)
    return prepare(request, console=console or Console(quiet=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_preparation_does_what_the_export_does(shape: str, exports: dict[str, Any], tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "a.jsonl")
    console = Console(record=True, soft_wrap=True, file=(tmp_path / "printed").open("w"))
    manifest = prepared(tmp_path, write_folder(tmp_path / "hf", shape), console=console, output=tmp_path / "out")
    assert (
        manifest.eos_id == ours(shape).eos_id
        if shape != "kimi"
        else json.loads(definition("kimi"))["added_tokens"][1]["id"]
    )
    split = open_dataset(tmp_path / "out").split("train")
    ids = split.tokens(0, split.n_tokens).tolist()
    if shape != "kimi":  # which is placed anew
        assert ids == [number for text in texts for number in (*exports[shape](text).input_ids, manifest.eos_id)]
    printed = console.export_text()
    assert ("note: the tokenizer puts" in printed) == (shape in (*BEGINS, "t5"))


def test_merges_left_to_chance_give_the_same_dataset_twice(tmp_path: Path) -> None:
    write_texts(tmp_path / "a.jsonl")
    content = json.loads(definition("gpt2"))
    content["model"]["dropout"] = 0.3
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    console = Console(record=True, soft_wrap=True, file=(tmp_path / "printed").open("w"))
    first, second = (
        prepared(tmp_path, tmp_path / "tokenizer.json", console=console, output=tmp_path / name) for name in "ab"
    )
    assert first.data_digest == second.data_digest
    assert "note: the tokenizer leaves out merges at random (dropout 0.3); here it does not" in console.export_text()


def test_a_preparation_goes_on_with_the_end_it_began_with(tmp_path: Path) -> None:
    write_texts(tmp_path / "a.jsonl")
    folder = write_folder(tmp_path / "hf", "qwen")  # by its name it would be <|endoftext|>
    whole = prepared(tmp_path, folder, output=tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "train-00000.bin").unlink()
    again = prepared(tmp_path, folder, output=tmp_path / "out")
    assert (again.data_digest, again.eos_id) == (whole.data_digest, whole.eos_id)
    assert again.eos_id == ours("qwen").eos_id
    (tmp_path / "out" / "manifest.json").unlink()
    write_folder(folder, "qwen", eos_token="<|endoftext|>")  # noqa: S106 - a token of text
    other = prepared(tmp_path, folder, output=tmp_path / "out")
    assert other.data_digest == prepared(tmp_path, folder, output=tmp_path / "other").data_digest != whole.data_digest


def test_files_of_before_mean_what_they_meant() -> None:
    """A dataset knows its tokenizer by the digest of the file, post-processor and all."""
    for shape in SHAPES:
        content = json.loads(definition(shape))
        saved = TextTokenizer.from_definition(content, origin=shape, eos=ENDS[shape])
        assert json.loads(saved.definition_json) == content | {"truncation": None, "padding": None}
        words = ["the", "cat", "日本", "\n", "it's"]
        plain = Tokenizer.from_str(definition(shape)).encode(" ".join(words), add_special_tokens=False)
        assert saved.encode(" ".join(words)) == plain.ids


def test_a_vocabulary_may_lack_every_role() -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "end": 2}, "<unk>"))
    words.add_special_tokens(["end"])
    tokenizer = TextTokenizer.from_definition(json.loads(words.to_str()), origin="words", eos="end")
    assert (dict(tokenizer.others), tokenizer.notes, tokenizer.end_ids) == ({}, (), {2})


def test_a_post_processor_that_lacks_its_token_is_told(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "gpt2")
    file = folder / "tokenizer.json"
    step = {"SpecialToken": {"id": "[X]", "type_id": 0}}
    broken = {"type": "TemplateProcessing", "single": [step], "pair": [], "special_tokens": {}}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": broken}))
    with pytest.raises(UserError, match=r"cannot encode this prompt: .*mend its tokenizer\.json"):
        load_tokenizer(str(folder)).prompt("a")
