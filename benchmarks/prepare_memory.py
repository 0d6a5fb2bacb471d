"""Peak memory of data_prep.py on inputs that are larger than it may hold, for 1 and 2 workers.

    python -m benchmarks.prepare_memory --tokenizer TOKENIZER.json [--megabytes 2000]

The bound is 200 MB a worker + 1 GB for the whole process tree (sum of proportional set sizes, so that shared pages
count once). Inputs: a large JSONL, one text of a quarter of its size without any separator, the same as gzip,
and one line of a tenth of its size, set aside and cut.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.prepare import installed, make_corpus, texts_in, tree_memory


def main() -> None:
    """Print a table of peaks; exit code 1 if one is over its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a tokenizer.json")
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    over = False
    with tempfile.TemporaryDirectory(dir=".") as folder:
        cases = make_inputs(Path(folder), arguments.megabytes * 10**6)
        print(f"{'input':<34}{'workers':>8}{'seconds':>9}{'peak MB':>9}{'bound MB':>10}")
        for (name, flags), workers in itertools.product(cases.items(), arguments.workers):
            output = Path(folder) / f"out-{workers}"
            seconds, peak = run([*flags, "--tokenizer", arguments.tokenizer, "--workers", str(workers)], output)
            bound = 1000 + 200 * workers
            over |= peak > bound
            print(f"{name:<34}{workers:>8}{seconds:>9.1f}{peak:>9,.0f}{bound:>10,}", flush=True)
    raise SystemExit(over)


def make_inputs(folder: Path, size: int) -> dict[str, list[str]]:
    """Write the inputs; the arguments of each case."""
    base = folder / "base.jsonl"
    distinct = make_corpus(base, texts_in(installed()), min(size, 300 * 10**6))
    large, text, line = folder / "large.jsonl", folder / "one.txt", folder / "line.jsonl"
    with large.open("wb") as file:
        for _ in range(-(-size // distinct)):
            file.write(base.read_bytes())
    sample = base.read_bytes()[: size // 10]
    with text.open("wb") as file, gzip.open(f"{text}.gz", "wb", compresslevel=1) as packed:
        for _ in range(5):
            file.write(sample[: size // 20])
            packed.write(sample[: size // 20])
    short = [json.dumps({"text": f"number {number}"}).encode() for number in range(400)]
    long = json.dumps({"text": sample.decode(errors="replace")}).encode()
    line.write_bytes(b"\n".join([*short[:200], long, *short[200:], b""]))
    base.unlink()
    lenient = ["--max-bad", "0.5"]
    return {
        f"{size / 1e6:,.0f} MB of JSONL": [str(large)],
        f"one text of {text.stat().st_size / 1e6:,.0f} MB": [str(text)],
        "the same as gzip": [f"{text}.gz"],
        f"one line of {line.stat().st_size / 1e6:,.0f} MB, set aside": [str(line), *lenient],
        "the same, cut": [str(line), "--long-documents", "cut", "--max-record-bytes", str(size)],
    }


def run(arguments: list[str], output: Path) -> tuple[float, float]:
    """Seconds and peak megabytes of one preparation."""
    command = [sys.executable, "data_prep.py", *arguments, "--encoder", "gigatoken", "--output", str(output)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, tree_memory(process.pid))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"failed: {command}")
    for path in sorted(output.iterdir()):
        path.unlink()
    return time.perf_counter() - began, peak / 1e6


if __name__ == "__main__":
    main()
