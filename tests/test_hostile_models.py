"""Checkpoints and Hugging Face folders that somebody has prepared: one message, before memory or time is spent."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import sample
from pipeline.data.tokenizer import load_tokenizer
from pipeline.errors import UserError
from pipeline.model.hf import load_hf
from pipeline.train.saving.checkpoint import inspect, load_model, read_state, resolve_checkpoint
from pipeline.train.saving.manifest import read_manifest
from tests.fuzz.mutate import sign_checkpoint
from tests.fuzz.samples import make_hf
from tests.support import run_pretrain, tiny_settings, write_config

CPU = torch.device("cpu")
SHAPE = {"n_layers": 2, "n_heads": 2, "d_model": 16, "context_length": 32}
SOON = 20.0  # seconds, on a machine that does other things; each of these took minutes or all memory


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    settings = tiny_settings(dataset, folder / "run", model=SHAPE, train={"steps": 4})
    code, printed = run_pretrain(write_config(folder / "c.yaml", settings))
    assert code == 0, printed
    return folder / "run" / "checkpoints" / "step-00000004"


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "step-00000004"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    load_tokenizer("bytes").save(folder / "bytes.json")
    make_hf(folder / "hf", folder / "bytes.json")
    return folder / "hf"


@pytest.fixture
def gpt2(folders: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders / "gpt2", tmp_path / "gpt2"))


@pytest.fixture
def llama(folders: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders / "llama", tmp_path / "llama"))


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def soon(call: Callable[[], object], message: str) -> str:
    began = time.monotonic()
    with pytest.raises(UserError, match=message) as raised:
        call()
    assert time.monotonic() - began < SOON
    return str(raised.value)


SIZES: list[dict[str, Any]] = [
    {"d_model": 65536},
    {"d_model": 65536, "n_layers": 1_000_000},
    {"n_layers": 1_000_000},
    {"n_layers": 10**18},
    {"vocab_size": 10**9},
    {"vocab_size": 10**18, "d_model": 10**18},
    {"d_ff": 10**12},
    {"context_length": 10**10},
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_checkpoint_of_impossible_size_is_refused_before_it_is_built(sizes: dict[str, Any], checkpoint: Path) -> None:
    path = checkpoint / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["model"] |= sizes
    settings["train"]["batch_tokens"] = settings["model"]["context_length"]
    path.write_text(yaml.safe_dump(settings))
    sign_checkpoint(checkpoint)
    soon(lambda: sample.load(str(checkpoint), device=CPU), "does not fit this model|cannot be .* layers")


@pytest.mark.parametrize("n_tokens", [10**9, 10**18])
def test_a_vocabulary_of_impossible_size_is_refused_before_it_is_built(n_tokens: int, checkpoint: Path) -> None:
    change_json(checkpoint / "state.json", lambda state: state.update(n_tokens=n_tokens))
    path = checkpoint / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["model"]["vocab_size"] = None
    path.write_text(yaml.safe_dump(settings))
    sign_checkpoint(checkpoint)
    soon(lambda: sample.load(str(checkpoint), device=CPU), "does not fit this model|cannot be .* layers")


HF_SIZES = [
    {"n_embd": 65536}, {"n_layer": 1_000_000}, {"vocab_size": 10**9}, {"n_embd": 65536, "n_layer": 10**6},
    {"n_positions": 2**31 - 1}, {"n_inner": 2**31 - 1, "n_embd": 2**30}, {"n_embd": 10**20}, {"vocab_size": -5},
]  # fmt: skip


@pytest.mark.parametrize("sizes", HF_SIZES, ids=str)
def test_a_folder_of_impossible_size_is_refused_before_it_is_built(sizes: dict[str, Any], gpt2: Path) -> None:
    change_json(gpt2 / "config.json", lambda config: config.update(sizes))
    soon(lambda: load_hf(gpt2), r"gpt2(/config\.json)? (do not fit|cannot be read|holds .* tensors)")


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    values = json.loads(content[8 : 8 + size])
    change(values)
    text = json.dumps(values).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def weights(checkpoint: Path) -> Path:
    return checkpoint / "model" / "00001-of-00001.safetensors"


@pytest.mark.parametrize("length", [2**29, 2**40, 2**63, 2**64 - 1])
def test_a_header_is_read_only_where_the_file_holds_it(length: int, checkpoint: Path, gpt2: Path) -> None:
    for path, load in (
        (weights(checkpoint), lambda: load_model(checkpoint, device=CPU)),
        (gpt2 / "model.safetensors", lambda: load_hf(gpt2)),
    ):
        path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
        soon(load, r"\.safetensors")


ENTRIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "float offsets": lambda entry: entry.update(data_offsets=[float(n) for n in entry["data_offsets"]]),
    "offsets beyond 64 bits": lambda entry: entry.update(data_offsets=[2**64, 2**64 + 4]),
    "negative offsets": lambda entry: entry.update(data_offsets=[-4, 0]),
    "offsets beyond the file": lambda entry: entry.update(data_offsets=[n + 2**40 for n in entry["data_offsets"]]),
    "one offset": lambda entry: entry.update(data_offsets=[0]),
    "a shape of text": lambda entry: entry.update(shape="ab"),
    "a negative shape": lambda entry: entry.update(shape=[-1, -1]),
    "a shape of bools": lambda entry: entry.update(shape=[True]),
    "many dimensions": lambda entry: entry.update(shape=[2**62] * 1000),
    "an unknown type": lambda entry: entry.update(dtype="F99"),
    "a list as type": lambda entry: entry.update(dtype=["F32"]),
    "nothing": lambda entry: entry.clear(),
}


@pytest.mark.parametrize("change", ENTRIES.values(), ids=ENTRIES)
def test_entries_of_wrong_types_in_a_header_are_named(
    change: Callable[[dict[str, Any]], object], checkpoint: Path, gpt2: Path
) -> None:
    rewrite_header(
        weights(checkpoint),
        lambda header: change(header["head.weight" if "head.weight" in header else sorted(header)[-1]]),
    )
    soon(lambda: load_model(checkpoint, device=CPU), r"00001-of-00001\.safetensors cannot be read as safetensors")
    rewrite_header(gpt2 / "model.safetensors", lambda header: change(header["transformer.ln_f.weight"]))
    soon(lambda: load_hf(gpt2), r"model\.safetensors")


def test_rows_that_no_file_has_are_told_before_there_is_memory_for_them(checkpoint: Path) -> None:
    rows = json.dumps({"embedding.tokens.weight": [0, 10**12]})
    rewrite_header(weights(checkpoint), lambda header: header["__metadata__"].update(rows=rows))
    soon(lambda: load_model(checkpoint, device=CPU), r"lacks rows \d+ to 999999999999 of 'embedding\.tokens\.weight'")


def test_whole_numbers_are_no_weights(checkpoint: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header["embedding.tokens.weight"]["dtype"] = "I32"

    rewrite_header(weights(checkpoint), change)
    soon(
        lambda: load_model(checkpoint, device=CPU), r"embedding\.tokens\.weight: expected floats .*, found torch\.int32"
    )


def resign(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    from pipeline.train.saving.manifest import manifest_of

    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    change(files)
    (checkpoint / "manifest.json").write_bytes(manifest_of(files, version=3))


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "model/../../secret", "a\0b", "", "model//x"])
def test_a_checkpoint_names_files_of_its_folder_alone(name: str, checkpoint: Path) -> None:
    (checkpoint.parent / "secret").write_text("")
    entry = {"bytes": 0, "xxh3_128": "99aa06d3014798d86001c324468d497f"}
    resign(checkpoint, lambda files: files.update({name: entry}))
    with pytest.raises(UserError, match="plain name of a file"):
        read_manifest(checkpoint)
    soon(lambda: resolve_checkpoint(checkpoint), r"manifest\.json cannot be read: files")


@pytest.mark.parametrize("entry", [5, None, {}, {"bytes": 1.5, "xxh3_128": "x"}, {"bytes": -1, "xxh3_128": "x"}])
def test_entries_of_wrong_types_in_a_checkpoints_manifest_are_named(entry: Any, checkpoint: Path) -> None:
    change_json(checkpoint / "manifest.json", lambda values: values["files"].update({"state.json": entry}))
    soon(lambda: resolve_checkpoint(checkpoint), r"manifest\.json cannot be read: files\.'?state\.json")


@pytest.mark.parametrize(
    "name", ["manifest.json", "state.json", "config.yaml", "tokenizer.json", "model/00001-of-00001.safetensors"]
)
def test_pipes_and_devices_in_a_checkpoint_are_damage(name: str, checkpoint: Path) -> None:
    path = checkpoint / name
    path.unlink()
    os.mkfifo(path)
    assert any("is a pipe, expected a file" in fault for fault in inspect(checkpoint).damage)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert any("is a device, expected a file" in fault for fault in inspect(checkpoint).damage)
    soon(lambda: sample.load(str(checkpoint), device=CPU), "is a device, expected a file")


def test_a_file_of_another_size_is_not_read_to_its_end(checkpoint: Path) -> None:
    os.truncate(weights(checkpoint), 2**42)
    soon(lambda: resolve_checkpoint(checkpoint), "found 4398046511104 bytes")


STATES: dict[str, Any] = {
    "step": -1, "rows": 1.5, "tokens": "many", "n_tokens": 2**63, "phases": [], "batches": [], "tokenizer_eos_id": None,
    "skipped": [99], "rollbacks": [5], "recent_losses": ["x"], "loss_scale": [1], "evaluated": "perhaps", "format": [3],
}  # fmt: skip


@pytest.mark.parametrize("key", STATES)
def test_entries_of_wrong_types_in_a_state_are_named(key: str, checkpoint: Path) -> None:
    change_json(checkpoint / "state.json", lambda state: state.update({key: STATES[key]}))
    with pytest.raises(UserError, match=r"state\.json cannot be read: .*|has format \[3\]"):
        read_state(checkpoint)


@pytest.mark.parametrize(
    "ramp", [{"stages": [], "full": 0}, {"stages": [[0, 4]], "full": 4}, {"stages": [], "full": 10**15}]
)
def test_batches_of_no_rows_or_of_all_memory_are_named(ramp: dict[str, Any], checkpoint: Path) -> None:
    change_json(checkpoint / "state.json", lambda state: state["batches"][0].update(ramp=ramp))
    with pytest.raises(UserError, match=r"batches\.0: expected batches of 1 to"):
        read_state(checkpoint)


@pytest.mark.parametrize("content", [b"[" * 10**5, b"\xff", b"9" * 5000, b'{"step": NaN}', b"", b"5"])
def test_files_of_a_checkpoint_that_are_no_json_are_named(content: bytes, checkpoint: Path) -> None:
    for name in ("state.json", "tokenizer.json"):
        before = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content)
        sign_checkpoint(checkpoint)
        soon(lambda: sample.load(str(checkpoint), device=CPU), name)
        (checkpoint / name).write_bytes(before)


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/srv/secret.safetensors", "a/../../secret.safetensors", 5, None, ["x"]]
)
def test_an_index_names_files_of_its_folder_alone(file: Any, llama: Path) -> None:
    for path in sorted(llama.glob("model-*.safetensors")):
        save_file(load_file(path), llama.parent / "secret.safetensors")
    change_json(
        llama / "model.safetensors.index.json",
        lambda index: index.update(weight_map=dict.fromkeys(index["weight_map"], file)),
    )
    soon(lambda: load_hf(llama), r"model\.safetensors\.index\.json cannot be read: weight_map")


def test_an_index_that_names_what_no_file_holds(llama: Path) -> None:
    change_json(
        llama / "model.safetensors.index.json", lambda index: index["weight_map"].update(more="model-1.safetensors")
    )
    soon(lambda: load_hf(llama), "names 'more', which its file lacks")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", 5), ("architectures", [5]), ("architectures", {"a": 1}), ("architectures", "Llama"),
        ("rope_scaling", 5), ("rope_scaling", [1]), ("rope_scaling", {"rope_type": [1]}),
        ("rope_parameters", {"rope_theta": "x"}), ("layer_types", [[1]]), ("layer_types", 5), ("vocab_size", "5"),
        ("hidden_size", 16.0), ("hidden_size", True), ("num_attention_heads", 0), ("num_hidden_layers", [2]),
        ("rms_norm_eps", "small"), ("rope_theta", -1.0), ("tie_word_embeddings", "no"),
    ],
)  # fmt: skip
def test_entries_of_wrong_types_in_a_config_are_named(key: str, value: Any, llama: Path) -> None:
    change_json(llama / "config.json", lambda config: config.update({key: value}))
    soon(lambda: load_hf(llama), rf"config\.json cannot be read: {key}")


@pytest.mark.parametrize("value", ["x", [1, "x"], {"a": 1}, 1.5, True])
def test_an_end_of_text_of_the_wrong_type_is_named(value: Any, llama: Path) -> None:
    change_json(llama / "generation_config.json", lambda config: config.update(eos_token_id=value))
    with pytest.raises(UserError, match=r"generation_config\.json cannot be read: eos_token_id"):
        load_tokenizer(str(llama))


@pytest.mark.parametrize("value", [-1, 2**64])
def test_an_end_of_text_that_is_no_token_is_passed_over(value: int, llama: Path) -> None:
    expected = load_tokenizer(str(llama)).eos_id
    change_json(llama / "generation_config.json", lambda config: config.update(eos_token_id=value))
    assert load_tokenizer(str(llama)).eos_id == expected


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_pipes_and_devices_in_a_folder_are_refused(name: str, gpt2: Path) -> None:
    (gpt2 / name).unlink()
    (gpt2 / name).symlink_to("/dev/zero")
    with pytest.raises(UserError):
        sample.load(str(gpt2), device=CPU)


TOKENIZERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no model": lambda values: values.pop("model"),
    "a model of text": lambda values: values.update(model="BPE"),
    "no vocabulary": lambda values: values["model"].pop("vocab"),
    "an id of four thousand million": lambda values: values["model"]["vocab"].update(x=2**32 - 1),
    "a negative id": lambda values: values["model"]["vocab"].update(x=-1),
    "an id of text": lambda values: values["model"]["vocab"].update(x="1"),
    "added tokens of text": lambda values: values.update(added_tokens=["x"]),
    "an added token without an id": lambda values: values.update(added_tokens=[{"content": "x"}]),
    "an added id beyond all": lambda values: values.update(added_tokens=[{"id": 2**31, "content": "x"}]),
    "a decoder of numbers": lambda values: values.update(decoder=5),
}


@pytest.mark.parametrize("change", TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizers_of_wrong_types_are_one_message(change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    load_tokenizer("bytes").save(path)
    change_json(path, change)
    soon(lambda: load_tokenizer(str(path)), r"tokenizer\.json")


def test_tokenizers_cut_or_flipped_are_one_message_or_one_that_works(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    load_tokenizer("train:300", texts=["a few words to learn from"]).save(path)
    content = path.read_bytes()
    for at in range(0, len(content), 97):
        for damaged in (content[:at], content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]):
            path.write_bytes(damaged)
            try:
                load_tokenizer(str(path)).encode("a few words")
            except UserError as error:
                assert "tokenizer" in str(error)  # noqa: PT017 - most are refused, and some are as good as before
