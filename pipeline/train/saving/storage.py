"""Where checkpoints lie: a folder of the file system, or an address that fsspec knows (s3://, gs://, memory://).

In: `checkpoint.folder`. Out: locations (`Path` or `Remote`), whole files in them, and a `Shelf`: the folders that are
complete checkpoints, told apart from those that are not.

| | file system | object store |
|---|---|---|
| under way | `.step-N.partial`, which nothing takes for a checkpoint | `step-N` without a manifest.json |
| complete | renamed to `step-N` after files and folders were synced | manifest.json is there, written last |
| removed | renamed to `.step-N.removed` first | manifest.json first |
| damaged, set aside | renamed to `step-N.damaged` | manifest.json moved to manifest.damaged.json (1) |

(1) and all of it to `step-N.damaged` once step N is written again.
"""

from __future__ import annotations

import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import IO, Any

import xxhash
from typing_extensions import override

from pipeline.credentials import is_masked, mask
from pipeline.errors import UserError, sized
from pipeline.files import fsync_folder
from pipeline.untrusted import LARGEST_JSON, check_regular, read_regular

MANIFEST = "manifest.json"
DAMAGED_MANIFEST = "manifest.damaged.json"
READ_BYTES = 1 << 22  # at a time, for checksums

_NAME = re.compile(r"step-(\d{8,})")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(frozen=True)
class Remote:
    """A path of one of fsspec's file systems, with what is used here of `Path`."""

    system: Any = field(compare=False, repr=False)
    path: str

    def __truediv__(self, name: str) -> Remote:
        """A file or folder within."""
        return Remote(self.system, f"{self.path.rstrip('/')}/{name}")

    def __str__(self) -> str:
        """The address, without credentials."""
        return mask(str(self.system.unstrip_protocol(self.path)))

    @property
    def name(self) -> str:
        """The last part."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def parent(self) -> Remote:
        """All but the last part."""
        return Remote(self.system, self.path.rstrip("/").rsplit("/", 1)[0])


Location = Path | Remote


def locate(text: str | Path) -> Location:
    """The location that a path or an address names; file:// is a path, too. Errors: an unknown kind of address."""
    text = str(text)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    if not _URL.match(text):
        return Path(text)
    if is_masked(text):
        raise UserError(
            f"{text} was stored by a run, and credentials are not stored; give the address of the checkpoint itself, "
            "or keep credentials where its client looks for them (environment, file in the home folder)"
        )
    import fsspec  # only who uses an address waits for it

    try:
        # Other processes write, too: what was listed a minute ago says nothing.
        system, path = fsspec.core.url_to_fs(text, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise UserError(f"{text} cannot be used: {error}; install what it needs, or give a folder") from None
    return Remote(system, path)


def step_of(checkpoint: Location) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def names_a_checkpoint(location: Location) -> bool:
    """Whether a folder bears the name of a complete checkpoint, on a file system."""
    return _NAME.fullmatch(location.name) is not None


def entries(folder: Location) -> list[Location]:
    """What a folder holds, sorted; nothing when it does not exist. Errors: OSError where it may not be read."""
    try:
        if isinstance(folder, Path):
            return [*sorted(folder.iterdir())]
        return [Remote(folder.system, path) for path in sorted(folder.system.ls(folder.path, detail=False))]
    except FileNotFoundError:
        return []


def is_file(location: Location) -> bool:
    """Whether there is a file."""
    return location.is_file() if isinstance(location, Path) else bool(location.system.isfile(location.path))


def is_folder(location: Location) -> bool:
    """Whether there is a folder."""
    return location.is_dir() if isinstance(location, Path) else bool(location.system.isdir(location.path))


def size_of(file: Location) -> int:
    """Bytes of a file. Raises `IrregularFileError` for a device or a pipe."""
    return check_regular(file) if isinstance(file, Path) else int(file.system.size(file.path))


def read_bytes(file: Location, *, limit: int = LARGEST_JSON) -> bytes:
    """A whole, small file. Raises `UserError` for one of more than `limit` bytes, a device or a pipe."""
    if isinstance(file, Path):
        return read_regular(file, limit=limit)
    content = bytes(file.system.cat_file(file.path, start=0, end=limit + 1))
    if len(content) > limit:
        raise UserError(f"{file} has more than {sized(limit)}; is it the right file?")
    return content


def read_into(file: Location, offset: int, target: memoryview) -> None:
    """Fill `target` from byte `offset` on. Errors: EOFError where the file ends before."""
    got = 0
    if isinstance(file, Path):
        with file.open("rb", buffering=0) as stream:
            stream.seek(offset)
            while got < len(target) and (more := stream.readinto(target[got:])):  # at most 2 GiB a call
                got += more
    else:
        found = file.system.cat_file(file.path, start=offset, end=offset + len(target))
        got = len(found)
        target[:got] = found
    if got < len(target):
        raise EOFError(f"{file} ends {len(target) - got} bytes early")


def write_bytes(file: Location, content: bytes) -> None:
    """A whole, small file, forced to disk."""
    with writing(file) as stream:
        stream.write(content)


@contextmanager
def writing(file: Location) -> Iterator[IO[bytes]]:
    """A new file, which is on disk when the block ends."""
    if isinstance(file, Path):
        with file.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            _forget_pages(stream.fileno())
    else:
        with file.system.open(file.path, "wb") as stream:
            yield stream


def fingerprint(file: Location) -> dict[str, int | str]:
    """Size and checksum of a file, as manifests hold them. Raises `IrregularFileError` for a device or a pipe."""
    digest, size = xxhash.xxh3_128(), 0
    if isinstance(file, Path):
        check_regular(file)
    with file.open("rb") if isinstance(file, Path) else file.system.open(file.path, "rb") as stream:
        while block := stream.read(READ_BYTES):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "xxh3_128": digest.hexdigest()}


def _forget_pages(descriptor: int) -> None:
    """Reading back shall ask the disk, not the memory that was written from (where the system can be told so)."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


class Shelf(ABC):
    """The checkpoints in one folder, and what is under way to become one."""

    folder: Location

    @staticmethod
    def at(folder: Location) -> Shelf:
        """The shelf for a kind of location."""
        return LocalShelf(folder) if isinstance(folder, Path) else RemoteShelf(folder)

    @abstractmethod
    def checkpoints(self) -> list[Location]:
        """Complete ones, oldest first. Errors: OSError where the folder may not be read."""

    @abstractmethod
    def workplace(self, step: int) -> Location:
        """Where the checkpoint of `step` is written; nothing takes it for one yet."""

    @abstractmethod
    def leftovers(self) -> list[Location]:
        """What killed processes left: begun and never finished, or removed in part."""

    @abstractmethod
    def publish(self, step: int) -> Location:
        """Make what is written in `workplace` a checkpoint for good; it has its manifest. Replaces an older one."""

    @abstractmethod
    def remove(self, checkpoint: Location) -> None:
        """Delete a checkpoint; when killed on the way, nothing takes the rest for one."""

    @abstractmethod
    def set_aside(self, checkpoint: Location) -> None:
        """Keep a damaged one, but no more as a checkpoint."""

    @abstractmethod
    def clear(self, place: Location) -> None:
        """Delete a file or a folder with all in it, if there."""

    @abstractmethod
    def make_folder(self) -> None:
        """The folder of the shelf itself."""

    @abstractmethod
    def make(self, place: Location) -> None:
        """An empty `workplace` with its parts; the older checkpoint of the same step goes where it is in the way."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Room on the disk; None where nobody can say."""

    def final(self, step: int) -> Location:
        """Where the checkpoint of `step` is when it is complete."""
        return self.folder / f"step-{step:08d}"


class LocalShelf(Shelf):
    """On a file system: a name is given at once by renaming."""

    def __init__(self, folder: Path) -> None:
        self.folder: Path = folder

    @override
    def checkpoints(self) -> list[Location]:
        return sorted((place for place in entries(self.folder) if names_a_checkpoint(place)), key=step_of)

    @override
    def workplace(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}.partial"

    @override
    def leftovers(self) -> list[Location]:
        return [place for place in entries(self.folder) if re.fullmatch(r"\.step-\d+\.(partial|removed)", place.name)]

    @override
    def publish(self, step: int) -> Path:
        partial, final = self.workplace(step), self.folder / f"step-{step:08d}"
        for folder in (*(place for place in partial.iterdir() if place.is_dir()), partial):
            fsync_folder(folder)
        older = final.is_dir()  # of the same step, which the run went back before
        if older:
            removed = self._name_as_removed(final)
        partial.rename(final)
        fsync_folder(self.folder)
        if older:
            with suppress(OSError):  # a leftover, which retention removes
                self.clear(removed)
        return final

    @override
    def remove(self, checkpoint: Location) -> None:
        assert isinstance(checkpoint, Path), "a shelf holds locations of its own kind"
        self.clear(self._name_as_removed(checkpoint))

    def _name_as_removed(self, checkpoint: Path) -> Path:
        removed = checkpoint.with_name(f".{checkpoint.name}.removed")
        self.clear(removed)
        return checkpoint.rename(removed)

    @override
    def set_aside(self, checkpoint: Location) -> None:
        assert isinstance(checkpoint, Path), "a shelf holds locations of its own kind"
        names = map(checkpoint.with_name, _names_aside(checkpoint))
        checkpoint.rename(next(name for name in names if not name.exists()))

    @override
    def clear(self, place: Location) -> None:
        assert isinstance(place, Path), "a shelf holds locations of its own kind"
        if place.is_dir() and not place.is_symlink():  # what a link points to is not ours
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)

    @override
    def make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    @override
    def make(self, place: Location) -> None:
        assert isinstance(place, Path), "a shelf holds locations of its own kind"
        self.clear(place)
        self.folder.mkdir(exist_ok=True)  # without parents: a run folder that was renamed is not made again
        place.mkdir()
        for part in ("model", "optimizer"):
            (place / part).mkdir()

    @override
    def free_bytes(self) -> int | None:
        existing = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.is_dir())
        return shutil.disk_usage(existing).free


class RemoteShelf(Shelf):
    """On an object store, which cannot rename: the manifest, written last, makes a checkpoint."""

    def __init__(self, folder: Remote) -> None:
        self.folder: Remote = folder

    @override
    def checkpoints(self) -> list[Location]:
        return self._steps(lambda held: MANIFEST in held)

    @override
    def workplace(self, step: int) -> Remote:
        return self.folder / f"step-{step:08d}"

    @override
    def leftovers(self) -> list[Location]:
        return self._steps(lambda held: not {MANIFEST, DAMAGED_MANIFEST} & held)

    @override
    def publish(self, step: int) -> Remote:
        return self.workplace(step)

    @override
    def remove(self, checkpoint: Location) -> None:
        self.folder.system.rm_file((self.folder / checkpoint.name / MANIFEST).path)
        self.clear(checkpoint)

    @override
    def set_aside(self, checkpoint: Location) -> None:
        place = self.folder / checkpoint.name
        write_bytes(place / DAMAGED_MANIFEST, read_bytes(place / MANIFEST))
        self.folder.system.rm_file((place / MANIFEST).path)

    @override
    def clear(self, place: Location) -> None:
        path = (self.folder / place.name).path
        if self.folder.system.exists(path):
            self.folder.system.rm(path, recursive=True)

    @override
    def make_folder(self) -> None:
        self.folder.system.makedirs(self.folder.path, exist_ok=True)

    @override
    def make(self, place: Location) -> None:
        if is_file(place / MANIFEST):
            self.remove(place)
        elif is_file(place / DAMAGED_MANIFEST):
            names = map(self.folder.__truediv__, _names_aside(place))
            aside = next(name for name in names if not self.folder.system.exists(name.path))
            self.folder.system.mv((self.folder / place.name).path, aside.path, recursive=True)
        self.clear(place)
        for part in ("model", "optimizer"):  # object stores have no folders and take no notice
            self.folder.system.makedirs((self.folder / place.name / part).path, exist_ok=True)

    @override
    def free_bytes(self) -> int | None:
        return None

    def _steps(self, wanted: Callable[[set[str]], bool]) -> list[Location]:
        found = [place for place in entries(self.folder) if names_a_checkpoint(place)]
        return sorted((place for place in found if wanted({held.name for held in entries(place)})), key=step_of)


def _names_aside(checkpoint: Location) -> Iterator[str]:
    return (f"{checkpoint.name}.damaged{number or ''}" for number in count())
