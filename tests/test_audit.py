"""Whatever is changed in a dataset, in its bitmaps or its inputs, `verify` names it; `inspect` tells what is there."""

from __future__ import annotations

import gzip
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers

from pipeline.data.dataset import open_dataset
from pipeline.data.deleting.dedup import deduplicate
from pipeline.data.deleting.deletion import delete_documents
from pipeline.data.manifest import Contamination, read_manifest
from pipeline.data.preparing.audit import inspect, verify
from pipeline.data.preparing.prepare import prepare
from pipeline.data.preparing.request import Request
from pipeline.data.reading.corpus import find_corpus
from pipeline.data.reading.formats import TextRules
from pipeline.data.tokenizer import TextTokenizer
from pipeline.errors import UserError
from tests.prepared import damage, edit_manifest, write_dataset

SHARDS = [["one", "two words", "三"], ["x" * 300], ["", "last", "one"]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset of three train shards, two equal documents among them, and one val shard, in bytes."""
    return write_dataset(tmp_path / "dataset", {"train": SHARDS, "val": [["held out"]]})


@pytest.fixture
def deleted(folder: Path) -> Path:
    """The same without the second of equals and without `two words`, which an evaluation file holds."""
    deduplicate(folder, method="exact", executor=None, console=Console(quiet=True))
    record = Contamination(ngram=13, files={"quiz.jsonl": 1}, documents=1, deleted=True)
    chosen = {"train-00000": np.array([False, True, False])}
    delete_documents(
        folder, read_manifest(folder), reason="contaminated", deleted=chosen, record={"contamination": record}
    )
    return folder


@pytest.mark.parametrize(
    ("name", "offset", "message"),
    [
        ("train-00001.bin", 40, "train-00001.bin: expected checksum"),
        ("val-00000.bin", 17, "val-00000.bin: in tokens 0 to 9 EOS is not just at document ends"),
        ("train-00000.idx", 40, "train-00000.idx: sequence 2 begins at byte"),
        ("train-00002.docs.npy", 140, "train-00002.docs.npy: expected checksum"),
        ("tokenizer.json", 20, "tokenizer"),
    ],
)
def test_verify_finds_flipped_bits(folder: Path, name: str, offset: int, message: str) -> None:
    digest = open_dataset(folder).data_digest[:16]
    assert f"is whole: 8 documents, digest {digest}\n" in verify(folder)
    damage(folder / name, offset)
    with pytest.raises(UserError, match=message):
        verify(folder)


def test_verify_finds_ids_outside_the_vocabulary_and_early_ends(folder: Path) -> None:
    ids = np.fromfile(folder / "train-00001.bin", "<u2")
    ids[3], ids[7] = 256, 999
    ids.tofile(folder / "train-00001.bin")
    with pytest.raises(UserError, match=r"(?s)id 999 is outside the vocabulary of 257.*EOS is not just at"):
        verify(folder)


def test_verify_finds_text_that_does_not_come_back(folder: Path) -> None:
    ids = np.fromfile(folder / "train-00000.bin", "<u2")
    ids[len("one") + 1 + len("two words") + 1] = 0xFF  # the first byte of a character becomes one that begins none
    ids.tofile(folder / "train-00000.bin")
    with pytest.raises(UserError, match="train-00000, document 2: decodes to another text"):
        verify(folder)


def test_verify_finds_a_manifest_of_other_data(folder: Path) -> None:
    edit_manifest(folder, lambda values: values.update(data_digest="0" * 64))
    with pytest.raises(UserError, match="expected data digest 0000"):
        verify(folder)


UNKNOWN = "[UNK]"


def with_unknown(model: Any) -> TextTokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["[SEP]"])
    return TextTokenizer.from_definition(json.loads(tokenizer.to_str()), origin="test")


VOCABULARY = {word: number for number, word in enumerate([UNKNOWN, "[SEP]", "a", "b", "[", "]", "U", "N", "K"])}


@pytest.mark.parametrize(
    "model",
    [models.WordPiece(VOCABULARY, unk_token=UNKNOWN), models.BPE(vocab=VOCABULARY, merges=[], unk_token=UNKNOWN)],
)
def test_unknown_tokens_are_no_damage_and_do_not_hide_any(tmp_path: Path, model: Any) -> None:
    tokenizer = with_unknown(model)
    texts = ["a b", "a é", "é", "b", "b b a"]
    assert [0 in tokenizer.encode(text) for text in texts] == [False, True, True, False, False]
    folder = write_dataset(tmp_path / "dataset", {"train": [texts], "val": [["a"]]}, tokenizer=tokenizer)
    said = verify(folder)
    assert "is whole: 6 documents" in said
    assert "note: 2 documents of the sample, such as train-00000, document 1, could not be compared with" in said
    ids = np.fromfile(folder / "train-00000.bin", "<u2")
    ends = np.flatnonzero(ids == tokenizer.eos_id)
    ids[ends[3] - 1] = VOCABULARY["]"]
    ids.tofile(folder / "train-00000.bin")
    with pytest.raises(UserError, match=r"train-00000.bin: expected checksum"):
        verify(folder)


# the order of documents


def test_verify_finds_documents_out_of_order(folder: Path) -> None:
    edit_manifest(folder, lambda values: values["splits"]["train"][1].update(continues=1))
    with pytest.raises(UserError, match="train-00001, document 0: input 0, row 1 stands after input 0, row 2"):
        verify(folder)


def test_verify_finds_shards_in_another_order(folder: Path) -> None:
    edit_manifest(folder, lambda values: values["splits"]["train"].reverse())
    with pytest.raises(UserError, match="train-00000, document 0: input 0, row 0 stands after input 0, row 3"):
        verify(folder)


def test_verify_finds_inputs_that_the_manifest_lacks(folder: Path) -> None:
    edit_manifest(folder, lambda values: values.update(inputs=[]))
    with pytest.raises(UserError, match=r"train-00000\.docs\.npy: input 0 named, the manifest has 0"):
        verify(folder)


# bitmaps


def bitmap(folder: Path, name: str) -> Path:
    (path,) = folder.glob(f"{name}-*.npy")
    return path


@pytest.mark.parametrize("name", ["train-00002.keep", "train-00002.duplicates", "train-00000.contaminated"])
def test_verify_finds_flipped_bits_in_bitmaps(deleted: Path, name: str) -> None:
    assert "is whole: 8 documents" in verify(deleted)
    path = bitmap(deleted, name)
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x80
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path.name}: expected checksum"):
        verify(deleted)


def replace_bitmap(folder: Path, name: str, content: bytes) -> None:
    """Another content under the same name, and a manifest that vouches for it."""
    path = bitmap(folder, name)
    path.write_bytes(content)
    entry = {"size": len(content), "checksum": xxhash.xxh3_128_hexdigest(content)}
    shard = int(name[6:11])
    edit_manifest(folder, lambda values: values["splits"]["train"][shard]["files"].update({path.name: entry}))


def test_verify_finds_bitmaps_that_contradict_each_other_and_the_numbers(deleted: Path) -> None:
    path = bitmap(deleted, "train-00002.keep")
    replace_bitmap(deleted, "train-00002.keep", path.read_bytes()[:-1] + bytes([0b01000000]))
    with pytest.raises(UserError) as caught:
        verify(deleted)
    assert "train-00002: 1 document kept or deleted against what duplicates and contaminated say" in str(caught.value)
    assert (
        "train-00002: expected as deleted {'documents': 1, 'tokens': 4, 'text_bytes': 3}, the bitmap deletes "
        in str(caught.value)
    )
    assert "expected data digest" in str(caught.value)


@pytest.mark.parametrize("numbers", [{"documents": 2}, {"tokens": 5}, {"text_bytes": 0}])
def test_verify_finds_wrong_numbers(deleted: Path, numbers: dict[str, int]) -> None:
    edit_manifest(deleted, lambda values: values["splits"]["train"][2]["deleted"].update(numbers))
    with pytest.raises(UserError, match="train-00002: expected as deleted"):
        verify(deleted)


@pytest.mark.parametrize("content", [b"", b"not numpy", None])
def test_a_bitmap_that_is_none_is_refused(deleted: Path, content: bytes | None) -> None:
    if content is None:
        whole = bitmap(deleted, "train-00002.keep").read_bytes()
        content = whole.replace(b"(1,)", b"(2,)") + b"\0"
    replace_bitmap(deleted, "train-00002.keep", content)
    with pytest.raises(UserError, match=r"train-00002\.keep-\w+\.npy(:| is damaged)"):
        open_dataset(deleted)
    with pytest.raises(UserError, match=r"train-00002\.keep-"):
        verify(deleted)


def test_a_missing_bitmap_is_refused(deleted: Path) -> None:
    bitmap(deleted, "train-00002.keep").unlink()
    with pytest.raises(UserError, match=r"train-00002\.keep-\w+\.npy is missing"):
        open_dataset(deleted)


# inputs


@pytest.fixture
def sources(folder: Path, tmp_path: Path) -> list[Path]:
    """Two input files that the manifest names, the second of which is not there."""
    present, gone = tmp_path / "a.txt", tmp_path / "b.txt"
    for path in (present, gone):
        path.write_text("content")
    found = find_corpus([str(present), str(gone)]).sources
    inputs = [{"name": s.name, "kind": s.kind, "size": s.size, "fingerprint": s.fingerprint} for s in found]
    edit_manifest(folder, lambda values: values.update(inputs=inputs))
    gone.unlink()
    return [present, gone]


def test_a_missing_input_is_only_noted(folder: Path, sources: list[Path]) -> None:
    assert verify(folder).endswith("\nnote: not here to be compared: 1 of 2 inputs")
    edit_manifest(folder, lambda values: values["inputs"].pop())
    assert "note" not in verify(folder)


def test_verify_finds_a_changed_input(folder: Path, sources: list[Path]) -> None:
    sources[0].write_text("other content")
    with pytest.raises(UserError) as caught:
        verify(folder)
    assert "is whole, but not made of what its inputs are now:" in str(caught.value)
    assert f"{sources[0]}: an input changed since: expected 7 bytes" in str(caught.value)
    assert "found 13 bytes" in str(caught.value)


def test_verify_finds_an_input_of_another_time(folder: Path, sources: list[Path]) -> None:
    os.utime(sources[0], ns=(1, 1))
    with pytest.raises(UserError, match=r"a\.txt: an input changed since: .*found 7 bytes, fingerprint 7-1;"):
        verify(folder)


WAYS: dict[str, dict[str, Any]] = {
    "by hash": {"val_fraction": 0.2},
    "tails": {"inputs": ("few.jsonl",), "val_fraction": 0.3},
    "given": {"val_inputs": ("few.jsonl",)},
    "compressed": {"inputs": ("many.jsonl.gz",), "val_fraction": 0.2},
    "separated": {"inputs": ("plain.txt",), "val_fraction": 0.2, "rules": TextRules(unit_bytes=700, separator="\n")},
    "cut": {"inputs": ("plain.txt",), "rules": TextRules(unit_bytes=700, max_document_bytes=1100)},
    "parquet": {"inputs": ("many.parquet",), "val_fraction": 0.2},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_touched_input_is_compared_by_its_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Rows with blanks and bad ones, cut into many units, documents in both splits: a time is no change, a byte is."""
    monkeypatch.chdir(tmp_path)
    texts = [f"text {number % 90} {'é' * (number % 7)}" for number in range(150)]
    lines = "".join(json.dumps({"text": text}) + ("\n\n{bad\n" if text[5] == "3" else "\n") for text in texts)
    few, many, plain, parquet = (Path(name) for name in ("few.jsonl", "many.jsonl.gz", "plain.txt", "many.parquet"))
    few.write_text(lines[:2000][: lines[:2000].rindex("\n") + 1])
    many.write_bytes(packed(lines.encode(), 1000))
    plain.write_text("\n".join(texts))
    pq.write_table(pa.table({"text": texts}), parquet, row_group_size=20, compression="none", use_dictionary=False)
    Path("lines.jsonl").write_text(lines)
    base = Request(inputs=("lines.jsonl",), output=tmp_path / "out", tokenizer="bytes", max_bad=1.0,
                   rules=TextRules(unit_bytes=700))  # fmt: skip
    wanted = replace(base, **WAYS[way])
    prepare(wanted, console=Console(quiet=True))
    (name,) = wanted.val_inputs or wanted.inputs
    assert "note" not in verify("out")
    os.utime(name, ns=(1, 1))
    assert verify("out").endswith(f"\nnote: {tmp_path / name} bears another time, but holds the same documents")
    change(Path(name))
    with pytest.raises(UserError, match=f"{name}: an input changed since: expected"):
        verify("out")


def packed(content: bytes, size: int) -> bytes:
    """A gzip file of `size` bytes: the name of a file in its header is as long as it takes (RFC 1952)."""
    plain = gzip.compress(content)
    name = b"n" * (size - len(plain) - 1) + b"\0"
    return plain[:3] + b"\x08" + plain[4:10] + name + plain[10:]


def change(path: Path) -> None:
    """A letter of a document, in a file of the same size."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        unpacked = gzip.decompress(content)
        at = unpacked.rindex(b"text 1")
        other = packed(unpacked[:at] + b"t0xt" + unpacked[at + 4 :], len(content))
    else:
        other = content.replace(b"text 19", b"t0xt 19")
    assert (len(other), other != content) == (len(content), True)
    path.write_bytes(other)


def test_an_input_that_lost_or_won_a_document_is_changed(tmp_path: Path) -> None:
    """Also where all that was prepared is still there, or all that is there was prepared."""
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"text {number}"}) for number in range(120)]
    for before, after in (([*lines, " " * 20], [*lines, '{"text": "another."}']), (lines, lines[:-1])):
        path.write_text("\n".join(before))
        output = tmp_path / f"out-{len(after)}"
        prepare(Request(inputs=(str(path),), output=output, tokenizer="bytes"), console=Console(quiet=True))
        path.write_text("\n".join(after).ljust(len("\n".join(before))))
        with pytest.raises(UserError, match="an input changed since"):
            verify(output)


def test_verify_finds_an_input_that_cannot_be_read_any_more(folder: Path, sources: list[Path]) -> None:
    sources[0].unlink()
    sources[0].mkdir()
    with pytest.raises(UserError, match=r"a\.txt: an input changed since: expected a file, found a folder"):
        verify(folder)


# inspect


def test_inspect_shows_counts_and_texts(folder: Path) -> None:
    shown = inspect(folder)
    assert "train: 7 documents" in shown
    assert "  shards: 3, of which 2 continue an input" in shown
    assert "val: 1 document, 9 tokens, 8 bytes of text" in shown
    assert "'held out'" in shown
    assert "256-511: 1" in shown
    assert "duplicates: not looked for\ncontamination: not looked for" in shown
    assert "noticed: none" in shown


def test_inspect_shows_what_was_deleted_noticed_and_failed(deleted: Path) -> None:
    failed = [{"unit": "00007", "reason": "damaged at byte 5"}]
    noticed = {"documents with NUL": 2}
    edit_manifest(deleted, lambda values: values.update(failed=failed, noticed=noticed, drops={"text is empty": 1234}))
    shown = inspect(deleted)
    assert "dropped: 1,234 x text is empty" in shown
    assert "noticed: 2 x documents with NUL" in shown
    assert "failed: 00007: damaged at byte 5" in shown
    assert "duplicates deleted: 1 document (4 tokens, 3 bytes) equal to another\n" in shown
    assert "contamination: 1 training documents share 13 words in a row with an evaluation file, deleted" in shown
    assert "  quiz.jsonl: 1" in shown
    assert "train: 5 documents" in shown
    assert "  without 2 documents (14 tokens, 12 bytes)" in shown
    edit_manifest(deleted, lambda values: values["deduplication"].update(method="near", threshold=0.7))
    assert "equal to another\n  and 0 documents (0 tokens, 0 bytes) of Jaccard similarity 0.7 or more" in inspect(
        deleted
    )


def test_inspect_draws_documents(tmp_path: Path) -> None:
    texts = [[f"document {number + 50 * shard}" for number in range(50)] for shard in range(2)]
    folder = write_dataset(tmp_path / "many", {"train": texts})
    shown = inspect(folder, seed=5)
    lines = [line for line in shown.splitlines() if line.startswith("  document ")]
    numbers = [int(line.split()[1]) for line in lines]
    assert len(set(numbers)) == 3
    assert numbers != [0, 50, 99]
    for line, number in zip(lines, numbers, strict=True):
        text = f"document {number}"
        assert line == f"  document {number} (by hand, row {number}, {len(text) + 1} tokens): {text!r}"
    assert inspect(folder, seed=5) == shown
    assert inspect(folder, seed=6) != shown
    drawn = inspect(folder)
    assert len({drawn, *(inspect(folder) for _ in range(3))}) == 4, "another draw each time"
    (seed,) = set(re.findall(r"excerpts, drawn with --seed (\d+):", drawn))
    assert inspect(folder, seed=int(seed)) == drawn
    assert inspect(folder, seed=5, excerpts_of_each=7).count("  document ") == 7
    assert "excerpts" not in inspect(folder, excerpts_of_each=0)


def test_inspect_shows_what_each_input_brought(tmp_path: Path) -> None:
    for name, count in (("web", 150), ("code", 40)):
        lines = [json.dumps({"text": f"{name} {number}"}) for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*lines, "{oops", '{"text": 5}']) + "\n")
    wanted = Request(inputs=(str(tmp_path / "*.jsonl"),), output=tmp_path / "out", tokenizer="bytes", max_bad=1.0,
                     val_fraction=0.2)  # fmt: skip
    manifest = prepare(wanted, console=Console(quiet=True))
    assert manifest is not None
    shown = inspect(tmp_path / "out", excerpts_of_each=2, seed=1)
    found = re.findall(
        r"^  \S+/(\w+)\.jsonl: train (\d+) documents, ([\d,]+) tokens; val (\d+) documents, ([\d,]+) tokens; "
        r"dropped 1 x malformed JSON, 1 x ",
        shown,
        re.MULTILINE,
    )
    assert [name for name, *_ in found] == ["web", "code"], "the largest first"
    numbers = {name: [int(number.replace(",", "")) for number in rest] for name, *rest in found}
    assert [numbers[name][0] + numbers[name][2] for name in ("web", "code")] == [150, 40]
    assert sum(n[1] for n in numbers.values()) == manifest.total("train", "tokens")
    assert sum(n[3] for n in numbers.values()) == manifest.total("val", "tokens")
    for name in ("web", "code"):
        line = rf"^  document \d+ \(\S+/{name}\.jsonl, row \d+, \d+ tokens\): '{name} "
        assert len(re.findall(line, shown, re.MULTILINE)) == 4
