"""manifest.json of a checkpoint: what its files are, written last.

In: size and checksum of every file. Out: the content of the manifest; and the other way round, checked.
"""

from __future__ import annotations

import json

import xxhash
from pydantic import BaseModel, ConfigDict

from pipeline.train.saving.storage import MANIFEST, Location, read_bytes
from pipeline.untrusted import DamagedFileError, Natural, RelativePath, parse_json


def manifest_of(files: dict[str, dict[str, int | str]], *, version: int) -> bytes:
    """The content of manifest.json: every file's size and checksum, and a checksum of all that."""
    values = {"format": version, "files": dict(sorted(files.items()))}
    digest = xxhash.xxh3_128_hexdigest(json.dumps(values).encode())
    return json.dumps({**values, "xxh3_128": digest}, indent=2).encode() + b"\n"


class _FileEntry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: Natural
    xxh3_128: str


class _Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Natural
    files: dict[RelativePath, _FileEntry]
    xxh3_128: str


def read_manifest(checkpoint: Location) -> dict[str, dict[str, int | str]]:
    """{name: size and checksum}. Raises OSError, and `DamagedFileError` for anything but what `manifest_of` wrote."""
    path = checkpoint / MANIFEST
    content = read_bytes(path)
    manifest = parse_json(_Manifest, content, origin=path)
    files: dict[str, dict[str, int | str]] = {name: entry.model_dump() for name, entry in manifest.files.items()}
    if content != manifest_of(files, version=manifest.format):
        raise DamagedFileError(f"{path} is not as it was written")
    return files
