"""Everything that only a GPU can show, in one call of some minutes; and the same on a CPU with tiny shapes.

    python data_prep.py TEXT --output data/gpu --tokenizer train:50257 --val-fraction 0.01     some 10 M tokens
    python -m benchmarks.gpu --data data/gpu --out gpu-results [--only STAGE ...] [--seconds 480]
    python -m benchmarks.gpu --smoke --out gpu-results                                          tiny shapes, on a CPU

In: a prepared dataset. Out: `results.jsonl` with one object per stage, `table.md`, and `log.txt` with what all stages
printed. Each stage is a process of its own with a time limit, so that one that fails or hangs takes no other with it;
those that measure no time run together. Exit code 1 when a stage failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.gpu_runs import ROOT, Place


@dataclass(frozen=True)
class Stage:
    """A function of gpu_stages.py and its limit in seconds. timed: it measures time, so it runs alone."""

    name: str
    limit: int
    timed: bool = True


STAGES = (
    Stage("hardware", 40),
    Stage("train_124m", 100),
    Stage("resume", 120, timed=False),
    Stage("parity", 100, timed=False),
    Stage("torchrun", 100, timed=False),
    Stage("tests", 120, timed=False),
    Stage("generation", 70),
    Stage("train_1558m", 110),
    Stage("plain_40", 90),
    Stage("train_124m_bf16", 90),
    Stage("trainer", 100),
    Stage("plain_12", 90),
    Stage("attention", 60),
    Stage("profile", 60),
)


def main() -> None:
    """Run the stages asked for, or one of them where this process is to be that stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a dataset with a vocabulary of 50,257 (smoke: made if not given)")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--only", nargs="+", choices=[stage.name for stage in STAGES], metavar="STAGE")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no stage that could end after that")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        run_stage(arguments.stage, Place(arguments.data, arguments.out, arguments.smoke))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-") as work:
        place = Place(arguments.data or smoke_dataset(Path(work)), Path(work), arguments.smoke)
        failed = run_stages(place, arguments.out, only=arguments.only, until=perf_counter() + arguments.seconds)
    raise SystemExit(1 if failed else 0)


def run_stages(place: Place, out: Path, *, only: list[str] | None, until: float) -> bool:
    """Run stages in order, neighbours that measure no time together; whether one failed."""
    results: list[dict[str, Any]] = []
    stages = [stage for stage in STAGES if only is None or stage.name in only]
    run = partial(start, place=place, out=out, until=until)
    for timed, group in groupby(stages, key=lambda stage: stage.timed):
        with ThreadPoolExecutor(1 if timed or place.smoke else None) as pool:
            results += pool.map(run, group)
    table = render(results)
    (out / "table.md").write_text(table, encoding="utf-8")
    print(table)
    return any(not result["ok"] for result in results)


def start(stage: Stage, *, place: Place, out: Path, until: float) -> dict[str, Any]:
    """Run one stage as a process; append its result to results.jsonl and its output to log.txt."""
    result: dict[str, Any] = {"stage": stage.name, "ok": False}
    limit = min(stage.limit, until - perf_counter())
    if limit < stage.limit / 4:
        result["error"] = "no time left"
        return _written(result, out)
    command = [sys.executable, "-m", "benchmarks.gpu", "--stage", stage.name, "--data", str(place.data)]
    command += ["--out", str(place.work), *(["--smoke"] if place.smoke else [])]
    log, began = place.work / f"{stage.name}.log", perf_counter()
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(place.work / "inductor"), "HF_HUB_OFFLINE": "1", **os.environ}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=cache, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        with suppress(ProcessLookupError):  # what it started and left, too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    figures = place.work / f"{stage.name}.json"
    if figures.exists():
        result |= json.loads(figures.read_text(encoding="utf-8"))
    elif code is None:
        result["error"] = f"not done after {limit:.0f} s"
    else:
        result["error"] = f"exit code {code}"
    result["seconds"] = round(perf_counter() - began, 1)
    text = log.read_text(encoding="utf-8", errors="replace")
    with (out / "log.txt").open("a", encoding="utf-8") as file:
        file.write(f"===== {stage.name}\n{text}\n")
    if not result["ok"]:
        print(f"===== {stage.name}: {result['error']}\n" + "\n".join(text.splitlines()[-25:]), flush=True)
    return _written(result, out)


def run_stage(name: str, place: Place) -> None:
    """Be one stage: leave its figures, or its error, in a file."""
    from benchmarks import gpu_stages

    try:
        result = {"ok": True, "figures": getattr(gpu_stages, name)(place)}
    except Exception as error:  # told in the table; the other stages go on
        traceback.print_exc()
        result = {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
    (place.work / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")


def smoke_dataset(work: Path) -> Path:
    """A small dataset of this project's own sources."""
    folder = work / "data"
    command = [sys.executable, "data_prep.py", "pipeline/**/*.py", "--output", str(folder), "--tokenizer", "train:512"]
    subprocess.run([*command, "--val-fraction", "0.1", "--workers", "1"], cwd=ROOT, check=True, capture_output=True)
    return folder


def render(results: list[dict[str, Any]]) -> str:
    """A Markdown table of all figures."""
    lines = ["| stage | s | figure | value |", "|---|---|---|---|"]
    for result in results:
        figures = result["figures"] if result["ok"] else {"failed": result["error"].splitlines()[0]}
        for number, (name, value) in enumerate(figures.items()):
            head = f"{result['stage']} | {result.get('seconds', '')}" if number == 0 else " | "
            lines.append(f"| {head} | {name} | {value} |")
    return "\n".join(lines) + "\n"


def _written(result: dict[str, Any], out: Path) -> dict[str, Any]:
    with (out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    print(f"{result['stage']}: {'ok' if result['ok'] else 'FAILED'} {result.get('seconds', '')}", flush=True)
    return result


if __name__ == "__main__":
    main()
