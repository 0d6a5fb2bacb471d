"""Ways to damage a file: by chance, as disks do, and with intent, as somebody would who knows the format.

In: a folder of sound files and a source of random choices. Out: the same folder with one or two of them changed, and
what was done in words.
"""

from __future__ import annotations

import json
import os
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash
import yaml

from pipeline.data.manifest import Manifest, data_digest
from pipeline.train.saving.manifest import manifest_of

DEEP = 20_000
NUMBERS = (0, -1, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**9, 10**30, 0.5, -0.0)
WORDS = (
    *(
        "",
        "x",
        ".",
        "..",
        "../victim/file",
        "/etc/passwd",
        "a/b",
        "a\0b",
        "\x1b[2Jx",
        "é三\U0010ffff",
        "nan",
        "x" * 70_000,
    ),
    *("None", "1", "true", "train-00000", "<|endoftext|>", "s3://user:SECRET@bucket", "~", "%s{}", "\\", "\n"),
)
RAW = {  # what no Python value spells
    "@deep-list@": "[" * DEEP + "]" * DEEP,
    "@deep-object@": '{"a":' * DEEP + "1" + "}" * DEEP,
    "@long-number@": "9" * 5_000,
    "@number@": "9" * 400,
    "@nan@": "NaN",
    "@infinity@": "-Infinity",
    "@exponent@": "1e99999",
    "@surrogate@": '"\\ud800"',
    "@twice@": '{"a": 1, "a": 2}',
}


def damage(folder: Path, rng: random.Random) -> dict[Path, str]:
    """Change one file, sometimes two; returns what was done to which."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    chosen = rng.sample(files, rng.choice((1, 1, 1, 2)) if len(files) > 1 else 1)
    return {path: _damage_file(path, files, rng) for path in chosen}


def _damage_file(path: Path, files: list[Path], rng: random.Random) -> str:
    if rng.random() < 0.12:
        return _replace(path, files, rng)
    ways: list[Callable[[Path, random.Random], str]] = [_bytes]
    if path.suffix in (".json", ".yaml"):
        ways += [_values, _values, _values]
    elif path.suffix in (".jsonl",):
        ways += [_lines, _lines]
    elif path.suffix == ".safetensors":
        ways += [_header, _header, _header]
    elif path.suffix in (".idx", ".npy", ".bin"):
        ways += [_words, _words]
    return rng.choice(ways)(path, rng)


def _replace(path: Path, files: list[Path], rng: random.Random) -> str:
    """Something else under the name of the file."""
    ways = ("zero", "fifo", "folder", "missing", "empty", "swap", "loop")
    if path.parent.name not in ("corpus", "foreign", "nano") and path.suffix != ".jsonl":  # these may have any size
        ways += ("sparse",)
    way = rng.choice(ways)
    other = rng.choice(files)
    content = _content(other) if way == "swap" else b""
    path.unlink()
    match way:
        case "zero":
            path.symlink_to("/dev/zero")
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "empty":
            path.touch()
        case "swap":
            path.write_bytes(content)
        case "sparse":
            path.touch()
            os.truncate(path, 2**36)
        case "loop":
            path.symlink_to(path)
    return f"{way} {other.name}" if way == "swap" else way


def _bytes(path: Path, rng: random.Random) -> str:
    """Flipped, cut, lengthened, overwritten: without regard to the format."""
    content = bytearray(path.read_bytes())
    if not content:
        return "nothing to damage"
    at = rng.randrange(len(content))
    match way := rng.choice(("flip", "flip", "cut", "tail", "zeros", "ones", "insert", "drop")):
        case "flip":
            for place in rng.sample(range(len(content)), min(len(content), rng.choice((1, 1, 3, 30)))):
                content[place] ^= 1 << rng.randrange(8)
        case "cut":
            del content[at:]
        case "tail":
            content += rng.randbytes(rng.choice((1, 100, 70_000)))
        case "zeros" | "ones":
            size = min(rng.choice((1, 8, 500)), len(content) - at)
            content[at : at + size] = (b"\0" if way == "zeros" else b"\xff") * size
        case "insert":
            content[at:at] = rng.choice(
                (b"\0", b"\xff\xfe", b'"', b"\\u0000", b"[" * DEEP, b"&a [*a]", rng.randbytes(9))
            )
        case "drop":
            del content[at : at + rng.choice((1, 2, 50))]
    path.write_bytes(content)
    return f"{way} at {at}"


def _words(path: Path, rng: random.Random) -> str:
    """Numbers of a binary format replaced, and what describes an array."""
    content = bytearray(path.read_bytes())
    if path.suffix == ".npy" and rng.random() < 0.5:
        header = content[:128].decode("latin-1")
        new = re.sub(
            r"\d+", lambda found: rng.choice((found[0], found[0], str(rng.choice(NUMBERS)), "("))[:9], header[10:]
        )
        new = rng.choice((new, header[10:].replace("u", "O"), "(" * 100, "{'descr': 5}"))
        path.write_bytes(content[:10] + new.encode("latin-1")[:118].ljust(118) + content[128:])
        return f"array header {new.strip()[:60]}"
    size, kind = rng.choice(((2, "<H"), (4, "<i"), (8, "<q"), (8, "<Q")))
    if len(content) < size:
        return "nothing to damage"
    at = rng.choice((rng.randrange(len(content) - size + 1), rng.randrange(min(64, len(content) - size + 1))))
    limits = {"<H": (0, 2**16 - 1), "<i": (-(2**31), 2**31 - 1), "<q": (-(2**63), 2**63 - 1), "<Q": (0, 2**64 - 1)}[
        kind
    ]
    number = rng.choice(
        [*limits, 0, 1, 300, *(n for n in NUMBERS if isinstance(n, int) and limits[0] <= n <= limits[1])]
    )
    struct.pack_into(kind, content, at, number)
    path.write_bytes(content)
    return f"{number} at {at}"


def _values(path: Path, rng: random.Random) -> str:
    """A value of a JSON or YAML file replaced, removed or added."""
    try:
        values = json.loads(path.read_bytes()) if path.suffix == ".json" else yaml.safe_load(path.read_bytes())
    except ValueError:
        return _bytes(path, rng)
    values, told = change(values, rng)
    if path.suffix == ".json":
        path.write_text(spelled(values), encoding="utf-8", errors="surrogatepass")
    else:
        path.write_text(yaml.safe_dump(values, allow_unicode=False), encoding="utf-8")
    return told


def _lines(path: Path, rng: random.Random) -> str:
    lines = path.read_text().splitlines()
    number = rng.randrange(len(lines))
    values, told = change(json.loads(lines[number]), rng)
    lines[number] = spelled(values)
    path.write_text("\n".join(lines) + "\n")
    return f"line {number + 1}: {told}"


def _header(path: Path, rng: random.Random) -> str:
    """The JSON at the beginning of a safetensors file, or the length that is said of it."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    if rng.random() < 0.15:
        length = rng.choice((0, 1, size - 1, size + 1, 2**20, 2**30, 2**40, 2**63, 2**64 - 1))
        path.write_bytes(length.to_bytes(8, "little") + content[8:])
        return f"header of {length} bytes"
    values, told = change(json.loads(content[8 : 8 + size]), rng)
    text = spelled(values).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    return f"header: {told}"


def change(values: Any, rng: random.Random) -> tuple[Any, str]:
    """`values` with one of them, at any depth, replaced, removed, renamed or joined by another."""
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in list(entries)[:400]:
            places.append((node, key))
            collect(value)

    collect(values)
    if not places or rng.random() < 0.05:
        return (new := hostile(rng)), f"all of it is {str(new)[:40]!r}"
    # large tables would take all the choices
    shallow = [place for place in places if len(place[0]) < 40] or places
    node, key = rng.choice(shallow if rng.random() < 0.8 else places)
    match way := rng.choice(("set", "set", "set", "set", "remove", "rename", "double", "near")):
        case "set":
            node[key] = hostile(rng)
        case "remove":
            del node[key]
        case "rename" if isinstance(node, dict):
            node[rng.choice(WORDS)] = node.pop(key)
        case "near" if isinstance(node[key], (int, float)):
            node[key] = node[key] * rng.choice((2, 10, -1, 10**6)) + rng.choice((0, 1, -1))
        case _:
            if isinstance(node, list):
                node += node * rng.choice((1, 50))
            else:
                node[f"{key}_"] = node[key]
    held = node[key] if way in ("set", "near") and not (way == "near" and isinstance(node, list)) else ""
    return values, f"{way} {key!r:.40} {str(held)[:40]!r}"


def hostile(rng: random.Random) -> Any:
    """A value that is likely to be another than wanted."""
    kind = rng.randrange(10)
    if kind < 4:
        return rng.choice(NUMBERS)
    if kind < 6:
        return rng.choice(WORDS)
    if kind < 7:
        return rng.choice(tuple(RAW))
    return rng.choice(
        (None, True, False, [], {}, [1], [[]], {"a": {}}, [None] * 1000, {"": ""}, ["a", 1, None], [0.5, "b"])
    )


def spelled(values: Any) -> str:
    """As JSON, with what no value of Python spells put in."""
    text = json.dumps(values)
    for mark, raw in RAW.items():
        text = text.replace(json.dumps(mark), raw)
    return text


def sign_checkpoint(checkpoint: Path) -> None:
    """Sizes and checksums of what lies there now: what somebody does who changes a file with intent."""
    path = checkpoint / "manifest.json"
    try:
        files = json.loads(_content(path))["files"]
        for name in files:
            content = _content(checkpoint / name)
            files[name] = {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
        path.write_bytes(manifest_of(files, version=3))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # the manifest itself was changed


def sign_dataset(folder: Path) -> None:
    """The same for a dataset, whose digest covers the checksums."""
    path = folder / "manifest.json"
    try:
        values = json.loads(_content(path))
        for info in [info for infos in values["splits"].values() for info in infos]:
            for name in info["files"]:
                content = _content(folder / name)
                info["files"][name] = {"size": len(content), "checksum": xxhash.xxh3_128_hexdigest(content)}
        manifest = Manifest.model_validate(values)
        fingerprint, dtype = manifest.tokenizer_fingerprint, manifest.dtype
        values["data_digest"] = data_digest(manifest.splits, tokenizer_fingerprint=fingerprint, dtype=dtype)
        path.write_text(json.dumps(values))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return


def _content(path: Path) -> bytes:
    """Of a file that is one, and not made to be endless."""
    return path.read_bytes() if path.is_file() and path.stat().st_size < 2**28 else b""
