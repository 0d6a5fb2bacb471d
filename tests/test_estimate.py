"""`--dry-run` foresees what a preparation makes, however the corpus is packed."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from rich.console import Console

from pipeline.data.preparing import estimate as estimating
from pipeline.data.preparing.decide import rehearse
from pipeline.data.preparing.estimate import unpacked_size
from pipeline.data.preparing.prepare import prepare
from pipeline.data.preparing.request import Request
from pipeline.data.reading.corpus import find_corpus
from pipeline.data.reading.formats import TextRules

RANDOM = random.Random(0)
WORDS = [RANDOM.randbytes(RANDOM.randint(1, 6)).hex() for _ in range(300)]
TEXTS = [" ".join(RANDOM.choices(WORDS[: 20 + number // 20], k=RANDOM.randint(5, 300))) for number in range(4000)]
RANDOM.shuffle(TEXTS)
LINES = "".join(
    json.dumps({"id": number, "url": f"https://example.org/{number}" * 3, "tags": ["a"] * 20, "text": text}) + "\n"
    for number, text in enumerate(TEXTS)
).encode()


def compress_stream(content: bytes) -> bytes:
    """One frame that does not say its size, as `zstd` makes it of a pipe."""
    packer = zstandard.ZstdCompressor().compressobj()
    return packer.compress(content) + packer.flush()


def frames(content: bytes) -> bytes:
    third = len(content) // 3
    skippable = (0x184D2A53).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"hello"
    packer = zstandard.ZstdCompressor(write_checksum=True)
    parts = [content[:third], content[third : 2 * third], content[2 * third :]]
    return skippable.join(packer.compress(part) for part in parts)


def members(content: bytes) -> bytes:
    half = len(content) // 2
    return gzip.compress(content[:half]) + gzip.compress(content[half:])


PACKINGS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "one frame": ("a.jsonl.zst", zstandard.compress),
    "frames": ("a.jsonl.zst", frames),
    "a frame without a size": ("a.jsonl.zst", compress_stream),
    "gzip": ("a.jsonl.gz", gzip.compress),
    "gzip of several members": ("a.jsonl.gz", members),
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("content", [LINES, b"a" * 10**6, b""], ids=["lines", "one letter", "nothing"])
def test_the_size_of_a_compressed_file_is_known_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str, content: bytes
) -> None:
    name, pack = PACKINGS[packing]
    (tmp_path / name).write_bytes(pack(content))
    (source,) = find_corpus([str(tmp_path / name)]).sources
    assert unpacked_size(source) == len(content)
    monkeypatch.setattr(estimating, "UNPACKED_SAMPLE_BYTES", 2**18)  # the file is larger than what is looked at
    assert unpacked_size(source) == pytest.approx(len(content), rel=0.15)
    if packing in ("one frame", "frames", "gzip"):
        assert unpacked_size(source) == len(content)


def test_frames_are_walked_over_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = zstandard.compress(LINES)
    (tmp_path / "a.jsonl.zst").write_bytes(packed * 5)
    (source,) = find_corpus([str(tmp_path / "a.jsonl.zst")]).sources
    blocks = -(-len(LINES) // 2**17)
    monkeypatch.setattr(estimating, "MOST_BLOCKS", 3 * blocks)
    assert unpacked_size(source) == pytest.approx(5 * len(LINES), rel=0.01)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz"])
@pytest.mark.parametrize("damage", [lambda packed: packed[:40], lambda packed: packed[:6] + b"\x7f" * 90])
def test_a_damaged_file_is_estimated_and_left_to_the_preparation(
    tmp_path: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    pack = zstandard.compress if name.endswith("zst") else gzip.compress
    (tmp_path / "good.jsonl").write_bytes(LINES)
    (tmp_path / name).write_bytes(damage(pack(LINES)))
    assert "tokens: about " in foreseen(tmp_path, tmp_path / name, tmp_path / "good.jsonl")


def foreseen(folder: Path, *inputs: Path, workers: int = 1) -> str:
    stream = io.StringIO()
    wanted = Request(
        inputs=tuple(map(str, inputs)),
        output=folder / "out",
        tokenizer="bytes",
        workers=workers,
        rules=TextRules(unit_bytes=10**6),
    )
    rehearse(wanted, console=Console(file=stream, soft_wrap=True))
    return stream.getvalue()


def write_parquet(path: Path) -> None:
    pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), path, row_group_size=500)


def write_csv(path: Path) -> None:
    path.write_bytes(gzip.compress(b"id,text\n" + b"".join(f'{n},"{t}"\n'.encode() for n, t in enumerate(TEXTS))))


def write_array(path: Path) -> None:
    path.write_bytes(zstandard.compress(json.dumps([{"text": t, "id": n} for n, t in enumerate(TEXTS)]).encode()))


FORMS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "lines": ("a.jsonl", lambda path: path.write_bytes(LINES)),
    "parquet": ("a.parquet", write_parquet),
    "csv.gz": ("a.csv.gz", write_csv),
    "json.zst": ("a.json.zst", write_array),
    "txt.zst": ("a.txt.zst", lambda path: path.write_bytes(zstandard.compress("\n".join(TEXTS).encode()))),
    **{name: (file, lambda path, pack=pack: path.write_bytes(pack(LINES))) for name, (file, pack) in PACKINGS.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_tokens_and_disk_are_foreseen(tmp_path: Path, form: str) -> None:
    name, write = FORMS[form]
    write(tmp_path / name)
    said = foreseen(tmp_path, tmp_path / name)
    wanted = Request(inputs=(str(tmp_path / name),), output=tmp_path / "out", tokenizer="bytes")
    assert not wanted.output.exists()
    made = prepare(wanted, console=Console(quiet=True))
    assert made is not None
    (tokens,) = re.findall(r"tokens: about ([\d,]+); disk: about [\d.]+ MB; time: about \d+:\d\d from start", said)
    true = made.total("train", "tokens") + made.total("val", "tokens")
    assert int(tokens.replace(",", "")) == pytest.approx(true, rel=0.1)
    (disk,) = re.findall(r"disk: about ([\d.]+) MB", said)
    files = sum(file.size for shards in made.splits.values() for shard in shards for file in shard.files.values())
    assert float(disk) * 1e6 == pytest.approx(files, rel=0.15)


def test_time_is_of_all_the_work_and_shared_by_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial in which each byte takes 10 microseconds, whatever this machine does beside it."""
    (tmp_path / "a.jsonl").write_bytes(LINES)
    true = estimating._Sample._timed

    def slow(self: estimating._Sample, pieces: list[estimating.Piece]) -> tuple[object, float]:
        report, _ = true(self, pieces)
        return report, 1.0 + sum(piece.size for piece in pieces) * 1e-5

    monkeypatch.setattr(estimating._Sample, "_timed", slow)
    monkeypatch.setattr("time.process_time", lambda: 0.0)  # that of other tests

    def seconds(workers: int) -> int:
        said = foreseen(tmp_path, tmp_path / "a.jsonl", workers=workers)
        ((minutes, rest),) = re.findall(r"time: about (\d+):(\d\d)", said)
        return int(minutes) * 60 + int(rest)

    units = -(-len(LINES) // 10**6)
    assert seconds(1) == pytest.approx(len(LINES) * 1e-5 + units, rel=0.3)
    assert seconds(2) == pytest.approx(seconds(1) / 2, rel=0.3)
