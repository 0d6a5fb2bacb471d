"""Files that somebody else may have written: names, kinds of files, JSON and YAML."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from pipeline.cli import read_command, read_yaml
from pipeline.errors import UserError
from pipeline.untrusted import (
    DamagedFileError,
    FileName,
    IrregularFileError,
    Natural,
    Object,
    RelativePath,
    check,
    parse_json,
    read_json,
    read_regular,
    shown,
)

OUTSIDE = ("", ".", "..", "../x", "/x", "a/../b", "a//b", "a\0b", "a\nb", "\x1b[2J", "x" * 256, "\ud800")


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    for kind in (FileName, RelativePath):
        with pytest.raises(DamagedFileError, match=r"plain name of a file|valid string"):
            check(kind, name, origin="file")


def test_plain_names_stay() -> None:
    assert check(FileName, "train-00000.docs.npy", origin="file") == "train-00000.docs.npy"
    assert check(RelativePath, "model/00001-of-00002.safetensors", origin="file").startswith("model/")
    with pytest.raises(DamagedFileError, match="plain name"):
        check(FileName, "model/00001-of-00002.safetensors", origin="file")


@pytest.mark.parametrize("number", [-1, 2**63, 1.0, 1.5, True, "1", None, 10**30, float("nan")])
def test_only_counts_are_counts(number: object) -> None:
    assert check(Natural, 2**63 - 1, origin="file") == 2**63 - 1
    with pytest.raises(DamagedFileError, match=r"^file cannot be read: "):
        check(Natural, number, origin="file")


@pytest.fixture(params=["pipe", "device", "link to a device", "folder"])
def irregular(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "file.yaml"
    match request.param:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path = Path("/dev/zero")
        case "link to a device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
    return path


def test_what_is_no_file_is_refused_before_it_is_opened(irregular: Path) -> None:
    with pytest.raises(IrregularFileError, match=r"is a (pipe|device|folder), expected a file"):
        read_regular(irregular, limit=100)
    with pytest.raises(UserError, match="expected a file"):
        read_command([str(irregular)])


def test_files_are_read_at_the_size_that_they_have_up_to_a_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link", limit=5) == b"12345"
    with pytest.raises(DamagedFileError, match="has 5 bytes, expected at most 4 bytes"):
        read_regular(tmp_path / "file", limit=4)
    (tmp_path / "sparse.yaml").touch()
    os.truncate(tmp_path / "sparse.yaml", 2**40)
    with pytest.raises(UserError, match=r"has 1\.1 TB, expected at most"):
        read_yaml(tmp_path / "sparse.yaml")


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": ' + b"9" * 5_000 + b"}",
        b'{"a": NaN}',
        b'{"a": "\\ud800"}',
        b'{"a": "\xff"}',
        b'{"a": 1',
        b"",
        b"[]",
        b"\xff\xfe{\0}\0",
    ],
    ids=lambda content: str(content[:12]),
)
def test_json_that_is_none_is_one_message(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"file\.json cannot be read: ") as raised:
        read_json(Object, tmp_path / "file.json")
    assert len(str(raised.value)) < 400


def test_a_schema_names_the_place_the_expected_and_the_found() -> None:
    class Inner(BaseModel):
        size: Natural

    with pytest.raises(
        DamagedFileError, match=r"^file cannot be read: files\.'\\x1b'\.size: Input should .*, got 0\.5$"
    ):
        parse_json(dict[str, dict[str, Inner]], b'{"files": {"\\u001b": {"size": 0.5}}}', origin="file")
    assert len(shown("x" * 10**6)) < 100
    assert len(shown([1] * 10**6)) < 100
    assert shown("a\x1b[2J") == r"'a\x1b[2J'"
    assert shown(10**5000) == "a int"


LAUGHS = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "references"),
        ("model: &x {n_layers: 2}", "references"),
        ("model: *x", "references"),
        ("seed: !!bool x", "types"),
        ("seed: !!python/object/apply:os.system [ls]", "types"),
        ("seed: !x 1", "types"),
        ("model: " + "[" * 10_000, "nested"),
        ("model: " + "{a: " * 10_000, "nested"),
        ("- " * 10_000, "nested"),
        ("seed: " + "9" * 5_000, "4300 digits"),
        ("seed: 2001-99-99", "month"),
        ('run_dir: "a\\0b"', "zero byte"),
        ("? [1]\n: 2", "unhashable"),
        ("seed: 1\nseed: 2", "given twice"),
        ("1: 2", "must hold sections"),
        ("[1, 2]", "must hold sections"),
    ],
    ids=lambda text: text[:20],
)
def test_yaml_that_is_no_plain_mapping_is_one_message(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        read_command([str(path)])
    assert "config.yaml" in str(raised.value)
    assert len(str(raised.value)) < 600
    assert "\0" not in str(raised.value)


@pytest.mark.parametrize("value", ["x" * 10**5, [1] * 10**4, "\x1b[2J" * 9])
def test_faults_show_little_of_a_value(value: object, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": {"n_layers": value, "x" * 10**5: 1}}))
    with pytest.raises(UserError, match="2 faults") as raised:
        read_command([str(path)])
    assert len(str(raised.value)) < 1000
    assert "\x1b" not in str(raised.value)


def test_what_is_no_object_is_told_without_names_of_ours() -> None:
    class Ours(BaseModel):
        key: int

    for value in (b"[]", b"5", b"null"):
        with pytest.raises(DamagedFileError, match=r"^file cannot be read: expected an object, got ") as caught:
            parse_json(Ours, value, origin="file")
        assert "Ours" not in str(caught.value)
