"""What a file is, told by its beginning: whatever the readers cannot read is named, with what to do about it."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.orc as orc
import pyarrow.parquet as pq
import pytest
import zstandard

from pipeline.data.reading.corpus import find_corpus
from pipeline.data.reading.formats import TextRules
from pipeline.data.reading.signatures import unreadable, wide_encoding
from pipeline.errors import UserError
from tests.reading import read, texts_of

TEXT = "One line of text.\nAnother line of it.\n" * 40
LINES = "".join(json.dumps({"text": f"record {i}"}) + "\n" for i in range(20)).encode()


def tar(form: int) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=form) as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = len(TEXT)
        archive.addfile(info, io.BytesIO(TEXT.encode()))
    return content.getvalue()


def tar_of_version_7() -> bytes:
    """Without the word ustar, which old tars lack; the checksum of its header is made anew."""
    header = bytearray(tar(tarfile.USTAR_FORMAT)[:512])
    header[257:512] = bytes(255)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + tar(tarfile.USTAR_FORMAT)[512:]


def zipped() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a.txt", TEXT)
    return content.getvalue()


def arrow(form: str) -> bytes:
    sink, table = io.BytesIO(), pa.table({"text": ["a", "b"]})
    if form == "orc":
        orc.write_table(table, sink)
    elif form == "feather":
        feather.write_feather(table, sink)
    else:
        with (pa.ipc.new_file if form == "file" else pa.ipc.new_stream)(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


def database(folder: Path) -> bytes:
    connection = sqlite3.connect(folder / "db")
    connection.execute("create table a (text)")
    connection.commit()
    connection.close()
    return (folder / "db").read_bytes()


def saved_array() -> bytes:
    content = io.BytesIO()
    np.save(content, np.arange(9))
    return content.getvalue()


CONTENTS: dict[str, tuple[bytes, str]] = {
    "tar": (tar(tarfile.GNU_FORMAT), "a tar archive.*tar -xf"),
    "pax": (tar(tarfile.PAX_FORMAT), "a tar archive.*tar -xf"),
    "tar7": (tar_of_version_7(), "a tar archive.*tar -xf"),
    "zip": (zipped(), "a zip archive.*unzip"),
    "xz": (lzma.compress(TEXT.encode()), "compressed with xz.*xz -d"),
    "lzma": (lzma.compress(TEXT.encode(), lzma.FORMAT_ALONE), "compressed with lzma.*xz -d"),
    "bz2": (bz2.compress(TEXT.encode()), "compressed with bzip2.*bzip2 -d"),
    "arrow": (arrow("file"), "an Arrow file.*convert it to parquet"),
    "feather": (arrow("feather"), "an Arrow file.*convert it to parquet"),
    "stream": (arrow("stream"), "an Arrow stream.*save_to_disk"),
    "orc": (arrow("orc"), "an ORC file.*convert it to parquet"),
    "npy": (saved_array(), "a NumPy array"),
    "pickle": (pickle.dumps([TEXT]), "a Python pickle"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF document.*pdftotext"),
    "png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "an image"),
    "elf": (b"\x7fELF\x02\x01\x01" + bytes(9), "a compiled program"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "Git LFS.*git lfs pull"),
    "warc": (b"WARC/1.0\r\nWARC-Type: warcinfo\r\n", "a web archive"),
    "utf16": (TEXT.encode("utf-16"), "text in UTF-16LE.*iconv -f UTF-16LE -t UTF-8"),
    "utf16be": (b"\xfe\xff" + TEXT.encode("utf-16-be"), "text in UTF-16BE.*iconv -f UTF-16BE"),
    "utf16le without a mark": (TEXT.encode("utf-16-le"), "text in UTF-16LE.*iconv"),
    "utf16be without a mark": (TEXT.encode("utf-16-be"), "text in UTF-16BE.*iconv"),
    "utf16 cyrillic": (("Простой текст из слов.\n" * 9).encode("utf-16-le"), "text in UTF-16LE"),
    "utf16 json lines": (LINES.decode().encode("utf-16"), "text in UTF-16LE"),
    "utf32": (TEXT.encode("utf-32"), "text in UTF-32LE.*iconv -f UTF-32LE"),
    "utf32be": (TEXT.encode("utf-32-be"), "text in UTF-32BE"),
    "utf32 without a mark": (TEXT.encode("utf-32-le"), "text in UTF-32LE"),
}
PACKED: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("name", CONTENTS)
def test_what_no_reader_reads_is_named_with_a_remedy(tmp_path: Path, name: str) -> None:
    content, said = CONTENTS[name]
    what, _, remedy = said.partition(".*")
    within = {"": "", ".gz": " within gzip", ".zst": " within zstd"}
    for suffix in (".txt", ".jsonl", ".json", ".csv", ".bin", ""):
        for packed, pack in PACKED.items():
            path = tmp_path / f"file{suffix}{packed}"
            path.write_bytes(pack(content))
            wanted = f"file{suffix}{packed} is .*{what}.*{within[packed]}: .*{remedy}.*, or --exclude it"
            with pytest.raises(UserError, match=wanted):
                find_corpus([f"{tmp_path}/*"])
            path.unlink()


def test_a_database_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(database(tmp_path))
    with pytest.raises(UserError, match=r"a\.txt is an SQLite database: convert"):
        find_corpus([str(tmp_path)])


def test_all_unreadable_files_are_named_at_once(tmp_path: Path) -> None:
    for number in range(11):
        (tmp_path / f"{number:02}.txt").write_bytes(zipped())
    with pytest.raises(UserError) as error:
        find_corpus([str(tmp_path)])
    assert str(error.value).count("a zip archive") == 8
    assert str(error.value).endswith("\nand 3 more such files")
    (tmp_path / "good.txt").write_text(TEXT)
    assert texts_of(read(tmp_path, exclude=("*/[01]?.txt",))) == [TEXT]


@pytest.mark.parametrize(
    "content",
    [
        b"ORC is a format.\n",
        b"BZh91AY&SY begins a bzip2 file.\n",
        b"PK are two letters",
        b"\x1b[31mred\x1b[0m\n",
        b"<!DOCTYPE html><html><body>text</body></html>",
        "Ünïcödé 日本語 😀\n".encode() * 300,
        b"\xef\xbb\xbftext with a mark of UTF-8",
        b"a",
        b"file\0other file\0a third\0",
        b"MZ",
        b"name,text\n1,a\n",
    ],
)
def test_text_is_text(tmp_path: Path, content: bytes) -> None:
    assert unreadable(content) is None
    (tmp_path / "a.txt").write_bytes(content)
    assert texts_of(read(tmp_path)) == [content.removeprefix(b"\xef\xbb\xbf").decode()]


def test_zeros_alone_and_scattered_zeros_are_no_encoding() -> None:
    assert wide_encoding(bytes(600)) is None
    assert wide_encoding(b"abc\0" * 100) is None
    assert wide_encoding(b"one\0three\0four\0") is None
    assert wide_encoding(TEXT.encode()) is None


def test_noise_under_an_unknown_name_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "data.xyz").write_bytes(b"abc\x01\x02def")
    with pytest.raises(UserError, match=r"data.xyz is no text: it has a byte 0x01 at 3; wanted \.txt .*--exclude it"):
        find_corpus([f"{tmp_path}/*"])


def test_files_of_unlisted_kinds_are_told_to_be_read_as_text(tmp_path: Path) -> None:
    for name in ("a.py", "b.log", "Makefile", "c.txt"):
        (tmp_path / name).write_text("text")
    (note,) = find_corpus([f"{tmp_path}/*"]).notes
    assert note == "read as plain text, each a document: 3 files of other kinds (.log, .py, no suffix)"
    assert texts_of(read(f"{tmp_path}/*")) == ["text"] * 4


@pytest.mark.parametrize("name", ["a.txt", "a.log", "a", "a.csv", "a.jsonl.1", "a.md.gz", "a.log.zstd", "a.jsonl.zstd"])
def test_json_lines_are_found_under_any_name(tmp_path: Path, name: str) -> None:
    pack = {"gz": gzip.compress, "zstd": zstandard.compress}.get(name.rpartition(".")[2], bytes)
    (tmp_path / name).write_bytes(pack(b"\n" + LINES))
    corpus = find_corpus([str(tmp_path / name)])
    assert corpus.sources[0].kind == "jsonl"
    promised = ".jsonl" in name and not name.endswith("1")
    assert [note for note in corpus.notes if "holds JSON lines" in note] == ([] if promised else list(corpus.notes))
    assert texts_of(read(tmp_path / name)) == [f"record {i}" for i in range(20)]


@pytest.mark.parametrize(
    "content", ['{"text": "one object"}\n', '{\n "a": 1\n}\n', '{"a": 1}\n{"b": 2}\n', "{x}\n{y}\n"]
)
def test_braces_alone_make_no_json_lines(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.md").write_text(content)
    assert texts_of(read(tmp_path)) == [content]


def test_what_is_packed_twice_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(zstandard.compress(LINES)))
    with pytest.raises(UserError, match=r"a\.jsonl\.gz is zstd within gzip: unpack it once"):
        find_corpus([str(tmp_path)])
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    with pytest.raises(UserError, match=r"a\.parquet\.gz is parquet within gzip: unpack it"):
        find_corpus([str(tmp_path / "a.parquet.gz")])


def test_zstd_under_its_long_suffix_is_found_in_folders(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zstd").write_bytes(zstandard.compress(LINES))
    (tmp_path / "b.txt.zstd").write_bytes(zstandard.compress(TEXT.encode()))
    corpus = find_corpus([str(tmp_path)])
    assert ([source.kind for source in corpus.sources], corpus.notes) == (["jsonl", "text"], ())
    assert len(read(tmp_path, rules=TextRules())) == 21


def test_a_pattern_visits_each_real_folder_once(tmp_path: Path) -> None:
    (tmp_path / "s" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("s/a.txt", "s/deep/b.txt", "s/deep/er/c.txt", "elsewhere/d.txt", "s/deep/.hidden.txt"):
        (tmp_path / name).write_text(name)
    for number in range(40):  # a walk along all ways would take 40 * 40 * ... steps
        (tmp_path / "s" / f"back{number}").symlink_to(tmp_path / "s")
        (tmp_path / "s" / "deep" / f"back{number}").symlink_to("..")
    (tmp_path / "s" / "out").symlink_to(tmp_path / "elsewhere")
    found = [source.name for source in find_corpus([f"{tmp_path}/s/**/*.txt"]).sources]
    assert found == [str(tmp_path / name) for name in ("elsewhere/d.txt", "s/a.txt", "s/deep/b.txt", "s/deep/er/c.txt")]
    assert [source.name for source in find_corpus([f"{tmp_path}/**/deep/**/*.txt"]).sources] == found
    assert len(find_corpus([f"{tmp_path}/s/**"]).sources) == 4


def test_a_link_to_itself_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    for name in (tmp_path / "loop.txt", tmp_path, f"{tmp_path}/*.txt"):
        with pytest.raises(UserError, match=r"loop\.txt"):
            find_corpus([str(name)])
    assert [Path(source.name).name for source in find_corpus([f"{tmp_path}/**/*.txt"]).sources] == ["a.txt"]
