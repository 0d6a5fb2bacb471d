"""Token files of other tools, written here from their descriptions with struct and NumPy alone, and read in place."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pipeline.data.dataset import Dataset, TokenSplit
from pipeline.data.exchange import foreign, foreign_files
from pipeline.data.exchange.foreign import open_foreign
from pipeline.data.loading.rows import Concat, Pack
from pipeline.data.tokenizer import TextTokenizer, load_tokenizer
from pipeline.errors import UserError

EOS = 256  # of the tokenizer `bytes`, whose ids are byte values
TEXTS = ["one", "two words", "三 snow ☃", "x" * 300, "last"]
CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}
HEADER = 34


def ids_of(text: str) -> list[int]:
    return [*text.encode(), EOS]


STREAM = [token for text in TEXTS for token in ids_of(text)]


def write_megatron(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], *, dtype: str = "uint16") -> Path:
    """Documents of sequences of ids, as IndexedDatasetBuilder lays them out."""
    sequences = [sequence for document in documents for sequence in document]
    itemsize = np.dtype(dtype).itemsize
    with Path(f"{prefix}.bin").open("wb") as file:
        for sequence in sequences:
            file.write(np.array(sequence, dtype).tobytes())
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", CODES[dtype]))
        file.write(struct.pack("<Q", len(sequences)) + struct.pack("<Q", len(documents) + 1))
        place, bound, bounds = 0, 0, [0]
        for sequence in sequences:
            file.write(struct.pack("<i", len(sequence)))
        for sequence in sequences:
            file.write(struct.pack("<q", place))
            place += len(sequence) * itemsize
        for document in documents:
            bound += len(document)
            bounds.append(bound)
        file.write(struct.pack(f"<{len(bounds)}q", *bounds))
    return prefix


def write_bare(path: Path, ids: Sequence[int], dtype: str = "uint16") -> Path:
    """What nanoGPT's prepare.py leaves."""
    array: Any = np.memmap(path, dtype=dtype, mode="w+", shape=(len(ids),))
    array[:] = ids
    array.flush()
    return path


def write_llmc(path: Path, ids: Sequence[int], *, magic: int = 20240520, version: int = 1, dtype: str = "u2") -> Path:
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + np.array(ids, dtype).tobytes())
    return path


def whole(split: TokenSplit) -> list[int]:
    return [int(token) for token in split.tokens(0, split.n_tokens)]


def numbers(lengths: Sequence[int]) -> list[int]:
    """The document of each token, the naive way."""
    return [number for number, length in enumerate(lengths) for _ in range(length)]


def check_documents(split: TokenSplit, lengths: Sequence[int]) -> None:
    assert split.n_documents == len(lengths)
    assert split.lengths.tolist() == list(lengths)
    expected = numbers(lengths)
    for start in range(0, split.n_tokens, 7):
        for stop in (start, min(start + 1, split.n_tokens), min(start + 60, split.n_tokens), split.n_tokens):
            assert split.document_of(start, stop).tolist() == expected[start:stop]


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64", "uint16"])
def test_megatron_documents_of_several_sequences(tmp_path: Path, dtype: str) -> None:
    documents = [[[1, 2], [3, EOS]], [], [[4, EOS]], [[5], [], [6], [7, 8, EOS]], [[]], []]
    write_megatron(tmp_path / "owt_text_document", documents, dtype=dtype)
    dataset = open_foreign(str(tmp_path / "owt_text_document"), tokenizer="bytes")
    split = dataset.split("train")
    assert whole(split) == [1, 2, 3, EOS, 4, EOS, 5, 6, 7, 8, EOS]
    assert split.tokens(0, 3).dtype == np.dtype(dtype)
    check_documents(split, [4, 2, 5])  # texts of no token are no documents
    assert [split.describe(n).row for n in range(3)] == [0, 2, 3]  # but are counted as rows
    assert split.describe(2).source.endswith("owt_text_document.bin")
    assert (split.describe(2).tokens, split.describe(2).text_bytes) == (5, 4)
    assert dataset.split("val").n_tokens == 0
    assert dataset.notes == ()


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_megatron_ids_of_one_byte(tmp_path: Path, dtype: str) -> None:
    write_megatron(tmp_path / "d", [[[1, 2]], [[3]]], dtype=dtype)
    dataset = open_foreign(str(tmp_path / "d"), tokenizer="bytes")
    assert whole(dataset.split("train")) == [1, 2, 3]
    [note] = dataset.notes
    assert note.startswith("2 of 2 documents looked at")
    assert "'<|endoftext|>' (256)" in note


def test_names_of_a_megatron_dataset(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a.b", [[ids_of(text)] for text in TEXTS])
    shutil.copy(tmp_path / "a.b.bin", tmp_path / "other.bin")
    shutil.copy(tmp_path / "a.b.idx", tmp_path / "other.idx")
    os.utime(tmp_path / "other.bin", (0, 0))
    names = ["a.b", "a.b.bin", "a.b.idx", "a.*", "other"]
    digests = {open_foreign(str(tmp_path / name), tokenizer="bytes").data_digest for name in names}
    assert len(digests) == 1


def test_a_nanogpt_folder(tmp_path: Path) -> None:
    write_bare(tmp_path / "train.bin", STREAM)
    write_bare(tmp_path / "val.bin", ids_of("held out"))
    dataset = open_foreign(str(tmp_path), tokenizer="bytes", dtype="uint16")
    train, val = dataset.split("train"), dataset.split("val")
    assert whole(train) == STREAM
    check_documents(train, [len(ids_of(text)) for text in TEXTS])
    assert whole(val) == ids_of("held out")
    assert (train.text_bytes, val.text_bytes) == (sum(len(text.encode()) for text in TEXTS), 8)
    assert (dataset.vocab_size, dataset.eos_id) == (257, EOS)
    fingerprint = load_tokenizer("bytes").fingerprint
    assert dataset.tokenizer_fingerprint == fingerprint
    assert TextTokenizer.from_definition(json.loads(dataset.tokenizer_json), origin="").fingerprint == fingerprint
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["train.bin", "val.bin"]  # nothing is written


def test_meta_pickle_is_not_read(tmp_path: Path) -> None:
    write_bare(tmp_path / "train.bin", STREAM)
    (tmp_path / "meta.pkl").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    notes = open_foreign(str(tmp_path), tokenizer="bytes", dtype="uint16").notes
    assert any("meta.pkl" in note and "not read" in note for note in notes)


@pytest.mark.parametrize(
    ("magic", "version", "dtype", "seen"), [(20240520, 1, "<u2", "u2"), (20240801, 7, "<u4", "i4")]
)
def test_llmc_shards(tmp_path: Path, magic: int, version: int, dtype: str, seen: str) -> None:
    stream = [EOS, *STREAM[:-1]]  # llm.c puts the end of text before each text
    for number, (start, stop) in enumerate([(0, 10), (10, 200), (200, len(stream))]):
        name = tmp_path / f"fineweb_train_{number:06d}.bin"
        write_llmc(name, stream[start:stop], magic=magic, version=version, dtype=dtype)
    write_llmc(tmp_path / "fineweb_val_000000.bin", [EOS, 65], magic=magic, version=version, dtype=dtype)
    dataset = open_foreign(
        str(tmp_path / "fineweb_train_*.bin"), tokenizer="bytes", val=str(tmp_path / "fineweb_val_*.bin")
    )
    train = dataset.split("train")
    assert whole(train) == stream
    assert train.tokens(0, 5).dtype == np.dtype(seen)
    ends = np.flatnonzero(np.array(stream) == EOS) + 1
    check_documents(train, np.diff(np.unique([0, *ends, 10, 200, len(stream)])).tolist())
    assert whole(dataset.split("val")) == [EOS, 65]
    described = train.describe(train.n_documents - 1)
    assert described.source.endswith("fineweb_train_000002.bin")
    header_too = open_foreign(str(tmp_path / "fineweb_train_000000.bin"), tokenizer="bytes", dtype=None)
    assert whole(header_too.split("train")) == stream[:10]


def test_ids_are_views_of_the_file(tmp_path: Path) -> None:
    path = write_bare(tmp_path / "x.bin", STREAM)
    split = open_foreign(str(path), tokenizer="bytes", dtype="uint16").split("train")
    assert np.shares_memory(split.tokens(5, 50), split.parts[0].tokens)
    assert not split.tokens(5, 50).flags.writeable


def test_opening_does_not_read_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_bare(tmp_path / "x.bin", STREAM * 2000)
    read: list[int] = []
    original = foreign_files.TokenFile.read

    def counted(self: foreign_files.TokenFile, start: int, stop: int) -> Any:
        read.append(stop - start)
        return original(self, start, stop)

    monkeypatch.setattr(foreign_files.TokenFile, "read", counted)
    for name, value in (("SAMPLES", 4), ("SAMPLE_BYTES", 2**10), ("HEAD_BYTES", 2**8), ("CUT_SEARCH", 2**9)):
        monkeypatch.setattr(foreign, name, value)
    monkeypatch.setattr(foreign_files, "_BLOCK", 1000)
    dataset = open_foreign(str(path), tokenizer="bytes", dtype="uint16", val_fraction=0.1)
    total = len(STREAM) * 2000
    assert dataset.split("train").n_tokens + dataset.split("val").n_tokens == total
    assert sum(read) < 5000 < total
    read.clear()
    assert dataset.split("train").n_documents + dataset.split("val").n_documents == 5 * 2000
    assert sum(read) == total  # one pass for both splits
    assert max(read) == 1000
    assert dataset.split("val").text_bytes == 200 * sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize("block", [1, 3, 64])
def test_documents_are_found_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(foreign_files, "_BLOCK", block)
    path = write_bare(tmp_path / "x.bin", [*STREAM, 65, 66], "int32")
    split = open_foreign(str(path), tokenizer="bytes", dtype="int32").split("train")
    check_documents(split, [*(len(ids_of(text)) for text in TEXTS), 2])
    write_megatron(tmp_path / "m", [[ids_of(text)] for text in TEXTS])
    split = open_foreign(str(tmp_path / "m"), tokenizer="bytes").split("train")
    check_documents(split, [len(ids_of(text)) for text in TEXTS])


def test_validation_begins_with_a_document(tmp_path: Path) -> None:
    documents = [[ids_of("x" * 9)] for _ in range(20)]
    write_megatron(tmp_path / "a", documents[:15])
    write_megatron(tmp_path / "b", documents[15:])
    write_bare(tmp_path / "c.bin", [token for [document] in documents for token in document])
    for fraction, held in [(0.005, 10), (0.05, 10), (0.12, 30), (0.25, 50), (0.26, 60), (0.9, 180)]:
        for name, dtype in [("[ab].bin", None), ("c.bin", "uint16")]:
            dataset = open_foreign(str(tmp_path / name), tokenizer="bytes", dtype=dtype, val_fraction=fraction)
            val = dataset.split("val")
            assert (dataset.split("train").n_tokens, val.n_tokens) == (200 - held, held), (fraction, name)
            check_documents(val, [10] * (held // 10))
            check_documents(dataset.split("train"), [10] * (20 - held // 10))
            assert val.text_bytes == held // 10 * 9
    row = open_foreign(str(tmp_path / "c.bin"), tokenizer="bytes", dtype="uint16", val_fraction=0.12).split("val")
    assert [row.describe(n).row for n in range(3)] == [17, 18, 19]
    for fraction in (None, 0.0):
        dataset = open_foreign(str(tmp_path / "a"), tokenizer="bytes", val_fraction=fraction)
        assert dataset.split("val").n_tokens == 0


def test_validation_cuts_a_document_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "CUT_SEARCH", 5)
    path = write_bare(tmp_path / "x.bin", [1, EOS, *[2] * 98])
    dataset = open_foreign(str(path), tokenizer="bytes", dtype="uint16", val_fraction=0.5)
    assert (dataset.split("train").n_tokens, dataset.split("val").n_tokens) == (50, 50)
    check_documents(dataset.split("train"), [2, 48])
    check_documents(dataset.split("val"), [50])
    assert dataset.split("val").describe(0).row == 1


def test_the_digest_knows_content_and_nothing_else(tmp_path: Path) -> None:
    def digest(ids: list[int], name: str = "x.bin", **options: Any) -> str:
        path = write_bare(tmp_path / name, ids)
        return open_foreign(str(path), **{"tokenizer": "bytes", "dtype": "uint16", **options}).data_digest

    definition = {**load_tokenizer("bytes").definition, "normalizer": {"type": "NFC"}}
    (tmp_path / "nfc.json").write_text(json.dumps(definition))
    one = digest(STREAM)
    assert digest(STREAM, "renamed") == one
    write_llmc(tmp_path / "l.bin", STREAM)
    assert open_foreign(str(tmp_path / "l.bin"), tokenizer="bytes").data_digest == one
    two_files = [write_bare(tmp_path / f"s{n}.bin", part) for n, part in enumerate([STREAM[:100], STREAM[100:]])]
    others = [
        digest([*STREAM[:-2], 99, EOS]),
        digest([*STREAM, EOS]),
        digest(STREAM, val_fraction=0.01),
        digest(STREAM, val_fraction=0.5),
        digest(STREAM, val=str(two_files[0])),
        digest(STREAM, eos="A"),
        digest(STREAM, tokenizer=str(tmp_path / "nfc.json")),
        open_foreign(str(tmp_path / "s*.bin"), tokenizer="bytes", dtype="uint16").data_digest,
    ]
    write_megatron(tmp_path / "m1", [[STREAM]])
    write_megatron(tmp_path / "m2", [[STREAM[:9]], [STREAM[9:]]])
    others += [open_foreign(str(tmp_path / name), tokenizer="bytes").data_digest for name in ("m1", "m2")]
    assert len({one, *others}) == 1 + len(others)


def test_text_is_counted_exactly_byte_by_byte(tmp_path: Path) -> None:
    path = tmp_path / "bpe.json"
    load_tokenizer("train:400", texts=TEXTS * 20).save(path)  # GPT-2's kind: tokens of several bytes
    tokenizer = load_tokenizer(str(path))
    texts = [*TEXTS, "nächste Größe 🙂", " leading", "\n\n", ""]
    ids, lengths = tokenizer.encode_batch(texts)
    stream, place = [], 0
    for length in lengths:
        stream += [*ids[place : place + length].tolist(), tokenizer.eos_id]
        place += length
    write_bare(tmp_path / "x.bin", stream)
    dataset = open_foreign(str(tmp_path / "x.bin"), tokenizer=str(path), dtype="uint16")
    assert dataset.split("train").text_bytes == sum(len(text.encode()) for text in texts)
    sizes = [dataset.split("train").describe(n).text_bytes for n in range(len(texts))]
    assert sizes == [len(text.encode()) for text in texts]


def test_text_is_decoded_where_ids_alone_do_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SentencePiece's manner: a mark for the space before a word, which the first word of a text has too."""
    vocabulary = {"<s>": 0, "</s>": 1, "▁": 2, "a": 3, "b": 4, "▁a": 5, "▁b": 6}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a"), ("▁", "b")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    stream = [0, 5, 3, 6, 1, 0, 6, 4, 4, 1]  # <s>aa b</s><s>bbb</s>
    write_bare(tmp_path / "x.bin", stream)
    dataset = open_foreign(str(tmp_path / "x.bin"), tokenizer=str(tmp_path), dtype="uint16")
    assert dataset.eos_id == 1
    assert dataset.split("train").text_bytes == len("aa b") + len("bbb")
    monkeypatch.setattr(foreign_files, "_BLOCK", 4)
    again = open_foreign(str(tmp_path / "x.bin"), tokenizer=str(tmp_path), dtype="uint16")
    assert again.split("train").text_bytes == len("aa b") + len("bbb")


def test_an_id_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    for place in (0, 700_000, 1_999_999):
        ids = np.full(2_000_000, 65)
        ids[place] = 257
        path = write_bare(tmp_path / "x.bin", ids.tolist())
        with pytest.raises(
            UserError, match=rf"x\.bin: id 257 of token {place} \(byte {2 * place}\).*of 257 of 'bytes'"
        ):
            open_foreign(str(path), tokenizer="bytes", dtype="uint16")
    write_llmc(tmp_path / "l.bin", [1, 300])
    with pytest.raises(UserError, match=r"id 300 of token 1 \(byte 1026\)"):
        open_foreign(str(tmp_path / "l.bin"), tokenizer="bytes")
    write_megatron(tmp_path / "m", [[[1, -5]]], dtype="int32")
    with pytest.raises(UserError, match=r"id -5 of token 1 \(byte 4\)"):
        open_foreign(str(tmp_path / "m"), tokenizer="bytes")
    for wrong in (np.uint32(2**32 - 1), np.uint32(2**31)):
        np.array([1, wrong], np.uint32).tofile(tmp_path / "u.bin")
        with pytest.raises(UserError, match=f"id {wrong} of token 1"):
            open_foreign(str(tmp_path / "u.bin"), tokenizer="bytes", dtype="uint32")


def test_an_id_that_the_sample_misses_is_found_when_text_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SAMPLES", 2), ("SAMPLE_BYTES", 64), ("HEAD_BYTES", 64)):
        monkeypatch.setattr(foreign, name, value)
    ids = [65] * 1000
    ids[500] = 9999
    path = write_bare(tmp_path / "x.bin", ids)
    split = open_foreign(str(path), tokenizer="bytes", dtype="uint16").split("train")
    with pytest.raises(UserError, match="id 9999 of token 500"):
        _ = split.text_bytes


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
@pytest.mark.parametrize("wrong", [257, 9999, -1000])
def test_an_id_that_the_sample_misses_is_found_when_it_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, wrong: int
) -> None:
    for name, value in (("SAMPLES", 2), ("SAMPLE_BYTES", 64), ("HEAD_BYTES", 64)):
        monkeypatch.setattr(foreign, name, value)
    T, documents = 16, [[65] * 49 + [EOS] for _ in range(20)]
    for place in (8, 16, 24, 48):  # within a row, an input that is no label, the last label of a row
        chosen = [list(document) for document in documents]
        chosen[10][place] = wrong
        path = tmp_path / "x.bin"
        np.concatenate(chosen).astype(dtype).tofile(path)
        split = open_foreign(str(path), tokenizer="bytes", dtype=dtype).split("train")  # type: ignore[arg-type] # a name
        info = split.describe(10)
        assert (info.row, info.text_bytes) == (10, 48)  # telling what was trained on fails on no content
        for plan in (Concat(split, context_length=T), Pack(split, context_length=T, key=1)):
            refused = 0
            for row in range(plan.rows):
                number = np.array([row])
                touched = any(s.start <= 500 + place <= s.start + s.length for s in plan.spans(row, 0))
                if not touched:
                    plan.read(number, np.zeros_like(number), documents=False)
                    continue
                refused += 1
                with pytest.raises(UserError, match=r"x.bin: id -?\d+ in document 10 is outside the vocabulary of 257"):
                    plan.read(number, np.zeros_like(number), documents=True)
            assert refused > 0


def test_documents_too_long_to_count_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_files, "_LONGEST", 100)
    path = write_bare(tmp_path / "x.bin", [1, EOS, *[2] * 101])
    split = open_foreign(str(path), tokenizer="bytes", dtype="uint16").split("train")
    assert split.n_tokens == 103
    with pytest.raises(UserError, match="document 1 has 101 tokens, the most is 100; if 256 is not the id"):
        _ = split.n_documents


def test_a_file_without_ends_is_noted(tmp_path: Path) -> None:
    path = write_bare(tmp_path / "x.bin", [1, 2, 3])
    [note] = open_foreign(str(path), tokenizer="bytes", dtype="uint16").notes
    assert note.startswith("no '<|endoftext|>' (256) in the first tokens")


@pytest.mark.parametrize(("written", "dtype"), [("uint32", "uint16"), ("int64", "int32"), (">u4", "uint16")])
def test_ids_read_narrower_than_they_were_written_are_refused(tmp_path: Path, written: str, dtype: Any) -> None:
    np.array(STREAM, written).tofile(tmp_path / "x.bin")
    with pytest.raises(UserError, match=r"every other id is 0|outside the vocabulary"):
        open_foreign(str(tmp_path / "x.bin"), tokenizer="bytes", dtype=dtype)


def test_zeros_alone_are_not_taken_for_wider_ids(tmp_path: Path) -> None:
    for number, ids in enumerate(([0] * 100, [65, 0] * 7, [0, 65, 65, 0] * 9)):
        path = write_bare(tmp_path / f"{number}.bin", ids)
        assert open_foreign(str(path), tokenizer="bytes", dtype="uint16").split("train").n_tokens == len(ids)


def edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def patch(layout: str, offset: int, value: int) -> Callable[[bytes], bytes]:
    packed = struct.pack(layout, value)
    return lambda content: content[:offset] + packed + content[offset + len(packed) :]


N = len(TEXTS)
POINTERS, DOCUMENTS = HEADER + 4 * N, HEADER + 12 * N


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("m.bin", lambda content: content[:-2], rf"m\.bin has {2 * len(STREAM) - 2} bytes, its index expects"),
        ("m.bin", lambda content: content[:-1], r"m\.bin has .* its index expects"),
        ("m.bin", lambda content: content + b"\0\0", rf"its index expects {2 * len(STREAM)};"),
        ("m.idx", lambda content: content[:-1], r"m\.idx has \d+ bytes, expected \d+ for 5 sequences and 6 entries"),
        ("m.idx", lambda content: content + b"\0" * N, "multimodal"),
        ("m.idx", lambda content: b"X" + content[1:], "is not a Megatron index: expected"),
        ("m.idx", lambda content: content[:20], "is not a Megatron index"),
        ("m.idx", lambda content: b"", "is not a Megatron index"),
        ("m.idx", patch("<Q", 9, 2), "version 2 found, this program reads 1"),
        (
            "m.idx",
            patch("<B", 17, 6),
            "type 6 found, token ids are one of 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 u",
        ),
        ("m.idx", patch("<B", 17, 4), "sequence 1 begins at byte 8, expected 16"),
        ("m.idx", patch("<Q", 18, 2**63), r"expected \d{20}"),
        ("m.idx", patch("<i", HEADER + 4, -1), "sequence 1 has -1 tokens"),
        ("m.idx", patch("<i", HEADER + 4, 2**31 - 1), "sequence 2 begins at byte"),
        ("m.idx", patch("<i", HEADER + 4 * (N - 1), 2**31 - 1), r"expects \d+ or more"),
        ("m.idx", patch("<q", POINTERS + 8, 2), "sequence 1 begins at byte 2, expected 8"),
        ("m.idx", patch("<q", DOCUMENTS, 1), "index of documents runs from 1 to 5, expected 0 to 5"),
        ("m.idx", patch("<q", DOCUMENTS + 8, 4), "index of documents"),
        ("m.idx", patch("<q", DOCUMENTS + 8 * N, 4), "index of documents runs from 0 to 4, expected 0 to 5"),
        ("l.bin", lambda content: content[:-1], r"l\.bin has \d+ bytes, its header of \d+ tokens expects"),
        ("l.bin", lambda content: content + b"\0\0", "its header of"),
        ("l.bin", lambda content: content[:100], "its header of"),
        ("l.bin", patch("<i", 8, -1), "its header of -1 tokens"),
        ("l.bin", patch("<i", 4, 2), "header 20240520 version 2 found, this program reads 20240520 version 1, 2024080"),
        ("l.bin", patch("<i", 0, 20240801), "header 20240801 version 1 found"),
        ("l.bin", patch("<i", 0, 20240522), "questions of an evaluation"),
        ("l.bin", lambda content: patch("<i", 8, 0)(content)[:1024], r"l\.bin holds no tokens"),
        ("b.bin", lambda content: content[:-1], "expected a multiple of 2 for uint16"),
        ("b.bin", lambda content: b"", r"b\.bin holds no tokens"),
        ("b.bin", lambda content: b"\x93NUMPY" + content, "is a NumPy file"),
    ],
)
def test_damage_is_told(tmp_path: Path, name: str, change: Callable[[bytes], bytes], message: str) -> None:
    write_megatron(tmp_path / "m", [[ids_of(text)] for text in TEXTS])
    write_llmc(tmp_path / "l.bin", STREAM)
    write_bare(tmp_path / "b.bin", STREAM)
    edit(tmp_path / name, change)
    with pytest.raises(UserError, match=message):
        open_foreign(str(tmp_path / name), tokenizer="bytes", dtype="uint16" if name == "b.bin" else None)


def test_an_index_without_sequences_is_refused(tmp_path: Path) -> None:
    write_megatron(tmp_path / "m", [])
    with pytest.raises(UserError, match="holds no documents"):
        open_foreign(str(tmp_path / "m"), tokenizer="bytes")
    write_megatron(tmp_path / "m", [[[]]])
    with pytest.raises(UserError, match="holds no tokens"):
        open_foreign(str(tmp_path / "m"), tokenizer="bytes")


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("b.bin", {"dtype": None}, "does not say of which type: set dtype to uint16"),
        ("m", {"dtype": "int32"}, "says that its ids are uint16, dtype says int32"),
        ("l.bin", {"dtype": "uint32"}, "says that its ids are uint16, dtype says uint32"),
        ("b.bin", {"val": "{}/m", "val_fraction": 0.1}, "contradict each other"),
        ("b.bin", {"val_fraction": 1.0}, "below 1, got 1.0"),
        ("b.bin", {"val_fraction": -0.1}, "at least 0"),
        ("b.bin", {"val_fraction": 1e-4}, "of 333 tokens is none"),
        ("one", {"val_fraction": 0.5}, "is one document"),
        ("nano", {"val_fraction": 0.5}, "has a val.bin"),
        ("nano/*.bin", {"val": "{}/nano/val.bin"}, "val.bin is in path and in val"),
        ("w*.bin", {"dtype": None}, "w32.bin int32; files of one split"),
        ("alone.idx", {}, "alone.bin is missing: alone.idx alone holds no ids"),
        ("missing*", {}, "no file matches"),
        ("bb.bin", {}, r"no file .*bb\.bin, nor .*bb\.bin\.bin with .*; did you mean 'b\.bin'"),
        ("empty", {}, r"empty is a folder; .*\(its .bin files: none\)"),
        ("prepared", {}, "data_prep.py made it"),
        ("b.bin", {"tokenizer": "chars"}, "made from a corpus"),
        ("b.bin", {"tokenizer": "train:300"}, "made from a corpus"),
        ("b.bin", {"eos": "</s>"}, "has no token '</s>'"),
        ("b.bin", {"val": "{}/none"}, "val: no file"),
        ("kept", {}, "deleted documents: give its folder"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, path: str, options: dict[str, Any], message: str) -> None:
    write_megatron(tmp_path / "m", [[ids_of(text)] for text in TEXTS])
    write_megatron(tmp_path / "one", [[STREAM]])
    write_megatron(tmp_path / "kept", [[STREAM]])
    (tmp_path / "kept.keep-12.npy").touch()
    write_llmc(tmp_path / "l.bin", STREAM)
    write_bare(tmp_path / "b.bin", STREAM)
    write_megatron(tmp_path / "w16", [[STREAM]])
    write_megatron(tmp_path / "w32", [[STREAM]], dtype="int32")
    (tmp_path / "alone.idx").write_bytes((tmp_path / "m.idx").read_bytes())
    for folder in ("nano", "empty", "prepared"):
        (tmp_path / folder).mkdir()
    (tmp_path / "prepared" / "manifest.json").touch()
    write_bare(tmp_path / "nano" / "train.bin", STREAM)
    write_bare(tmp_path / "nano" / "val.bin", STREAM)
    chosen = {"tokenizer": "bytes", "dtype": "uint16", **options}
    if "val" in chosen:
        chosen["val"] = chosen["val"].format(tmp_path)
    with pytest.raises(UserError, match=message):
        open_foreign(str(tmp_path / path), **chosen)


def try_to_read(path: Path, **options: Any) -> Dataset | None:
    """A dataset that can be read to its end, or None where a `UserError` says why not."""
    try:
        dataset = open_foreign(str(path), tokenizer="bytes", **options)
        for name in ("train", "val"):
            split = dataset.split(name)
            tokens = split.tokens(0, split.n_tokens)
            assert len(split.document_of(0, split.n_tokens)) == len(tokens) == int(split.lengths.sum())
            assert split.n_tokens == 0 or (int(tokens.min()) >= 0 and int(tokens.max()) < 257)
    except UserError:
        return None
    return dataset


def bytes_read(dataset: Dataset) -> int:
    """Of the ids of both splits, as they are stored."""
    splits = [dataset.split("train"), dataset.split("val")]
    return sum(split.tokens(0, split.n_tokens).nbytes for split in splits)


VALID_IDS = st.lists(st.integers(0, EOS), min_size=4, max_size=30).map(lambda ids: np.array(ids, "<u2").tobytes())
fuzzed = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzzed
@given(
    content=st.binary(max_size=64) | VALID_IDS,
    index=st.none() | st.binary(max_size=200),
    head=st.sampled_from([0, 9, 17, 18]),
)
def test_random_bytes_are_read_or_refused(tmp_path: Path, content: bytes, index: bytes | None, head: int) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    (tmp_path / "x.idx").unlink(missing_ok=True)
    if index is not None:
        (tmp_path / "x.idx").write_bytes((b"MMIDIDX\0\0" + struct.pack("<QB", 1, 8))[:head] + index)
    for dtype in (None, "uint16", "int32", "uint32"):
        dataset = try_to_read(tmp_path / "x.bin", dtype=dtype, val_fraction=0.3)
        assert dataset is None or bytes_read(dataset) == len(content)
        if index is None and dtype is None:
            assert dataset is None, "bare ids say nothing of their type"


@fuzzed
@given(data=st.data())
def test_damaged_files_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    write_megatron(tmp_path / "m", [[[1, 2], [3, EOS]], [], [[4, EOS]], [[5, EOS]]])
    write_llmc(tmp_path / "l.bin", STREAM[:20])
    name = data.draw(st.sampled_from(["m.idx", "m.bin", "l.bin"]))
    content = bytearray((tmp_path / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, min(len(content), 200) - 1))
        content[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(len(content) // 2, len(content))) :]
    (tmp_path / name).write_bytes(content)
    dataset = try_to_read(tmp_path / name, val_fraction=data.draw(st.sampled_from([None, 0.4])))
    held = (tmp_path / "l.bin").stat().st_size - 1024 if name == "l.bin" else (tmp_path / "m.bin").stat().st_size
    assert dataset is None or bytes_read(dataset) == held
