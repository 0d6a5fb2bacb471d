"""Finding, cutting and reading: whatever goes in comes out once, or is named as rejected."""

from __future__ import annotations

import csv
import errno
import gzip
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.data.reading import hub
from pipeline.data.reading.corpus import check_text_key, find_corpus
from pipeline.data.reading.formats import TEXT_CHUNK_BYTES, Document, Rejected, TextRules
from pipeline.data.reading.plan import plan_units
from pipeline.errors import UserError
from tests.prepared import write_dataset
from tests.reading import faults_of, read, texts_of

TEXTS = [f"document {i}\r\nline of {'x' * (i % 7)} é日本😀\n" for i in range(50)]


def json_lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"id": 1, "text": text}).encode() + b"\n" for text in texts)


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text"])
        writer.writerows([i, text] for i, text in enumerate(TEXTS))


def write_dictionary_parquet(path: Path) -> None:
    column = pa.array(TEXTS).dictionary_encode()
    pq.write_table(pa.table({"text": column}), path, row_group_size=7)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(json_lines(TEXTS)),
    "a.ndjson": lambda path: path.write_bytes(b"\xef\xbb\xbf" + json_lines(TEXTS).replace(b"\n", b"\r\n\r\n")),
    "a.json": lambda path: path.write_text(json.dumps([{"text": text} for text in TEXTS], indent=1)),
    "lines.json": lambda path: path.write_bytes(json_lines(TEXTS)),
    "a.csv": write_csv,
    "a.parquet": lambda path: pq.write_table(pa.table({"id": range(50), "text": TEXTS}), path, row_group_size=9),
    "dictionary.parquet": write_dictionary_parquet,
    "a.jsonl.gz": lambda path: path.write_bytes(
        gzip.compress(json_lines(TEXTS[:20])) + gzip.compress(json_lines(TEXTS[20:]))
    ),
    "a.jsonl.zst": lambda path: path.write_bytes(
        zstandard.compress(json_lines(TEXTS[:20])) + zstandard.compress(json_lines(TEXTS[20:]))
    ),
    "packed.jsonl": lambda path: path.write_bytes(gzip.compress(json_lines(TEXTS))),
    "parquet.bin": lambda path: pq.write_table(pa.table({"text": TEXTS}), path),
}


@pytest.mark.parametrize("unit_bytes", [300, 2**26])
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_back_every_text_once(tmp_path: Path, name: str, unit_bytes: int) -> None:
    WRITERS[name](tmp_path / name)
    records = read(tmp_path / name, rules=TextRules(unit_bytes=unit_bytes))
    assert texts_of(records) == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.ndjson"])
def test_rows_count_within_the_source_wherever_it_is_cut(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    whole = [record.row for record in read(tmp_path / name)]
    cut = [record.row for record in read(tmp_path / name, rules=TextRules(unit_bytes=200))]
    assert whole == cut == [row * (2 if name == "a.ndjson" else 1) for row in range(50)]


def test_text_files_are_documents_with_their_bytes_kept(tmp_path: Path) -> None:
    for i, text in enumerate(TEXTS[:12]):
        (tmp_path / f"{i:02}.txt").write_bytes(text.encode())
    (tmp_path / "12.md.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "13.rst").write_bytes(b"\xef\xbb\xbfmarked")
    (tmp_path / "14.text").write_bytes(b"")
    *documents, empty = read(tmp_path)
    assert texts_of(documents) == [*TEXTS[:12], "packed", "marked"]
    assert faults_of([empty]) == [(0, "text is empty")]


@pytest.mark.parametrize("unit_bytes", [50, 2**26])
def test_separator_cuts_text_into_documents(tmp_path: Path, unit_bytes: int) -> None:
    content = "one\n\n--é--two--é----é--three\r\n--é--"
    (tmp_path / "a.txt").write_bytes(content.encode() * 9)
    records = read(tmp_path, rules=TextRules(separator="--é--", unit_bytes=unit_bytes))
    assert texts_of(records) == ["one\n\n", "two", "three\r\n"] * 9
    assert [record.row for record in records] == [row for row in range(36) if row % 4 != 2]


@pytest.mark.parametrize("packed", [False, True])
def test_a_large_text_is_cut_at_newlines_and_loses_nothing(tmp_path: Path, packed: bool) -> None:
    content = ("\ufeff" + "a line of text, é and 日本\n" * 150_000 + "é" * (2 * TEXT_CHUNK_BYTES)).encode()
    path = tmp_path / ("a.txt.gz" if packed else "a.txt")
    path.write_bytes(gzip.compress(content, 1) if packed else content)
    records = read(path, rules=TextRules(unit_bytes=2 * 10**6))
    texts = texts_of(records)
    assert "".join(texts) == content.decode("utf-8-sig")
    assert [record.row for record in records] == list(range(len(texts)))
    assert all(len(text.encode()) <= 2 * TEXT_CHUNK_BYTES + 3 for text in texts)
    assert sum(text.endswith("\n") for text in texts) >= 3


def test_bad_records_are_named_and_cost_only_themselves(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut',
        b"[1, 2]",
        b'{"other": 1}',
        b'{"text": null}',
        b'{"text": 5}',
        b'{"text": ""}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b"",
        b'{"text": "nan is no JSON but common", "score": NaN}',
        b'{"text": "zero \\u0000 byte"}',
        b"[" * 100_000,
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    records = read(tmp_path)
    assert [record.content.decode() for record in records if isinstance(record, Document)] == [
        "good",
        "nan is no JSON but common",
        "zero \0 byte",
    ]
    assert faults_of(records) == [
        (1, "malformed JSON"),
        (2, "not a JSON object"),
        (3, "no key 'text'"),
        (4, "text is null"),
        (5, "text is not a string"),
        (6, "text is empty"),
        (7, "invalid UTF-8"),
        (8, "lone surrogate"),
        (12, "JSON of over 1024 levels"),
    ]
    for record in records:
        if isinstance(record, Rejected):
            assert len(record.excerpt.encode()) <= 1200


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_what_lies_beside_a_text_does_not_cost_it(tmp_path: Path, name: str) -> None:
    """Numbers of any length are read over; what is too deep for the parser is told to be that, at any depth."""
    beside = ["1" * 5000, "-" + "9" * 400, "1e999", "NaN", "-Infinity", "0.1" + "1" * 5000, "[" * 900 + "]" * 900]
    deep = ["[" * depth + "]" * depth for depth in (1025, 3000, 100_000)] + ['{"a":' * 3000 + "1" + "}" * 3000]
    records = [f'{{"id": {value}, "text": "kept {n}"}}' for n, value in enumerate([*beside, *deep])]
    content = "\n".join(records) if name == "a.jsonl" else "[" + ",".join(records) + "]"
    (tmp_path / name).write_text(content)
    found = read(tmp_path)
    kept = [record.content.decode() for record in found if isinstance(record, Document)]
    assert kept == [f"kept {n}" for n in range(len(beside))]
    assert faults_of(found) == [(len(beside) + n, "JSON of over 1024 levels") for n in range(len(deep))]


def test_a_number_where_the_text_should_be_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ' + "7" * 5000 + "}")
    assert faults_of(read(tmp_path)) == [(0, "text is not a string")]


def test_bad_bytes_in_text_csv_and_parquet_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text\ngood\n\xff\n")
    (tmp_path / "b.txt").write_bytes(b"bad \xe9")
    column = pa.Array.from_buffers(pa.string(), 2, pa.array([b"good", b"\xff"]).buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "c.parquet")
    (tmp_path / "d.json").write_bytes(b'[{"text": "good"}, {"text": "\xff"}, {"text": "\\udfff"}]')
    records = read(tmp_path)
    assert [record.content.decode() for record in records if isinstance(record, Document)] == ["good"] * 3
    reasons = ["invalid UTF-8"] * 4 + ["lone surrogate"]
    assert faults_of(records) == list(zip([1, 0, 1, 1, 2], reasons, strict=True))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_truncated_files_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=f"cannot read .*{name}.*damaged or incomplete"):
        read(path)


def test_argument_order_and_repeats_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in "bca":
        (tmp_path / "in" / f"{name}.txt").write_text(name)
    a, folder, pattern = tmp_path / "in/a.txt", tmp_path / "in", tmp_path / "i*/[bc].txt"
    plans = {
        plan_units(find_corpus(list(map(str, order))).sources, TextRules())
        for order in ([folder], [a, folder, a], [pattern, a], [a, pattern, folder])
    }
    assert len(plans) == 1


def test_plan_groups_small_files_and_cuts_large_ones(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("x" * 30)
    WRITERS["a.jsonl"](tmp_path / "large.jsonl")
    units = plan_units(find_corpus([str(tmp_path)]).sources, TextRules(unit_bytes=100))
    assert [len(unit.pieces) for unit in units[:4]] == [3, 3, 3, 1]
    cuts = [piece for unit in units[3:] for piece in unit.pieces if piece.source.kind == "jsonl"]
    assert [piece.start for piece in cuts] == [0, *(piece.stop for piece in cuts[:-1])]
    assert cuts[-1].stop == (tmp_path / "large.jsonl").stat().st_size
    assert all(unit.number == number for number, unit in enumerate(units))


def test_folders_skip_hidden_and_unknown_files_and_say_so(tmp_path: Path) -> None:
    for name in ["a.txt", ".hidden.txt", "b.bin", "sub/c.md", ".git/d.txt", "e.parquet.gz"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    corpus = find_corpus([str(tmp_path)])
    assert [Path(source.name).name for source in corpus.sources] == ["a.txt", "c.md"]
    assert "skipped 2 files of other kinds (.bin, .gz)" in corpus.notes[0]
    assert texts_of(read(tmp_path / "b.bin", tmp_path / "*.bin")) == ["b.bin"]
    assert texts_of(read(tmp_path, exclude=("*/sub/*",))) == ["a.txt"]
    assert texts_of(read(f"{tmp_path}/**/*.md")) == ["sub/c.md"]


def test_a_wrong_suffix_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_text("plain")
    corpus = find_corpus([str(tmp_path)])
    assert "not compressed, whatever its suffix says" in corpus.notes[0]
    assert texts_of(read(tmp_path)) == ["plain"]
    (tmp_path / "b.parquet").write_text("no parquet")
    with pytest.raises(UserError, match="not a parquet file"):
        read(tmp_path)


@pytest.mark.parametrize("kind", range(16))
def test_zstd_may_begin_with_a_skippable_frame(tmp_path: Path, kind: int) -> None:
    """As pzstd's does: 4 bytes that say how long the next frame is."""
    frames = [zstandard.compress(json_lines(TEXTS[:20])), zstandard.compress(json_lines(TEXTS[20:]))]
    skippable = [(0x184D2A50 + kind).to_bytes(4, "little") + struct.pack("<II", 4, len(frame)) for frame in frames]
    content = b"".join(before + frame for before, frame in zip(skippable, frames, strict=True))
    for name in ("a.jsonl.zst", "packed.jsonl"):
        (tmp_path / name).write_bytes(content)
        assert texts_of(read(tmp_path / name)) == TEXTS
    assert texts_of(read(tmp_path / "a.jsonl.zst", rules=TextRules(unit_bytes=300))) == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.zst", "a.csv.gz", "a.json.gz"])
def test_what_is_neither_packed_as_promised_nor_text_is_refused(tmp_path: Path, name: str) -> None:
    for content in (b"\0" * 600, b"P\x03 text"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"a\..* is no (gzip|zstd) file, nor .*: it begins with b.*; copy it again"):
            find_corpus([str(tmp_path)])
    for suffix in (".jsonl.gz", ".json.zst"):
        (tmp_path / f"page{suffix}").write_text("<html>404</html>")
        with pytest.raises(UserError, match="it begins with b'<htm'"):
            find_corpus([str(tmp_path / f"page{suffix}")])


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.parquet"])
def test_what_is_not_packed_in_spite_of_its_suffix_is_read_and_told(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    (tmp_path / name).rename(tmp_path / f"{name}.gz")
    assert "not compressed, whatever its suffix" in " ".join(find_corpus([str(tmp_path / f"{name}.gz")]).notes)
    assert texts_of(read(tmp_path / f"{name}.gz")) == TEXTS


def test_an_empty_file_that_should_be_packed_is_told(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.txt.zst", "c.txt"):
        (tmp_path / name).write_bytes(b"")
    corpus = find_corpus([str(tmp_path)])
    assert [note.split(";")[0].rpartition("/")[2] for note in corpus.notes] == [
        "a.jsonl.gz is empty, which no gzip file is",
        "b.txt.zst is empty, which no zstd file is",
    ]
    assert faults_of(read(tmp_path)) == [(0, "text is empty")] * 2, "texts; no line is no record"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("corpvs.txt", "no file or folder .*holds .*did you mean 'corpus.txt'"),
        ("*.parquet", "nothing matches .*holds corpus.txt"),
        ("org/name", "no file or folder 'org/name'.*write hf:org/name"),
        ("empty", "holds nothing to read"),
    ],
)
def test_inputs_that_match_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str, message: str
) -> None:
    (tmp_path / "corpus.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        find_corpus([argument])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.zst"])
def test_a_missing_key_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    sources = find_corpus([str(tmp_path)]).sources
    with pytest.raises(UserError, match=r"no key 'content'; found .*'text'; choose one with --text-key"):
        check_text_key(sources, "content")
    check_text_key(sources, "text")


@pytest.mark.parametrize("split", [False, True])
def test_a_saved_dataset_names_files_of_its_folder_alone(tmp_path: Path, split: bool) -> None:
    import datasets

    saved = datasets.Dataset.from_dict({"text": ["one", "two"]})
    outside, folder = tmp_path / "outside", tmp_path / "saved"
    saved.save_to_disk(str(outside))
    (datasets.DatasetDict({"train": saved}) if split else saved).save_to_disk(str(folder))
    assert len(hub.load_saved(str(folder))) == 2
    hub.load_saved.cache_clear()
    state = folder / ("train" if split else "") / "state.json"
    (arrow,) = outside.glob("*.arrow")
    way = "../../outside/" if split else "../outside/"
    state.write_text(json.dumps({**json.loads(state.read_text()), "_data_files": [{"filename": way + arrow.name}]}))
    with pytest.raises(UserError, match="expected the plain name of a file in the same folder"):
        hub.load_saved(str(folder))
    if split:
        (folder / "dataset_dict.json").write_text('{"splits": ["../outside"]}')
        with pytest.raises(UserError, match="expected the plain name"):
            hub.load_saved(str(folder))


def test_saved_datasets_and_fake_hubs_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    saved = datasets.Dataset.from_dict({"text": TEXTS})
    saved.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": saved.select(range(20)), "test": saved}).save_to_disk(str(tmp_path / "both"))
    (tmp_path / "hub").mkdir()
    WRITERS["a.parquet"](tmp_path / "hub" / "train.parquet")
    small = TextRules(unit_bytes=500)
    assert texts_of(read(tmp_path / "saved", rules=small)) == TEXTS
    assert texts_of(read(tmp_path / "both")) == TEXTS[:20]
    records = read(f"hf:{tmp_path / 'hub'}", rules=small)
    assert texts_of(records) == TEXTS
    assert [record.row for record in records] == list(range(50))
    with pytest.raises(UserError, match="no key 'body'"):
        check_text_key(find_corpus([f"hf:{tmp_path / 'hub'}"]).sources, "body")
    with pytest.raises(UserError, match=r"(?s)cannot load hf:.*wanted hf:NAME"):
        find_corpus([f"hf:{tmp_path / 'missing'}"])


def test_held_out_sources_are_marked_and_may_not_be_inputs_too(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    folder, b = str(tmp_path), str(tmp_path / "b.txt")
    corpus = find_corpus([folder], exclude=["b.txt"], held_out=[b])
    assert [(Path(source.name).name, source.held_out) for source in corpus.sources] == [
        ("a.txt", False),
        ("b.txt", True),
        ("c.txt", False),
    ]
    with pytest.raises(UserError, match=r"b\.txt is named as input and by --val-input; .*--exclude"):
        find_corpus([folder], held_out=[b])


def test_links_are_called_by_their_own_names_and_counted_once(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0f3a").write_bytes(json_lines(TEXTS))
    (tmp_path / "data").mkdir()
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "blobs" / "0f3a")
    corpus = find_corpus([str(tmp_path / "data")])
    assert [source.name for source in corpus.sources] == [str(tmp_path.resolve() / "data" / "a.jsonl")]
    assert texts_of(read(tmp_path / "data")) == TEXTS


@pytest.mark.parametrize("name", ["c4.json.gz", "lines.json.zst", "lines.json"])
def test_lines_in_json_files_are_found_packed_or_not(tmp_path: Path, name: str) -> None:
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.rpartition(".")[2], bytes)
    (tmp_path / name).write_bytes(pack(b"\n" + json_lines(TEXTS)))
    assert find_corpus([str(tmp_path)]).sources[0].kind == "jsonl"
    assert texts_of(read(tmp_path)) == TEXTS


def test_a_damaged_file_does_not_hide_a_missing_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(TEXTS))[:30])
    (tmp_path / "b.jsonl").write_bytes(json_lines(TEXTS))
    with pytest.raises(UserError, match=r"b.jsonl has no key 'body'"):
        check_text_key(find_corpus([str(tmp_path)]).sources, "body")


class FakeHub:
    """Stands for `datasets` and the hub's cache: files below `folder` at commit 0f3a."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **config: object) -> None:
        import datasets
        import huggingface_hub

        self.folder, self.asked = folder, [""]
        self.config = SimpleNamespace(data_files={"train": []}, **config)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha="0f3a"))
        monkeypatch.setattr(datasets, "load_dataset_builder", self.load)
        monkeypatch.setattr(datasets, "DownloadManager", lambda: SimpleNamespace(download=self.download))

    def load(self, path: str, *, name: str | None, revision: str | None) -> object:
        self.asked.append(f"{path}:{name}@{revision}")
        names = sorted(file.name for file in self.folder.iterdir())
        self.config.data_files["train"] = [f"hf://datasets/{path}@{revision}/data/{name}" for name in names]
        return SimpleNamespace(config=self.config)

    def download(self, addresses: list[str]) -> list[str]:
        return [str(self.folder / address.rpartition("/")[2]) for address in addresses]


def test_hub_data_are_files_at_a_pinned_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS["a.parquet"](tmp_path / "a.parquet")
    WRITERS["a.jsonl.gz"](tmp_path / "b.jsonl.gz")
    hub = FakeHub(tmp_path, monkeypatch)
    corpus = find_corpus(["hf:org/data:en@main"])
    assert hub.asked[-1] == "org/data:en@0f3a"
    assert [(source.name, source.path, source.kind) for source in corpus.sources] == [
        ("hf://datasets/org/data@0f3a/data/a.parquet", str(tmp_path / "a.parquet"), "parquet"),
        ("hf://datasets/org/data@0f3a/data/b.jsonl.gz", str(tmp_path / "b.jsonl.gz"), "jsonl"),
    ]
    assert texts_of(read("hf:org/data:en@main", rules=TextRules(unit_bytes=300))) == TEXTS * 2
    os.utime(tmp_path / "a.parquet", (1, 1))  # downloaded another day
    assert find_corpus(["hf:org/data:en@main"]) == corpus


def test_hub_data_that_our_readers_would_misread_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_text("")
    FakeHub(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"hf:org/data holds data files of other kinds \(\.tar\); wanted \.txt"):
        find_corpus(["hf:org/data"])
    FakeHub(tmp_path, monkeypatch, sep="\t")
    with pytest.raises(UserError, match=r"hf:org/data wants to be read with separator '\\t'"):
        find_corpus(["hf:org/data"])


def test_a_hub_that_cannot_be_reached_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> object:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda *_, **__: pytest.fail("it would try for half a minute")
    )
    with pytest.raises(
        UserError, match=r"cannot load hf:org/data .*Name or service not known\n  wanted hf:NAME.*network"
    ):
        find_corpus(["hf:org/data"])


def test_a_link_to_a_folder_is_told_and_read_where_it_is_named(tmp_path: Path) -> None:
    for name in ["real/a.txt", "tree/b.txt"]:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    link = tmp_path / "tree" / "linked"
    link.symlink_to(tmp_path / "real")
    corpus = find_corpus([str(tmp_path / "tree")])
    assert [Path(source.name).name for source in corpus.sources] == ["b.txt"]
    assert corpus.notes == (f"skipped 1 link to folders ({link}); name a folder itself to read it",)
    assert texts_of(read(tmp_path / "tree", link)) == ["real/a.txt", "tree/b.txt"]
    (tmp_path / "tree" / "b.txt").unlink()
    with pytest.raises(UserError, match=r"nothing to read \(links to folders\)"):
        find_corpus([str(tmp_path / "tree")])


def test_an_output_below_a_linked_input_is_no_input(tmp_path: Path) -> None:
    (tmp_path / "real" / "out").mkdir(parents=True)
    for name in ["a.txt", "out/manifest.json"]:
        (tmp_path / "real" / name).write_text("{}")
    (tmp_path / "link").symlink_to("real")
    output = (tmp_path / "link" / "out").resolve()
    corpus = find_corpus([str(tmp_path / "link")], output=output)
    assert [Path(source.name).name for source in corpus.sources] == ["a.txt"]


def test_what_cannot_be_listed_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("open")
    real = os.scandir

    def guarded(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(UserError, match=r"cannot read .*closed: Permission denied"):
        find_corpus([str(tmp_path)])


@pytest.mark.parametrize("argument", ["pipe.txt", "", "*.txt", "."])
def test_pipes_are_refused_without_opening_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="neither a file nor a folder; a pipe" if argument else "the empty text"):
        find_corpus([argument])


def test_a_name_that_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.txt")
    path.write_text("text")
    with pytest.raises(UserError, match=r"caf\\udce9.txt' is not UTF-8"):
        find_corpus([str(tmp_path)])
    path.rename(tmp_path / "日本 café.txt")
    assert texts_of(read(tmp_path)) == ["text"]


def test_a_dataset_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    made = write_dataset(tmp_path / "made", {"train": [["one"]]})
    (made / "ledger.jsonl").write_bytes(json_lines(TEXTS))
    note = f"skipped 1 dataset of data_prep.py ({made})"
    for name in (tmp_path, tmp_path / "*", tmp_path / "**" / "*.jsonl"):
        corpus = find_corpus([str(name)])
        assert [source.name for source in corpus.sources] == [str(tmp_path / "a.jsonl")]
        assert corpus.notes == (note,)
    for name in (made, made / "*.jsonl"):
        with pytest.raises(
            UserError, match=r"made is a dataset that data_prep\.py made, no text to prepare: --inspect"
        ):
            find_corpus([str(name), str(tmp_path / "a.jsonl")])
    named = find_corpus([str(made / "ledger.jsonl")])
    assert (len(named.sources), named.notes) == (1, ()), "a file that is named is meant"
