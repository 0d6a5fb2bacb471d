"""Damaged files fail with what is sound before the damage, and what is no damage is none."""

from __future__ import annotations

import gzip
import json
import random
import re
import subprocess
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.data.reading.bytestream import Compression, open_stream
from pipeline.data.reading.corpus import find_corpus, read_unit
from pipeline.data.reading.formats import Record, TextRules
from pipeline.data.reading.plan import Unit, plan_units
from pipeline.errors import UserError
from tests.reading import read, texts_of

NOISE = random.Random(0)
TEXTS = [f"document {i} {NOISE.randbytes(i % 90).hex()}" for i in range(8000)]
LINES = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)


def rest_of(path: Path, compression: Compression, *, by: int) -> tuple[bytes, str]:
    """All that a stream gives, and how it ends."""
    found = b""
    try:
        with open_stream(path, compression, name="x", drop_bom=False) as stream:
            while block := stream.read1(by):
                found += block
    except UserError as error:
        return found, str(error)
    return found, ""


def by_single_bytes(packed: bytes, begun: Callable[[], object]) -> tuple[bytes, bool]:
    """What a decompressor makes of members one after the other, fed byte by byte, and whether they were sound."""
    found, member = b"", None
    for byte in range(len(packed)):
        member = member or begun()
        try:
            found += member.decompress(packed[byte : byte + 1])  # type: ignore[attr-defined]
        except (zlib.error, zstandard.ZstdError):
            return found, False
        if member.eof:  # type: ignore[attr-defined]
            member = None
    return found, member is None


BEGUN: dict[Compression, Callable[[], object]] = {
    "gzip": lambda: zlib.decompressobj(31),
    "zstd": lambda: zstandard.ZstdDecompressor().decompressobj(),
}


@given(
    st.sampled_from(["gzip", "zstd"]), st.integers(0, 10**6), st.integers(0, 255), st.booleans(), st.integers(1, 2**20)
)
@example("gzip", 10**6, 1, True, 2**20)
@settings(max_examples=60)
def test_what_is_sound_before_damage_is_given(compression: Compression, at: int, flip: int, cut: bool, by: int) -> None:
    pack = gzip.compress if compression == "gzip" else zstandard.compress
    packed = bytearray(pack(LINES[:9000]) + pack(LINES[9000:90_000]))
    at = at % len(packed)
    packed[at] ^= flip
    packed = packed[: at + 1] if cut else packed
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder, "a")).write_bytes(packed)
        found, message = rest_of(path, compression, by=by)
    sound, whole = by_single_bytes(bytes(packed), BEGUN[compression])
    assert bool(message) != whole
    assert sound.startswith(found)
    assert not message or f"past byte {len(found)} of its text" in message
    assert len(found) >= len(by_single_bytes(bytes(packed[: max(at - 2**17, 0)]), BEGUN[compression])[0])


def records_and_message(path: Path, rules: TextRules) -> tuple[list[Record], str]:
    records: list[Record] = []
    try:
        for unit in plan_units(find_corpus([str(path)]).sources, rules):
            records.extend(iter_of(unit, rules, records))
    except UserError as error:
        return records, str(error)
    return records, ""


def iter_of(unit: Unit, rules: TextRules, records: list[Record]) -> list[Record]:
    """Records of a unit, those before its damage put into `records`."""
    found: list[Record] = []
    try:
        found.extend(read_unit(unit, rules))
    except UserError:
        records.extend(found)
        raise
    return found


@pytest.mark.parametrize("unit_bytes", [10**5, 2**26])
@pytest.mark.parametrize("lost", [8, 5000])
@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_documents_before_the_cut_are_all_there(tmp_path: Path, suffix: str, lost: int, unit_bytes: int) -> None:
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes((gzip.compress if suffix == "gz" else zstandard.compress)(LINES)[:-lost])
    if suffix == "gz":
        with path.open("rb") as file:
            expected = subprocess.run(["gzip", "-dc"], stdin=file, capture_output=True, check=False).stdout
    else:
        expected, _ = by_single_bytes(path.read_bytes(), BEGUN["zstd"])
    records, message = records_and_message(path, TextRules(unit_bytes=unit_bytes))
    assert texts_of(records) == TEXTS[: expected.count(b"\n")]  # type: ignore[arg-type]
    assert re.search(rf"cannot read .*a\.jsonl\.{suffix} past byte {len(expected)} of its text", message)
    if suffix == "gz" and lost == 8:
        assert len(records) == len(TEXTS), "nothing but the checksum is missing"


@pytest.mark.parametrize("name", ["a.txt.gz", "a.csv.gz", "a.json.gz"])
def test_other_records_before_the_cut_are_all_there(tmp_path: Path, name: str) -> None:
    contents = {
        "a.txt.gz": "|".join(TEXTS) + "|",
        "a.csv.gz": "text\n" + "".join(f"{text}\n" for text in TEXTS),
        "a.json.gz": json.dumps([{"text": text} for text in TEXTS]),
    }
    (tmp_path / name).write_bytes(gzip.compress(contents[name].encode())[:-8])
    records, message = records_and_message(tmp_path / name, TextRules(separator="|"))
    assert [record[0] for record in records] == [text.encode() for text in TEXTS]
    assert f"past byte {len(contents[name])} of its text" in message


def test_padding_after_a_member_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    half = LINES.index(b"\n", len(LINES) // 2) + 1
    for between in (b"", bytes(512), bytes(10_000)):
        path.write_bytes(gzip.compress(LINES[:half]) + between + gzip.compress(LINES[half:]) + bytes(10_240))
        assert gzip.decompress(path.read_bytes()) == LINES
        assert texts_of(read(path)) == TEXTS
    path.write_bytes(gzip.compress(LINES) + bytes(100) + b"junk")
    records, message = records_and_message(path, TextRules())
    assert texts_of(records) == TEXTS  # type: ignore[arg-type]
    assert f"past byte {len(LINES)} of its text" in message


def test_a_later_frame_with_a_long_window_is_read(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(97, 122, 300_000, np.uint8).tobytes()
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"first ") + frame.compress(noise) + frame.flush())
    assert texts_of(read(tmp_path)) == ["first " + noise.decode()]
