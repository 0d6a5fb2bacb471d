"""What the commands do with files, without their command lines: every way in which each kind is read.

In: a folder of one kind and the files in it that were changed. Out: nothing, or the error that a user would meet. Each
function yields the commands that read such a folder one by one, so that one that is refused does not hide the next.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import sample
from pipeline import status
from pipeline.cli import read_command
from pipeline.config import resolved
from pipeline.data.dataset import Dataset, open_dataset
from pipeline.data.deleting.contamination import check_contamination
from pipeline.data.deleting.dedup import deduplicate
from pipeline.data.exchange.export_llmc import export_llmc
from pipeline.data.exchange.foreign import open_foreign
from pipeline.data.loading.rows import Concat, Pack
from pipeline.data.preparing.audit import inspect, verify
from pipeline.data.preparing.prepare import prepare
from pipeline.data.preparing.request import Request
from pipeline.data.tokenizer import TextTokenizer, load_tokenizer
from pipeline.explain import read_course
from pipeline.export import export
from pipeline.generate.decode import Options
from pipeline.generate.text import write
from pipeline.model.transformer import build_model
from pipeline.train.optim import build_optimizer
from pipeline.train.reporting.metrics import Record, read_record
from pipeline.train.saving.checkpoint import (
    load_model,
    newest_intact,
    read_config,
    read_state,
    resolve_checkpoint,
    restore,
)
from tests.fuzz.mutate import sign_checkpoint, sign_dataset

Command = Callable[[], Any]
QUIET = Console(quiet=True)
OPTIONS = Options(max_new_tokens=4)


def dataset(folder: Path, rng: random.Random, changed: Collection[Path]) -> Iterator[Command]:
    data = folder / "data"
    if rng.random() < 0.5:
        sign_dataset(data)
    yield lambda: read_rows(open_dataset(data))
    yield lambda: inspect(data)
    yield lambda: verify(data)
    yield lambda: export_llmc(data, folder / "export", split="train")
    yield lambda: deduplicate(data, method="near", threshold=0.7, executor=None, console=QUIET)
    yield lambda: deduplicate(data, method="exact", executor=None, console=QUIET)
    files = [folder / "questions.jsonl"]
    yield lambda: check_contamination(data, files, delete=True, text_key="text", executor=None, console=QUIET)
    request = Request(inputs=(str(folder / "data.jsonl"),), output=data, tokenizer="train:300", val_fraction=0.2)
    yield lambda: prepare(request, console=QUIET)
    yield lambda: (data / "manifest.json").unlink(missing_ok=True)  # as if it had been interrupted
    yield lambda: prepare(request, console=QUIET)


def read_rows(data: Dataset) -> None:
    """Rows of all plans, where they come from, and the lengths and texts of documents."""
    for name in ("train", "val"):
        split = data.split(name)  # type: ignore[arg-type]
        for plan in (Concat(split, context_length=32), Pack(split, context_length=32, key=1)):
            rows = np.arange(min(plan.all_rows, 200))
            if len(rows):
                plan.read(rows, np.zeros_like(rows), documents=True)
                for span in plan.spans(len(rows) - 1, 0):
                    split.describe(span.document)
        int(split.lengths.sum())
        int(split.text_bytes)


def checkpoint(folder: Path, rng: random.Random, changed: Collection[Path]) -> Iterator[Command]:
    run = folder / "run"
    if rng.random() < 0.7:
        for each in (run / "checkpoints").iterdir():
            sign_checkpoint(each)
    yield lambda: generate(str(run))
    yield lambda: newest_intact(run / "checkpoints", warn=lambda text: None)
    yield lambda: resume(run)
    yield lambda: export(resolve_checkpoint(run), folder / "exported")
    yield lambda: explain(run)
    yield lambda: status.read_status(run)
    yield lambda: records(run)


def generate(source: str) -> None:
    model, tokenizer, ends = sample.load(source, device=torch.device("cpu"))
    for _ in write(model, tokenizer, ["abc", ""], options=OPTIONS, eos_ids=ends):
        pass


def resume(run: Path) -> None:
    place = resolve_checkpoint(run)
    config, state = read_config(place), read_state(place)
    load_model(place, device=torch.device("cpu"))  # refuses sizes that nothing of this process may take
    model = build_model(config.model, n_tokens=state.n_tokens)
    restore(place, model=model, optimizer=build_optimizer(model, config.optim))
    resolved(config)
    state.rows_of(1)


def explain(run: Path) -> None:
    course = read_course(run)
    for step in (1, 3):
        course.describe(course.rows(step)[:4])


def records(run: Path) -> None:
    read_record(run / "metrics.jsonl")
    Record(run / "metrics.jsonl").cut_after(3, evaluated=False)


def hf(folder: Path, rng: random.Random, changed: Collection[Path]) -> Iterator[Command]:
    for path in {path.parent for path in changed}:
        yield lambda path=path: generate(str(path))


def foreign(folder: Path, rng: random.Random, changed: Collection[Path]) -> Iterator[Command]:
    tokenizer = str(folder / "tokenizer.json")
    yield lambda: read_rows(open_foreign(str(folder / "megatron"), tokenizer=tokenizer, val_fraction=0.2))
    yield lambda: read_rows(open_foreign(str(folder / "llmc.bin"), tokenizer=tokenizer))
    yield lambda: read_rows(open_foreign(str(folder / "nano"), tokenizer=tokenizer, dtype="uint16"))


def corpus(folder: Path, rng: random.Random, changed: Collection[Path]) -> Iterator[Command]:
    for path in changed:
        output = folder.parent / "prepared" / path.name
        request = Request(inputs=(str(path),), output=output, tokenizer="bytes", max_bad=1.0, allow_failed=True)
        yield lambda request=request: prepare(request, console=QUIET)


def tokenizer(folder: Path, rng: random.Random, changed: Collection[Path]) -> Iterator[Command]:
    for path in changed:
        yield lambda path=path: use(load_tokenizer(str(path)))


def use(tokenizer: TextTokenizer) -> None:
    """Text to ids and back, at once and one by one."""
    tokenizer = tokenizer.ending_documents(origin="file")
    for text in ("line 7 of a text", "", "\0\U0010ffff é", "<|endoftext|></s>"):
        tokenizer.decode(tokenizer.encode(text))
    stream = tokenizer.stream()
    for number in range(min(tokenizer.vocab_size, 300)):
        stream.push(number)
    assert len(tokenizer.fingerprint) == 64


def config(folder: Path, rng: random.Random, changed: Collection[Path]) -> Iterator[Command]:
    path = str(folder / "config.yaml")
    yield lambda: json.dumps(resolved(read_command([path])[0]))
    yield lambda: read_command([path, "--train.steps", "7", "--data.sources.0.weight", "2"])


KINDS: dict[str, Callable[[Path, random.Random, Collection[Path]], Iterator[Command]]] = {
    "dataset": dataset,
    "checkpoint": checkpoint,
    "hf": hf,
    "foreign": foreign,
    "corpus": corpus,
    "tokenizer": tokenizer,
    "config": config,
}
