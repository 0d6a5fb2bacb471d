"""Damage files of every kind and see that no command ends in anything but success or one message.

    python -m tests.fuzz 1000 [--first SEED] [--kind KIND] [--keep FOLDER]

In: how many damaged inputs to try; each follows from its seed alone. Out: the faults found, and exit code 1 if there
are any. A fault is an error that a user would see as a traceback, a message that is none, a process that dies, takes
more memory or more time than `MEMORY` and `SECONDS`, or writes outside its folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import time
import traceback
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pipeline.errors import verdict
from tests.fuzz.commands import KINDS
from tests.fuzz.mutate import damage
from tests.fuzz.samples import make_all

MEMORY = 2 * 10**9  # bytes beyond what the program itself takes
SECONDS = 60.0
LONGEST = 8_000  # characters of a message


def main() -> None:
    """Try inputs one by one, each in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("number", type=int)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--kind", choices=sorted(KINDS))
    parser.add_argument("--keep", type=Path, help="copy the inputs that show a fault there")
    arguments = parser.parse_args()
    os.environ.update({"TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"})
    torch.set_num_threads(1)
    results, faulty = [], 0
    with TemporaryDirectory() as scratch:
        samples = Path(scratch, "samples")
        samples.mkdir()
        _in_child(lambda: make_all(samples), limit=600.0)
        for seed in range(arguments.first, arguments.first + arguments.number):
            kind = arguments.kind or sorted(KINDS)[seed % len(KINDS)]
            place = Path(scratch, "case")
            result = try_one(samples / kind, place, kind=kind, seed=seed)
            results.append(result)
            if result["faults"]:
                faulty += 1
                print(f"seed {seed}, {kind}: {result['done']}")
                print("\n".join(f"  {fault}" for fault in result["faults"]), flush=True)
                if arguments.keep:
                    shutil.copytree(place, arguments.keep / str(seed), symlinks=True, ignore=_no_files)
            shutil.rmtree(place, ignore_errors=True)
    outcomes = Counter(outcome for result in results for outcome in result["outcomes"])
    longest, largest = max(r["seconds"] for r in results), max(r["bytes"] for r in results)
    print(
        f"{len(results)} inputs, {dict(outcomes)}; longest {longest:.1f} s, most memory {largest / 1e6:.0f} MB, "
        f"{faulty} with faults"
    )
    raise SystemExit(1 if faulty else 0)


def try_one(sample: Path, place: Path, *, kind: str, seed: int) -> dict[str, Any]:
    """Damage a copy of `sample` in `place` and run all commands that read it."""
    rng = random.Random(f"{kind} {seed}")
    shutil.copytree(sample, place / kind)
    (place / "victim").mkdir()
    (place / "victim" / "file").write_text("untouched")
    done = damage(place / kind, rng)
    result = _in_child(lambda: run(kind, place / kind, rng, list(done)), limit=SECONDS)
    kept = sorted(path.name for path in (place / "victim").iterdir())
    if kept != ["file"] or (place / "victim" / "file").read_text() != "untouched":
        result["faults"].append(f"wrote outside of its folder: {kept}")
    return {**result, "done": "; ".join(f"{path.relative_to(place)}: {what}" for path, what in done.items())}


def run(kind: str, folder: Path, rng: random.Random, changed: list[Path]) -> dict[str, Any]:
    """Faults and outcomes of all commands."""
    faults, outcomes = [], []
    for command in KINDS[kind](folder, rng, changed):
        try:
            command()
            outcomes.append("read")
        except BaseException as error:
            code, message = verdict(error)
            outcomes.append("refused" if code in (1, 2) else "failed")
            if isinstance(error, SystemExit) and error.code == 2:
                outcomes[-1] = "refused"
            elif code not in (1, 2):
                faults.append("".join(traceback.format_exception(error)[-6:]).strip().replace("\n", "\n    "))
            elif not 0 < len(message) <= LONGEST or not message.replace("\n", "").isprintable():
                faults.append(f"no message to be read: {ascii(message)[:500]}")
    return {"faults": faults, "outcomes": outcomes}


def _in_child(work: Any, *, limit: float) -> dict[str, Any]:
    """What `work` returns in a forked process, and what that took."""
    began, output = time.monotonic(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(output[0])
        _be_child(work, output[1])
    os.close(output[1])
    with os.fdopen(output[0], "rb") as pipe:
        os.set_blocking(pipe.fileno(), False)
        content = b""
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() - began < limit:
            content += pipe.read() or b""
            time.sleep(0.005)
        if ended == (0, 0):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        content += pipe.read() or b""
    seconds = time.monotonic() - began
    if not content:
        why = f"took more than {limit:.0f} s" if ended == (0, 0) else f"ended with status {ended[1]}"
        return {"faults": [why], "outcomes": ["died"], "seconds": seconds, "bytes": 0}
    return {**json.loads(content), "seconds": seconds}


def _be_child(work: Any, output: int) -> None:
    """Never returns."""
    try:
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        before, mapped = _memory("VmRSS"), _memory("VmSize")
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 2 * MEMORY, mapped + 2 * MEMORY))
        result = work() or {"faults": [], "outcomes": []}
        result["bytes"] = max(_memory("VmHWM") - before, 0)
        if result["bytes"] > MEMORY:
            result["faults"].append(f"took {result['bytes']:,} bytes")
        os.write(output, json.dumps(result).encode())
    except BaseException:
        text = traceback.format_exc()
        os.write(output, json.dumps({"faults": [text], "outcomes": ["died"], "bytes": 0}).encode())
    finally:
        os._exit(0)


def _memory(name: str) -> int:
    """Bytes, of the process now or at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _no_files(folder: str, names: list[str]) -> list[str]:
    """Names that are no files or folders, or made to be endless."""
    paths = [Path(folder, name) for name in names]
    return [path.name for path in paths if not (path.is_dir() or (path.is_file() and path.stat().st_size < 2**28))]


if __name__ == "__main__":
    main()
