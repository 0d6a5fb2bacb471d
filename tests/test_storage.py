"""The same shelf on a file system and on object stores: one in memory, one that hides a folder behind fsspec."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from pipeline.errors import UserError
from pipeline.train.saving import storage
from pipeline.train.saving.manifest import manifest_of, read_manifest
from pipeline.train.saving.storage import (
    DAMAGED_MANIFEST,
    MANIFEST,
    Location,
    Remote,
    Shelf,
    entries,
    fingerprint,
    is_file,
    is_folder,
    locate,
    read_bytes,
    read_into,
    size_of,
    write_bytes,
    writing,
)

KINDS: dict[str, Callable[[Path], str]] = {
    "folder": str,
    "file": lambda path: f"file://{path}",
    "memory": lambda path: f"memory://{uuid.uuid4().hex}/a",
    "object store on disk": lambda path: f"local://{path}",
}


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return locate(KINDS[request.param](tmp_path / "checkpoints"))


def put(shelf: Shelf, step: int) -> Location:
    """A checkpoint of one small file."""
    place = shelf.workplace(step)
    shelf.make(place)
    write_bytes(place / "model" / "weights", str(step).encode())
    assert place not in shelf.checkpoints(), "it is not one yet"
    write_bytes(place / MANIFEST, b"{}")
    return shelf.publish(step)


def names(found: list[Location]) -> list[str]:
    return [location.name for location in found]


def test_what_is_under_way_is_no_checkpoint_and_what_is_published_is(folder: Location) -> None:
    shelf = Shelf.at(folder)
    assert shelf.checkpoints() == shelf.leftovers() == []
    finals = [put(shelf, step) for step in (20, 3, 100_000_000)]
    assert shelf.checkpoints() == [finals[1], finals[0], finals[2]]
    assert finals[0] == shelf.final(20)
    assert read_bytes(finals[0] / "model" / "weights") == b"20"
    place = shelf.workplace(30)
    shelf.make(place)
    write_bytes(place / "model" / "weights", b"30")
    assert shelf.leftovers() == [place]
    shelf.clear(place)
    assert shelf.leftovers() == []
    assert len(shelf.checkpoints()) == 3


def test_a_removed_one_is_gone(folder: Location) -> None:
    shelf = Shelf.at(folder)
    first, second = put(shelf, 1), put(shelf, 2)
    shelf.remove(first)
    assert shelf.checkpoints() == [second]
    assert shelf.leftovers() == []
    assert not is_folder(first)


def test_one_killed_while_it_is_removed_is_a_leftover(folder: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf.at(folder)
    checkpoint = put(shelf, 1)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(storage.shutil, "rmtree", killed)
        if isinstance(folder, Remote):
            patched.setattr(type(folder.system), "rm", killed)
        with pytest.raises(KeyboardInterrupt):
            shelf.remove(checkpoint)
    assert shelf.checkpoints() == []
    [leftover] = shelf.leftovers()
    shelf.clear(leftover)
    assert shelf.leftovers() == []


def test_a_second_one_of_a_step_replaces_the_first(folder: Location) -> None:
    shelf = Shelf.at(folder)
    put(shelf, 1)
    write_bytes(shelf.final(1) / "model" / "old", b"")
    put(shelf, 1)
    assert names(shelf.checkpoints()) == ["step-00000001"]
    assert not is_file(shelf.final(1) / "model" / "old")
    assert shelf.leftovers() == []


def test_a_damaged_one_is_kept_but_counts_no_more(folder: Location) -> None:
    shelf = Shelf.at(folder)
    for _ in range(2):
        shelf.set_aside(put(shelf, 1))
        assert shelf.checkpoints() == []
        assert shelf.leftovers() == []
    kept = names(entries(folder))
    if isinstance(folder, Path):
        assert kept == ["step-00000001.damaged", "step-00000001.damaged1"]
    else:
        assert kept == ["step-00000001", "step-00000001.damaged"]
        for place in entries(folder):
            assert set(names(entries(place))) == {DAMAGED_MANIFEST, "model"} | (
                {"optimizer"} & set(names(entries(place)))
            )
            assert read_bytes(place / "model" / "weights") == b"1", "the first was not lost when the second was written"


def test_other_things_in_the_folder_are_left_alone(folder: Location) -> None:
    shelf = Shelf.at(folder)
    put(shelf, 1)
    for name in ("mine", "step-12", "step-00000001x", ".step-x.partial"):
        shelf.make_folder()
        write_bytes(folder / name, b"")
    assert names(shelf.checkpoints()) == ["step-00000001"]
    assert shelf.leftovers() == []


def test_files_are_written_and_read(folder: Location) -> None:
    shelf = Shelf.at(folder)
    shelf.make_folder()
    content = bytes(range(256)) * 40_000  # more than one block of a checksum
    file = folder / "file"
    with writing(file) as stream:
        for start in range(0, len(content), 999_999):
            stream.write(memoryview(content)[start : start + 999_999])
    assert read_bytes(file) == content
    assert size_of(file) == len(content)
    assert fingerprint(file) == {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
    target = bytearray(1000)
    read_into(file, 12_345, memoryview(target))
    assert target == content[12_345:13_345]
    with pytest.raises(EOFError, match="ends 990 bytes early"):
        read_into(file, len(content) - 10, memoryview(target))
    assert is_file(file)
    assert not is_file(folder)
    shelf.clear(file)
    assert not is_file(file)


def test_room_is_known_on_file_systems(tmp_path: Path) -> None:
    free = Shelf.at(tmp_path / "not" / "yet" / "there").free_bytes()
    assert free is not None
    assert free > 0
    assert Shelf.at(locate("memory://a")).free_bytes() is None


@pytest.mark.parametrize("text", ["nope://bucket/x", "s3://bucket/x"])
def test_an_address_that_cannot_be_used_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)  # as if it were not installed
    with pytest.raises(UserError, match=f"{text} cannot be used: .*; install what it needs"):
        locate(text)


def test_locations_are_named_as_they_were_given() -> None:
    assert locate("runs/a") == Path("runs/a")
    assert locate("file:///runs/a") == Path("/runs/a")
    assert str(locate("memory://a/b") / "c").endswith("a/b/c")
    remote = locate("memory://a/b/")
    assert (remote.name, (remote / "c").parent.name) == ("b", "b")


def test_a_manifest_is_read_only_as_it_was_written(tmp_path: Path) -> None:
    """Every byte of it counts, white space too."""
    files: dict[str, dict[str, int | str]] = {
        "b": {"bytes": 12, "xxh3_128": "ab"},
        "a/1": {"bytes": 3, "xxh3_128": "cd"},
    }
    content = manifest_of(files, version=3)
    (tmp_path / MANIFEST).write_bytes(content)
    assert read_manifest(tmp_path) == files
    for place in range(len(content)):
        for bit in (1, 2, 4, 8, 16, 32, 64, 128):
            (tmp_path / MANIFEST).write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            with pytest.raises(ValueError, match=MANIFEST):
                read_manifest(tmp_path)
    for short in range(len(content)):
        (tmp_path / MANIFEST).write_bytes(content[:short])
        with pytest.raises(ValueError, match=MANIFEST):
            read_manifest(tmp_path)
