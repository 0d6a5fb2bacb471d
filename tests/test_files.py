"""Files are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.data.dataset import open_dataset
from pipeline.data.reading.corpus import find_corpus
from pipeline.data.tokenizer import check_tokenizer_name
from pipeline.errors import UserError
from pipeline.files import expanded, write_durably


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_stops_a_write_leaves_the_file_as_it_was(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_durably(path, b"before")
    assert path.read_bytes() == b"before"

    def fail(_: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        write_durably(path, b"after", writer=".one")
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"before"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_of_a_write_names_the_file(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if call == "fsync" else Path, call, full)
    with pytest.raises(OSError) as caught:
        write_durably(tmp_path / "config.yaml", b"x")
    assert caught.value.filename == str(tmp_path / "config.yaml")
    assert str(caught.value).startswith("[Errno 28] No space left on device")


def test_a_link_left_under_the_temporary_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("untouched")
    (tmp_path / "file.tmp").symlink_to(tmp_path / "other")
    write_durably(tmp_path / "file", b"content")
    assert (tmp_path / "other").read_text() == "untouched"
    assert not (tmp_path / "file").is_symlink()


@pytest.mark.parametrize("name", ["~nobody-has-this-name", "~nobody-has-this-name/a.txt"])
def test_a_home_of_nobody_is_a_name_like_any_other(name: str) -> None:
    assert expanded(name) == Path(name)
    assert expanded("~/a") == Path.home() / "a"
    with pytest.raises(UserError, match="no file or folder"):
        find_corpus([name])
    with pytest.raises(UserError, match=r"no tokenizer file|unknown tokenizer"):
        check_tokenizer_name(name)
    with pytest.raises(UserError, match="no dataset folder"):
        open_dataset(name)
