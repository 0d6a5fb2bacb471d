"""Preparation speed beside the ways people use today, on the same JSONL and tokenizer, in one run.

    python -m benchmarks.prepare --tokenizer TOKENIZER.json [--text PATH ...] [--megabytes 250] [--workers 1 2]
                                 [--copies 1] [--rounds 1]

Each way runs in processes of its own, one after the other; the memory is the highest sum of the proportional set
sizes (PSS) of its process tree. "encode only" ways get all text in memory as a list and write nothing: they bound
what is possible. The ratio is that of a rate to the first way's. The corpus is real and no file occurs twice, for an
encoder with a cache of words must not meet the same text again: by default it is the sources of all that is installed
beside this project, a document a file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

EOS = "<|endoftext|>"
SLOW_WAY_SECONDS = 60.0
POLL_SECONDS = 0.5  # to look stops the process for a moment
SUFFIXES = frozenset((".py", ".pyi", ".h", ".rst", ".md", ".txt", ".js", ".html"))
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def main() -> None:
    """Make the corpus, run each way, print a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a tokenizer.json of GPT-2's kind")
    parser.add_argument("--text", type=Path, nargs="+", help="files, or folders of them (default: installed sources)")
    parser.add_argument("--megabytes", type=int, default=250)
    parser.add_argument("--copies", type=int, default=1, help="repeat the text so often, to see past the start")
    parser.add_argument("--rounds", type=int, default=1, help="measure so often, one way after the other, for medians")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--way", nargs=4, help=argparse.SUPPRESS)  # the child process: name, corpus, workers, output
    arguments = parser.parse_args()
    if arguments.way:
        name, corpus, workers, output = arguments.way
        WAYS[name](Path(corpus), arguments.tokenizer, int(workers), Path(output))
        return
    with tempfile.TemporaryDirectory(dir=".") as folder:
        corpus = Path(folder) / "corpus.jsonl"
        size = make_corpus(corpus, texts_in(arguments.text or installed()), arguments.megabytes * 10**6)
        size *= arguments.copies
        corpus.write_bytes(corpus.read_bytes() * arguments.copies)
        os.sync()  # nothing else is being written when the first way begins
        print(f"{size / 1e6:,.0f} MB of text in {corpus.stat().st_size / 1e6:,.0f} MB of JSONL, {os.cpu_count()} cores")
        print(f"{'way':<26}{'workers':>8}{'seconds':>9}{'MB/s':>8}{'Mtok/s':>8}{'peak MB':>9}{'ratio':>9}")
        rates: dict[tuple[int, str], list[float]] = defaultdict(list)
        runs = list(product(arguments.workers, arguments.only))
        for workers, name in runs * arguments.rounds:
            output = Path(folder) / "output" / WAYS[name].__name__
            output.parent.mkdir()
            seconds, tokens, encoded, peak = measure(name, corpus, arguments.tokenizer, workers, output)
            shutil.rmtree(output.parent)
            rate = (encoded or size) / 1e6 / seconds
            rates[workers, name].append(rate)
            ratio = rate / rates[workers, arguments.only[0]][-1]
            speed = f"{seconds:>9.1f}{rate:>8.1f}{tokens / 1e6 / seconds:>8.2f}{peak / 2**20:>9,.0f}{ratio:>9.3f}"
            print(f"{name:<26}{workers:>8}{speed}", flush=True)
        for workers, name in runs if arguments.rounds > 1 else ():
            rate = median(rates[workers, name])
            ratio = rate / median(rates[workers, arguments.only[0]])
            print(f"{name:<26}{workers:>8}{'median':>9}{rate:>8.1f}{ratio:>26.3f}")


def installed() -> list[Path]:
    """Text that every machine with this project has: what is installed with it."""
    return sorted({Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))})


def texts_in(paths: list[Path]) -> list[Path]:
    """The files among `paths`, and those below the folders that by their names are text."""
    found = [path for path in paths if path.is_file()]
    for folder in paths:
        found += [path for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES and path.is_file()]
    return found


def make_corpus(path: Path, texts: list[Path], size: int) -> int:
    """Write the distinct ones of `texts`, in random order, as JSON lines until `size` bytes; the bytes of text."""
    random.Random(1).shuffle(texts)
    written, seen = 0, set()
    with path.open("w", encoding="utf-8") as file:
        for source in texts:
            content = source.read_bytes()
            if written >= size or not 100 < len(content) < 2**20 or hash(content) in seen:
                continue
            seen.add(hash(content))
            text = content.decode(errors="replace")
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
    return written


def measure(name: str, corpus: Path, tokenizer: str, workers: int, output: Path) -> tuple[float, int, int, int]:
    """Seconds as the way reports them, tokens, bytes of text (0: all of it), peak memory of the process tree."""
    command = [sys.executable, "-m", "benchmarks.prepare", "--tokenizer", tokenizer]
    command += ["--way", name, str(corpus), str(workers), str(output)]
    threads = {"RAYON_NUM_THREADS": str(workers), "TOKENIZERS_PARALLELISM": "true"}
    environment = {**os.environ, **threads, "HF_DATASETS_CACHE": f"{output}.cache"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # by default, modules are compiled once
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    peak = 0
    while process.poll() is None:
        peak = max(peak, tree_memory(process.pid))
        time.sleep(POLL_SECONDS)
    assert process.stdout is not None, "it was piped"
    assert process.returncode == 0, f"{name} failed"
    report = json.loads(process.stdout.read().splitlines()[-1])
    return report["seconds"], report["tokens"], report["bytes"], peak


def tree_memory(pid: int) -> int:
    """Proportional set size of a process and all below it, bytes: shared pages are counted once."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (psutil.Error, OSError):
        pass  # one of them ended meanwhile
    return total


def report(tokens: int, *, seconds: float, encoded: int = 0) -> None:
    """What a way tells the process that measures it; `encoded`: bytes of text, where that was not all."""
    print(json.dumps({"tokens": tokens, "seconds": seconds, "bytes": encoded}))


def ours(corpus: Path, tokenizer: str, workers: int, output: Path) -> None:
    """data_prep.py as a user runs it, the start of Python included."""
    command = [sys.executable, "data_prep.py", str(corpus), "--output", str(output), "--tokenizer", tokenizer]
    began = time.perf_counter()
    subprocess.run([*command, "--workers", str(workers)], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    manifest = json.loads((output / "manifest.json").read_text())
    report(sum(shard["tokens"] for shards in manifest["splits"].values() for shard in shards), seconds=seconds)


def datasets_map(corpus: Path, tokenizer: str, workers: int, output: Path) -> None:
    """`datasets.map` with tiktoken, then a memory-mapped file written in batches, as nanoGPT prepares OpenWebText."""
    began = time.perf_counter()
    import datasets

    encoding = gpt2_of_tiktoken(tokenizer)
    rows = datasets.load_dataset("json", data_files=str(corpus), split="train")

    def encode(row: dict[str, str]) -> dict[str, object]:
        ids = encoding.encode_ordinary(row["text"])
        ids.append(50256)
        return {"ids": ids, "len": len(ids)}

    encoded = rows.map(encode, remove_columns=["text"], num_proc=workers)
    total = int(np.sum(encoded["len"], dtype=np.uint64))
    out = np.memmap(output, dtype=np.uint16, mode="w+", shape=(total,))
    place, shards = 0, min(1024, len(encoded))
    for number in range(shards):
        batch = encoded.shard(num_shards=shards, index=number, contiguous=True).with_format("numpy")
        ids = np.concatenate(batch["ids"])
        out[place : place + len(ids)] = ids
        place += len(ids)
    out.flush()
    report(total, seconds=time.perf_counter() - began)


def gpt2_of_tiktoken(tokenizer: str) -> Any:
    """A tiktoken encoding with the vocabulary of a GPT-2 `tokenizer.json`, which needs no download."""
    import tiktoken

    vocabulary = json.loads(Path(tokenizer).read_text(encoding="utf-8"))["model"]["vocab"]
    spare = iter(range(256, 512))
    stand_ins = {
        chr(value) if 33 <= value <= 126 or 161 <= value <= 172 or 174 <= value <= 255 else chr(next(spare)): value
        for value in range(256)
    }
    end = {EOS: vocabulary.pop(EOS, len(vocabulary))}
    ranks = {bytes(stand_ins[symbol] for symbol in word): rank for word, rank in vocabulary.items()}
    return tiktoken.Encoding(name="gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=end)


def texts_of(corpus: Path) -> Iterator[str]:
    """All documents."""
    with corpus.open("rb") as file:
        yield from (json.loads(line)["text"] for line in file)


def tokenizers_only(corpus: Path, tokenizer: str, workers: int, output: Path) -> None:
    """Encode only, with `tokenizers`: for a minute, which tells its rate."""
    from tokenizers import Tokenizer

    loaded, texts = Tokenizer.from_file(tokenizer), list(texts_of(corpus))
    began, tokens, encoded, seconds = time.perf_counter(), 0, 0, 0.0
    for start in range(0, len(texts), 1000):
        batch = texts[start : start + 1000]
        tokens += sum(len(e) for e in loaded.encode_batch_fast(batch, add_special_tokens=False))
        encoded += sum(len(text.encode()) for text in batch)
        seconds = time.perf_counter() - began
        if seconds > SLOW_WAY_SECONDS:
            break
    report(tokens, seconds=seconds, encoded=encoded)


def gigatoken_only(corpus: Path, tokenizer: str, workers: int, output: Path) -> None:
    """Encode only, with gigatoken in its fastest form: bytes in, flat arrays out."""
    import gigatoken

    definition = json.loads(Path(tokenizer).read_text(encoding="utf-8"))
    definition["added_tokens"] = []
    loaded, texts = gigatoken.Tokenizer.from_json(json.dumps(definition)), [text.encode() for text in texts_of(corpus)]
    began, tokens = time.perf_counter(), 0
    for start in range(0, len(texts), 1000):
        found = loaded.encode_batch(texts[start : start + 1000], parallel=workers > 1)
        tokens += len(found.layout.content.data)
    report(tokens, seconds=time.perf_counter() - began)


WAYS: dict[str, Callable[[Path, str, int, Path], None]] = {
    "data_prep.py": ours,
    "datasets.map + tiktoken": datasets_map,
    "gigatoken, encode only": gigatoken_only,
    "tokenizers, encode only": tokenizers_only,
}

if __name__ == "__main__":
    main()
