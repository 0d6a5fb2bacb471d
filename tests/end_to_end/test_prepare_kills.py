"""Preparation under `kill -9` at random instants: of the coordinator, of a worker.

Eight kills in the suite; any number by hand: `python -m tests.end_to_end.test_prepare_kills 50`.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKERS = 2
SCRIPT = """
import sys
from pathlib import Path
from rich.console import Console
import pipeline.data.preparing.prepare as prepare
from pipeline.data.reading.formats import TextRules
from pipeline.data.preparing.request import Request
from pipeline.data.preparing.unit import prepare_unit

def noted(unit, *, settings, on_batch=None):
    with Path(sys.argv[4]).open("a") as file:
        file.write(unit.name + "\\n")
    return prepare_unit(unit, settings)

if __name__ == "__main__":
    prepare.prepare_unit = noted
    prepare.prepare(Request(inputs=(sys.argv[1],), output=Path(sys.argv[2]), tokenizer="bytes", val_fraction=0.1,
                            rules=TextRules(unit_bytes=20_000), workers=int(sys.argv[3])), console=Console(quiet=True))
"""


def make_corpus(folder: Path) -> None:
    """Plain files, small ones, and a stream that is cut into units."""
    folder.mkdir()
    lines = [json.dumps({"text": f"Document {i}: {'some words ' * (i % 40)}{i * i}"}) + "\n" for i in range(12_000)]
    for number in range(3):
        (folder / f"{number}.jsonl").write_text("".join(lines[number * 3000 : (number + 1) * 3000]))
    (folder / "3.jsonl.gz").write_bytes(gzip.compress("".join(lines[9000:]).encode()))


def begin(corpus: Path, output: Path, *, workers: int = WORKERS) -> subprocess.Popen[bytes]:
    script = corpus.parent / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(corpus), str(output), str(workers), str(corpus.parent / "begun")]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    """Pids of the worker processes; the helper that spawn starts beside them is none."""
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "spawn_main"], check=False, capture_output=True, text=True
    )
    return [int(pid) for pid in found.stdout.split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def digest(output: Path) -> str:
    found: str = json.loads((output / "manifest.json").read_text())["data_digest"]
    return found


def kill_at_random(folder: Path, kills: int, *, seed: int) -> tuple[int, int, int]:
    """Kill so often, begin again each time; (kills of the coordinator, of workers, units done again)."""
    rng = random.Random(seed)
    corpus = folder / "corpus"
    make_corpus(corpus)
    assert begin(corpus, folder / "whole", workers=1).wait() == 0
    wanted = digest(folder / "whole")
    begun = folder / "begun"
    begun.unlink()
    done, again, whom = 0, 0, Counter[str]()
    while done < kills:
        output = folder / f"killed-{done}"
        code = None
        while code != 0:
            process = begin(corpus, output)
            before = begun.stat().st_size if begun.exists() else 0
            while process.poll() is None and (begun.stat().st_size if begun.exists() else 0) == before:
                time.sleep(0.005)
            time.sleep(rng.random() * 0.4)
            victims = workers_of(process)
            if done < kills and process.poll() is None:
                if rng.random() < 0.5 and victims:
                    os.kill(rng.choice(victims), signal.SIGKILL)
                    whom["worker"] += 1
                else:
                    process.kill()
                    whom["coordinator"] += 1
                done += 1
            code = process.wait()
            deadline = time.monotonic() + 30
            while any(map(alive, victims)):
                assert time.monotonic() < deadline, "workers outlive their coordinator"
                time.sleep(0.01)
        assert digest(output) == wanted
        counts = Counter(begun.read_text().split())
        again += sum(count - 1 for count in counts.values())
        begun.unlink()
    return whom["coordinator"], whom["worker"], again


@pytest.mark.slow
def test_any_kill_costs_at_most_a_unit_a_worker(tmp_path: Path) -> None:
    coordinator, worker, again = kill_at_random(tmp_path, 8, seed=3)
    assert coordinator + worker == 8
    assert again <= 8 * WORKERS


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        first, second, repeated = kill_at_random(Path(temporary), int(sys.argv[1]), seed=int(time.time()))
        print(f"killed the coordinator {first} times, a worker {second}: same digest, {repeated} units done again")
