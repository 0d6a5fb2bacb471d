"""Export to llm.c's format, read by a reader written from its description, and read back as training data."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.dataset import open_dataset
from pipeline.data.exchange import export_llmc as module
from pipeline.data.exchange.export_llmc import export_llmc
from pipeline.data.exchange.foreign import open_foreign
from pipeline.data.manifest import FORMAT_VERSION, Counts, Manifest, ShardInfo, SplitName, data_digest, write_manifest
from pipeline.data.shards import DOCUMENT_DTYPE, ShardWriter, describe_content, keep_bytes
from pipeline.data.tokenizer import load_tokenizer
from pipeline.errors import UserError

DOCUMENTS = [[[1, 2, 3], [4]], [[5] * 20], [[], [6, 7], [8]]]  # by shard
DELETED = (2, 1)  # shard, document


def make(folder: Path, *, vocab_size: int = 257, eos: int = 256, delete: bool = False, last: int | None = None) -> Path:
    """A dataset of `DOCUMENTS` and a val split; `last` replaces its very last id."""
    folder.mkdir()
    load_tokenizer("bytes").save(folder / "tokenizer.json")
    shards = []
    for number, documents in enumerate(DOCUMENTS):
        ended = [[*ids, eos] for ids in documents]
        if last is not None and number == len(DOCUMENTS) - 1:
            ended[-1][-1] = last
        shards.append(write(folder, f"train-{number:05d}", ended, vocab_size=vocab_size))
    if delete:
        keep = np.arange(3) != DELETED[1]
        content, name = keep_bytes(keep), f"{shards[2].name}.keep-0123.npy"
        (folder / name).write_bytes(content)
        files = {**shards[2].files, name: describe_content(content)}
        shards[2] = shards[2].model_copy(update={"files": files, "deleted": Counts(documents=1, tokens=3)})
    splits: dict[SplitName, tuple[ShardInfo, ...]] = {
        "train": tuple(shards),
        "val": (write(folder, "val-00000", [[9, eos]], vocab_size=vocab_size),),
    }
    values: dict[str, Any] = {"records": 7, "drops": {}, "noticed": {}, "settings": {}, "inputs": ()}
    dtype = "uint16" if vocab_size <= 2**16 else "int32"
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        dtype=dtype,
        vocab_size=vocab_size,
        eos_id=eos,
        tokenizer_fingerprint="f",
        data_digest=data_digest(splits, tokenizer_fingerprint="f", dtype=dtype),
        split_rule="by hand",
        splits=splits,
        **values,
    )
    write_manifest(folder, manifest)
    return folder


def write(folder: Path, name: str, documents: list[list[int]], *, vocab_size: int) -> ShardInfo:
    with ShardWriter(folder, name, vocab_size=vocab_size) as writer:
        for ids in documents:
            record = np.array([(len(ids) - 1, 0, 0, (0, 0))], DOCUMENT_DTYPE)
            writer.append(np.array(ids), lengths=np.array([len(ids)]), documents=record)
        shard = writer.commit()
    assert shard is not None
    return shard


def read(path: Path, *, magic: int = 20240520, version: int = 1, dtype: str = "<u2") -> list[int]:
    """As dataloader.h does: the header, the exact size, the ids."""
    header = np.fromfile(path, "<i4", count=256).tolist()
    assert header[:2] == [magic, version]
    assert header[3:] == [0] * 253
    assert path.stat().st_size == 1024 + header[2] * np.dtype(dtype).itemsize
    return [int(token) for token in np.fromfile(path, dtype, offset=1024)]


def preceded(documents: list[list[int]], eos: int) -> list[int]:
    """The end-of-document id before each document, as dev/data/fineweb.py puts it."""
    return [token for ids in documents for token in [eos, *ids]]


ALL = [ids for shard in DOCUMENTS for ids in shard]


@pytest.mark.parametrize("shard_tokens", [1000, 40, 34, 33, 10, 3, 1])
def test_each_document_follows_its_end_token(tmp_path: Path, shard_tokens: int) -> None:
    folder = make(tmp_path / "books")
    paths = export_llmc(folder, tmp_path / "out", split="train", shard_tokens=shard_tokens)
    parts = [read(path) for path in paths]
    stream = list(chain(*parts))
    assert stream == preceded(ALL, 256)
    assert sorted(stream) == sorted(whole(folder))  # nothing added, nothing lost
    assert max(map(len, parts)) <= shard_tokens
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert [path.name for path in paths] == [f"books_train_{n:06d}.bin" for n in range(len(paths))]
    assert sorted((tmp_path / "out").iterdir()) == paths


def whole(folder: Path) -> list[int]:
    split = open_dataset(folder).split("train")
    return [int(token) for token in split.tokens(0, split.n_tokens)]


@pytest.mark.parametrize("block", [1, 2, 7])
def test_copied_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    paths = export_llmc(make(tmp_path / "d"), tmp_path / "out", split="train", shard_tokens=12)
    assert list(chain(*map(read, paths))) == preceded(ALL, 256)


def test_splits_share_a_folder(tmp_path: Path) -> None:
    folder = make(tmp_path / "d")
    export_llmc(folder, tmp_path / "out", split="train")
    [val] = export_llmc(folder, tmp_path / "out", split="val")
    assert (val.name, read(val)) == ("d_val_000000.bin", [256, 9])


def test_large_vocabularies(tmp_path: Path) -> None:
    folder = make(tmp_path / "d", vocab_size=128_256, eos=128_001)
    [path] = export_llmc(folder, tmp_path / "out", split="train")
    assert read(path, magic=20240801, version=7, dtype="<u4") == preceded(ALL, 128_001)


def test_deleted_documents_are_left_out(tmp_path: Path) -> None:
    [path] = export_llmc(make(tmp_path / "d", delete=True), tmp_path / "out", split="train")
    assert read(path) == preceded([*ALL[:4], ALL[5]], 256)


def test_read_back_as_training_data(tmp_path: Path) -> None:
    folder = make(tmp_path / "d")
    paths = export_llmc(folder, tmp_path / "out", split="train", shard_tokens=9)
    split = open_foreign(str(tmp_path / "out" / "d_train_*.bin"), tokenizer="bytes").split("train")
    ours = whole(folder)
    assert len(split.parts) == len(paths)
    assert split.tokens(0, split.n_tokens).tolist() == [ours[-1], *ours[:-1]]


@pytest.mark.parametrize("name", ["d_train_000000.bin", "d_train_000007.bin"])
def test_what_is_there_is_not_overwritten(tmp_path: Path, name: str) -> None:
    folder, output = make(tmp_path / "d"), tmp_path / "out"
    output.mkdir()
    (output / name).write_bytes(b"not ours")
    with pytest.raises(UserError, match=rf"holds {name}"):
        export_llmc(folder, output, split="train")
    assert [(entry.name, entry.read_bytes()) for entry in output.iterdir()] == [(name, b"not ours")]


def test_nothing_appears_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, output = make(tmp_path / "d"), tmp_path / "out"
    synced: list[int] = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        export_llmc(folder, output, split="train", shard_tokens=9)
    assert list(output.iterdir()) == []


def test_too_little_space_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 65})())
    with pytest.raises(UserError, match="65 bytes free, the export needs 66"):
        export_llmc(make(tmp_path / "d"), tmp_path / "out", split="train")


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "d", last=7)
    with pytest.raises(UserError, match="does not end with its token 256"):
        export_llmc(folder, tmp_path / "out", split="train")
    with pytest.raises(UserError, match="is the dataset itself"):
        export_llmc(folder, folder, split="val")
    folder = make(tmp_path / "e")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["val"] = []
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="has no val split"):
        export_llmc(folder, tmp_path / "out", split="val")
    assert not (tmp_path / "out").exists()
