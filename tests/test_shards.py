"""The on-disk format, read back by a reader written from its description, and refused when it is not whole."""

from __future__ import annotations

import struct
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import xxhash

from pipeline.data.dataset import Dataset, open_dataset
from pipeline.data.preparing.audit import verify
from pipeline.data.shards import DOCUMENT_DTYPE, ShardWriter, map_file
from pipeline.errors import UserError
from tests.prepared import damage, edit_manifest, write_dataset, write_shard

SHARDS = [["one", "two words", "三"], ["x" * 300], ["", "last"]]
DOCUMENTS = [text for texts in SHARDS for text in texts]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset of three train shards and one val shard in bytes."""
    return write_dataset(tmp_path / "dataset", {"train": SHARDS, "val": [["held out"]]})


def stream_of(texts: list[str]) -> list[int]:
    return [token for text in texts for token in [*text.encode(), 256]]


@pytest.mark.parametrize(("vocab_size", "code", "dtype"), [(257, 8, "<u2"), (65536, 8, "<u2"), (65537, 4, "<i4")])
def test_files_are_megatrons(tmp_path: Path, vocab_size: int, code: int, dtype: str) -> None:
    """Read with `struct` as `megatron/core/datasets/indexed_dataset.py` lays the index out."""
    write_shard(tmp_path, "s", DOCUMENTS, vocab_size=vocab_size)
    index = (tmp_path / "s.idx").read_bytes()
    n = len(DOCUMENTS)
    assert index[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack_from("<QBQQ", index, 9) == (1, code, n, n + 1)
    lengths = struct.unpack_from(f"<{n}i", index, 34)
    pointers = struct.unpack_from(f"<{n}q", index, 34 + 4 * n)
    assert struct.unpack_from(f"<{n + 1}q", index, 34 + 12 * n) == tuple(range(n + 1))
    assert len(index) == 34 + 12 * n + 8 * (n + 1)
    content = np.memmap(tmp_path / "s.bin", dtype=dtype, mode="r")
    for text, length, pointer in zip(DOCUMENTS, lengths, pointers, strict=True):
        start = pointer // content.itemsize
        assert content[start : start + length].tolist() == [*text.encode(), 256]
    assert len(content) == sum(lengths)
    records = np.load(tmp_path / "s.docs.npy", allow_pickle=False)
    assert records["text_bytes"].tolist() == [len(text.encode()) for text in DOCUMENTS]
    assert records["row"].tolist() == list(range(n))
    wanted = [xxhash.xxh3_128_intdigest(text.encode()) for text in DOCUMENTS]
    assert [int(low) | int(high) << 64 for low, high in records["hash"]] == wanted


def test_checksums_are_those_of_the_files(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, "s", DOCUMENTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(shard.files)
    for name, info in shard.files.items():
        content = (tmp_path / name).read_bytes()
        assert (info.size, info.checksum) == (len(content), xxhash.xxh3_128_hexdigest(content))


@pytest.mark.parametrize("token", [257, -1])
def test_ids_outside_the_vocabulary_are_refused_and_leave_nothing(tmp_path: Path, token: int) -> None:
    with (
        pytest.raises(UserError, match=f"token id {token} is outside the vocabulary of 257"),
        ShardWriter(tmp_path, "s", vocab_size=257) as writer,
    ):
        writer.append(np.array([1, token]), lengths=np.array([2]), documents=np.zeros(1, DOCUMENT_DTYPE))
    assert list(tmp_path.iterdir()) == []


def test_a_shard_without_documents_is_not_written(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "s", vocab_size=257) as writer:
        assert writer.commit() is None
    assert list(tmp_path.iterdir()) == []


def test_every_range_of_tokens_and_its_documents(folder: Path) -> None:
    dataset = open_dataset(folder)
    split = dataset.split("train")
    tokens = np.array(stream_of(DOCUMENTS))
    numbers = np.concatenate([np.full(len(text.encode()) + 1, i) for i, text in enumerate(DOCUMENTS)])
    assert (split.n_tokens, split.n_documents) == (len(tokens), len(DOCUMENTS))
    assert split.text_bytes == sum(len(text.encode()) for text in DOCUMENTS)
    stops = sorted({*range(30), *range(300, len(tokens) + 1)})
    for start in range(len(tokens) + 1):
        for stop in (stop for stop in stops if stop >= start):
            found = split.tokens(start, stop)
            assert found.dtype == np.dtype("<u2")
            assert np.array_equal(found, tokens[start:stop])
            documents = split.document_of(start, stop)
            assert documents.dtype == np.int64
            assert np.array_equal(documents, numbers[start:stop])


def test_views_are_not_copies(folder: Path) -> None:
    split = open_dataset(folder).split("train")
    whole: npt.NDArray[np.uint16] = split.parts[1].tokens
    start = split.parts[0].info.tokens
    assert np.shares_memory(split.tokens(start + 5, start + 200), whole)
    assert not whole.flags.writeable


def test_documents_are_described(folder: Path) -> None:
    split = open_dataset(folder).split("train")
    found = [split.describe(number) for number in range(split.n_documents)]
    assert [info.row for info in found] == [0, 1, 2, 3, 4, 5]
    assert [info.tokens for info in found] == [len(text.encode()) + 1 for text in DOCUMENTS]
    assert {info.source for info in found} == {"by hand"}


def test_ranges_outside_the_split_are_refused(folder: Path) -> None:
    split = open_dataset(folder).split("train")
    for start, stop in [(-1, 2), (5, 4), (0, split.n_tokens + 1)]:
        with pytest.raises(IndexError, match=f"of a split of {split.n_tokens}"):
            split.tokens(start, stop)
    with pytest.raises(IndexError, match="document 6 of 6"):
        split.describe(6)


def test_an_empty_split_and_an_empty_file_are_read(folder: Path) -> None:
    edit_manifest(folder, lambda values: values["splits"].update(val=[]))
    val = open_dataset(folder).split("val")
    assert (val.n_tokens, val.n_documents, val.text_bytes) == (0, 0, 0)
    assert len(val.tokens(0, 0)) == len(val.document_of(0, 0)) == 0
    (folder / "empty").touch()
    assert map_file(folder / "empty") == b""


def test_reading_changes_nothing(folder: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    try:
        dataset = open_dataset(folder)
        assert isinstance(dataset, Dataset)
        assert len(dataset.split("val").tokens(0, 3)) == 3
        assert "whole" in verify(folder)
    finally:
        folder.chmod(0o755)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_what_is_no_dataset_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no dataset folder .*datasset; did you mean 'dataset'"):
        open_dataset(folder.parent / "datasset")
    with pytest.raises(UserError, match=r"is no dataset: it has neither a manifest.json nor shards"):
        open_dataset(folder.parent)


def test_a_foreign_or_damaged_manifest_is_refused(folder: Path) -> None:
    edit_manifest(folder, lambda values: values.update(vocab_size="many"))
    with pytest.raises(UserError, match=r"manifest.json is damaged at vocab_size: .* got 'many'"):
        open_dataset(folder)
    edit_manifest(folder, lambda values: values.update(format_version=99))
    with pytest.raises(UserError, match="format version 99 found, this program reads 2"):
        open_dataset(folder)
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match="is not a manifest"):
        open_dataset(folder)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".docs.npy"])
def test_truncated_and_missing_files_are_refused(folder: Path, suffix: str) -> None:
    path = folder / f"train-00001{suffix}"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"train-00001{suffix} has {size - 1} bytes, expected {size}"):
        open_dataset(folder)
    path.unlink()
    with pytest.raises(UserError, match=f"train-00001{suffix} is missing, expected {size}"):
        open_dataset(folder)


@pytest.mark.parametrize("offset", [0, 9, 17, 18, 26])
def test_a_bad_index_header_is_refused(folder: Path, offset: int) -> None:
    damage(folder / "train-00000.idx", offset)
    with pytest.raises(UserError, match=r"train-00000.idx: bad header"):
        open_dataset(folder)


def test_more_shards_than_open_files_are_allowed() -> None:
    """In a process of its own, whose soft limit is low: it is raised, or it is told that the hard one is too low."""
    script = """
import resource, sys
from pipeline.data.shards import allow_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, (100, int(sys.argv[1])))
allow_open_files(200)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    run = partial(subprocess.run, check=False, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run([sys.executable, "-c", script, "5000"]).stdout == "1056\n"
    assert "200 shards need 1056 open files, the system allows 900" in run([sys.executable, "-c", script, "900"]).stderr
