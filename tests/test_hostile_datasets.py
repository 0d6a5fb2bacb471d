"""Datasets that a disk has damaged or somebody has prepared: one message, nothing outside of the folder is touched."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pipeline.data.dataset import TokenSplit, open_dataset
from pipeline.data.deleting.contamination import check_contamination
from pipeline.data.deleting.dedup import deduplicate
from pipeline.data.exchange.export_llmc import export_llmc
from pipeline.data.exchange.foreign import open_foreign
from pipeline.data.loading.rows import Concat, Pack
from pipeline.data.manifest import read_manifest
from pipeline.data.preparing.audit import inspect, verify
from pipeline.data.preparing.unit import UnitReport
from pipeline.data.shards import HEADER
from pipeline.errors import UserError
from tests.fuzz.mutate import sign_dataset
from tests.prepared import edit_manifest, write_dataset
from tests.support import run_pretrain, tiny_settings, write_config

TEXTS = ["one", "two words", "three and more words", "x" * 300, "last", "two words"]
QUIET = Console(quiet=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "dataset", {"train": [TEXTS, TEXTS[::-1]], "val": [["held out"]]})


def readers(folder: Path) -> dict[str, Callable[[], object]]:
    """Everything that reads a dataset."""
    question = folder.parent / "questions.jsonl"
    question.write_text(json.dumps({"text": "a question of eight words is long enough"}) + "\n")
    return {
        "train": lambda: read_everything(open_dataset(folder).split("train")),
        "verify": lambda: verify(folder),
        "inspect": lambda: inspect(folder),
        "near": lambda: deduplicate(folder, method="near", executor=None, console=QUIET),
        "exact": lambda: deduplicate(folder, method="exact", executor=None, console=QUIET),
        "export": lambda: export_llmc(folder, folder.parent / "out", split="train"),
        "contamination": lambda: check_contamination(
            folder, [question], delete=True, text_key="text", executor=None, console=QUIET
        ),
    }


def read_everything(split: TokenSplit) -> None:
    for plan in (Concat(split, context_length=8), Pack(split, context_length=8, key=1)):
        rows = np.arange(plan.all_rows)
        plan.read(rows, np.zeros_like(rows), documents=True)
    for number in range(split.n_documents):
        split.describe(number)


def refusals(folder: Path) -> dict[str, str]:
    """What the readers that refuse a dataset say; no other error is one. Each has a dataset of its own."""
    found = {}
    for name in readers(folder):
        copy = folder.parent / name / "dataset"
        shutil.copytree(folder, copy)
        try:
            readers(copy)[name]()
        except UserError as error:
            found[name] = str(error)
    return found


NAMES: dict[str, Callable[[dict[str, Any]], object]] = {
    "name": lambda shard: shard.update(name="../victim/train-00000"),
    "name and files": lambda shard: shard.update(
        name="../victim/train-00000",
        files={name.replace("train", "../victim/train"): info for name, info in shard["files"].items()},
    ),
    "absolute": lambda shard: shard.update(name="/srv/train-00000"),
    "another file": lambda shard: shard["files"].update({"../victim/file": next(iter(shard["files"].values()))}),
    "a bitmap": lambda shard: shard["files"].update({"train-00000.keep-/../x": next(iter(shard["files"].values()))}),
    "a stranger": lambda shard: shard["files"].update({"manifest.json": next(iter(shard["files"].values()))}),
    "zero byte": lambda shard: shard.update(name="train\0-00000"),
    "lacking": lambda shard: shard["files"].pop("train-00000.idx"),
}


@pytest.mark.parametrize("change", NAMES.values(), ids=NAMES)
def test_a_manifest_names_the_files_of_its_shards_and_no_others(
    change: Callable[[dict[str, Any]], object], folder: Path
) -> None:
    victim = folder.parent / "victim"
    victim.mkdir()
    for path in folder.glob("train-00000.*"):
        shutil.copy(path, victim)
    (victim / "file").write_text("untouched")
    before = {path.name: path.read_bytes() for path in victim.iterdir()}
    edit_manifest(folder, lambda values: change(values["splits"]["train"][0]))
    for name, read in readers(folder).items():
        with pytest.raises(UserError, match=r"manifest\.json is damaged at splits\.train\.0"):
            read()
        assert {path.name: path.read_bytes() for path in victim.iterdir()} == before, name


def test_a_ledger_names_files_of_its_folder() -> None:
    values = {
        "unit": 0, "part": 0, "last": True, "key": "", "shards": {}, "first_sources": {}, "documents": 0,
        "text_bytes": 0, "rows": {}, "drops": {}, "examples": (), "noticed": {},
        "quarantine": "rejected.jsonl", "lowest_draw": 0,
    }  # fmt: skip
    assert UnitReport.model_validate(values).quarantine == "rejected.jsonl"
    with pytest.raises(ValueError, match="plain name"):
        UnitReport.model_validate({**values, "quarantine": "../victim/file"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 2**40),
        ("vocab_size", 0),
        ("eos_id", 257),
        ("eos_id", -1),
        ("records", "many"),
        ("records", 1.5),
        ("splits", [1]),
        ("splits", {"train": [None]}),
        ("splits", {"test": []}),
        ("drops", {"a": True}),
        ("inputs", 5),
        ("dtype", ["uint16"]),
        ("format_version", [2]),
        ("format_version", 10**400),
    ],
)
def test_entries_of_wrong_types_in_a_manifest_are_named(key: str, value: Any, folder: Path) -> None:
    edit_manifest(folder, lambda values: values.update({key: value}))
    with pytest.raises(
        UserError, match=rf"manifest\.json(: format version| is damaged at {key}| is damaged at .*{key})"
    ):
        read_manifest(folder)


def test_what_a_manifest_says_reaches_the_terminal_without_control_characters(folder: Path) -> None:
    edit_manifest(folder, lambda values: values.update(split_rule="\x1b[2J", settings={"a": "\x1b]0;title\x07"}))
    assert r"split: \x1b[2J" in inspect(folder)
    assert all(line.isprintable() for line in inspect(folder).splitlines())


def test_a_shard_twice_is_refused(folder: Path) -> None:
    edit_manifest(folder, lambda values: values["splits"]["train"].append(values["splits"]["train"][0]))
    with pytest.raises(UserError, match="got one twice"):
        open_dataset(folder)


@pytest.mark.parametrize("content", [b"[" * 10**5, b"\xff", b"9" * 5000, b"null", b'{"format_version": NaN}'])
def test_a_manifest_that_is_no_json_is_named(content: bytes, folder: Path) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json is not a manifest of data_prep\.py"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "train-00000.bin", "train-00000.docs.npy"])
def test_pipes_and_devices_in_a_dataset_are_refused(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=f"{name} is a pipe, expected a file"):
        open_dataset(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"{name} is a device, expected a file"):
        open_dataset(folder)


def patch(path: Path, offset: int, content: bytes) -> None:
    old = path.read_bytes()
    path.write_bytes(old[:offset] + content + old[offset + len(content) :])


@pytest.mark.parametrize("signed", [False, True], ids=["bit rot", "signed"])
@pytest.mark.parametrize("length", [2**31 - 1, -1, 0, 5])
def test_wrong_lengths_in_an_index_are_named_by_whatever_reads_them(length: int, signed: bool, folder: Path) -> None:
    """One of 2^31 - 1 made near deduplication take all memory."""
    patch(folder / "train-00000.idx", HEADER.size + 4, struct.pack("<i", length))
    if signed:
        sign_dataset(folder)
    found = refusals(folder)
    assert found.keys() >= {"train", "verify", "inspect", "near"}
    assert all("train-00000.idx" in text or "train-00000.bin" in text for text in found.values()), found


@pytest.mark.parametrize("pointer", [2, -2, 2**62, 10**6])
def test_wrong_pointers_in_an_index_are_named_by_whatever_reads_them(pointer: int, folder: Path) -> None:
    patch(folder / "train-00001.idx", HEADER.size + 4 * len(TEXTS) + 8, struct.pack("<q", pointer))
    sign_dataset(folder)
    found = refusals(folder)
    assert found.keys() >= {"train", "verify", "inspect", "near"}
    assert all("train-00001.idx: sequence 1 begins at byte" in text for text in found.values()), found


def test_a_wrong_table_of_documents_is_found_by_verify(folder: Path) -> None:
    """Only other tools read it."""
    patch(folder / "train-00001.idx", HEADER.size + 12 * len(TEXTS) + 8, struct.pack("<q", 3))
    sign_dataset(folder)
    with pytest.raises(UserError, match=r"train-00001\.idx: expected one sequence a document, 0 to 6"):
        verify(folder)


HEADERS = {
    "garbled": lambda old: bytes(range(100)) + old[100:],
    "no magic": lambda old: b"\x93NUMPX" + old[6:],
    "parentheses": lambda old: old[:10] + b"(" * 118 + old[128:],
    "objects": lambda old: old.replace(b"<u8", b"|O ", 1),
    "another type": lambda old: old.replace(b"<i8", b"<f8", 1),
    "more than there are": lambda old: old.replace(b"(6,)", b"(9,)", 1),
    "a shape of text": lambda old: old.replace(b"(6,)", b"'ab'", 1),
    "a negative shape": lambda old: old.replace(b"(6,)", b"(-6)", 1),
    "empty": lambda old: b"",
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_garbled_records_are_named_by_whatever_reads_them(change: Callable[[bytes], bytes], folder: Path) -> None:
    path = folder / "train-00000.docs.npy"
    path.write_bytes(change(path.read_bytes()))
    sign_dataset(folder)
    found = refusals(folder)
    assert found.keys() >= {"train", "verify", "inspect", "near", "exact"}
    assert all("train-00000.docs.npy" in text for text in found.values()), found


def test_an_input_that_the_manifest_lacks_is_named(folder: Path) -> None:
    path = folder / "train-00000.docs.npy"
    offset = len(path.read_bytes()) - 36 * len(TEXTS) + 8  # the source of the first record
    for number in (7, -1):
        patch(path, offset, struct.pack("<i", number))
        sign_dataset(folder)
        with pytest.raises(UserError, match=rf"document 0 is of input {number}, the manifest has 1"):
            open_dataset(folder).split("train").describe(0)
        with pytest.raises(UserError, match=rf"input {number} named, the manifest has 1"):
            verify(folder)


def test_garbled_bitmaps_and_sketches_are_named(folder: Path) -> None:
    deduplicate(folder, method="near", executor=None, console=QUIET)
    bitmap, sketch = next(folder.glob("train-00001.keep-*")), next(folder.glob("train-00000.minhash-*"))
    patch(bitmap, 10, b"(" * 50)
    with pytest.raises(UserError, match=r"keep-\w+\.npy is damaged"):
        open_dataset(folder)
    sketch.write_bytes(sketch.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"minhash-\w+\.npy is damaged"):
        deduplicate(folder, method="near", executor=None, console=QUIET)


@pytest.mark.parametrize("number", [257, 65535])
def test_ids_beyond_the_vocabulary_are_named_by_whatever_uses_them(number: int, folder: Path) -> None:
    patch(folder / "train-00001.bin", 4, struct.pack("<H", number))
    sign_dataset(folder)
    found = refusals(folder)
    assert found.keys() >= {"train", "verify", "export", "contamination"}
    assert all(f"id {number}" in text and "outside the vocabulary of 257" in text for text in found.values()), found
    assert "train-00001.bin: id" in found["train"]
    assert "in document 6 of by hand" in found["train"]


def test_training_on_ids_beyond_the_vocabulary_ends_in_one_message(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "data")
    for path in sorted((tmp_path / "data").glob("train-*.bin")):
        ids = np.fromfile(path, "<u2")
        np.where(np.arange(len(ids)) % 7 == 3, 999, ids).astype("<u2").tofile(path)
    settings = tiny_settings(tmp_path / "data", tmp_path / "run", train={"steps": 4})
    code, printed = run_pretrain(write_config(tmp_path / "c.yaml", settings))
    assert code == 2, printed
    assert "id 999 in document" in printed
    assert "Traceback" not in printed


def test_differences_of_a_foreign_index_cannot_overflow(tmp_path: Path) -> None:
    """2^63 - 1 followed by -2^63 is a step of one forward, in 64 bits."""
    folder = write_dataset(tmp_path / "d", {"train": [TEXTS]})
    start = HEADER.size + 12 * len(TEXTS)
    patch(folder / "train-00000.idx", start + 16, struct.pack("<2q", 2**63 - 1, -(2**63)))
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="without a step back"):
        open_foreign(str(folder / "train-00000"), tokenizer="bytes")


@pytest.mark.parametrize("line", [b"{", b"5", b'{"source": 5}', b'{"source": "a", "reason": ["b"]}', b"[" * 10**5])
def test_a_damaged_list_of_rejected_records_is_named(line: bytes, folder: Path) -> None:
    (folder / "quarantine.jsonl").write_bytes(b'{"source": "a", "reason": "b"}\n' + line + b"\n")
    with pytest.raises(UserError, match=r"quarantine\.jsonl, line 2 cannot be read"):
        inspect(folder)


def test_a_pipe_is_no_list_of_rejected_records(folder: Path) -> None:
    os.mkfifo(folder / "quarantine.jsonl")
    with pytest.raises(UserError, match="is a pipe, expected a file"):
        inspect(folder)


def test_verify_searches_no_folder_that_is_named_as_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def search(*_: Any, **__: Any) -> None:
        raise AssertionError("it was searched")

    monkeypatch.setattr("pipeline.data.preparing.compare.find_corpus", search)
    edit_manifest(folder, lambda values: values["inputs"][0].update(name=str(folder.parent)))
    with pytest.raises(UserError, match=r"an input changed since: expected a file, found a folder"):
        verify(folder)
