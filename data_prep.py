"""Turn a corpus into a dataset of token shards that pretrain.py trains on.

python data_prep.py INPUT... --output DIR      prepare; run it again to go on after any interruption
python data_prep.py --output DIR --dedup near  delete repeated documents of a dataset, without preparing it again
python data_prep.py --inspect DIR              show what a dataset holds
python data_prep.py --verify DIR               prove that it is whole
python data_prep.py --export DIR --output OUT  write it in the format of llm.c

Exit code 0: done; 1: done but for the units named; 2: a mistake to mend, told in one message; 75: stopped, to be
continued.
"""

from __future__ import annotations

import signal
import sys
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

from pipeline.data.preparing.flags import Arguments, answer_at_once, parse
from pipeline.errors import counted, printable, run_command

if __name__ == "__main__":
    run_command(partial(answer_at_once, __doc__))

from rich.console import Console

from pipeline.data.deleting.contamination import check_contamination, evaluation_sources
from pipeline.data.deleting.dedup import deduplicate
from pipeline.data.exchange.export_llmc import export_llmc
from pipeline.data.manifest import SPLITS, Manifest, read_manifest
from pipeline.data.preparing.audit import inspect, verify
from pipeline.data.preparing.decide import rehearse
from pipeline.data.preparing.endings import stopped
from pipeline.data.preparing.executors import open_place
from pipeline.data.preparing.prepare import prepare
from pipeline.data.preparing.request import request_of
from pipeline.data.preparing.unit import UNKNOWN_TOKENS
from pipeline.data.reading.formats import EMPTY, with_remedy
from pipeline.locks import locked


def main() -> None:
    """Do what the flags say."""
    arguments = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: keep what is done, say how to go on
    console = Console(soft_wrap=True, highlight=False)
    dataset = arguments.dataset
    if dataset.inspect:
        seed = arguments.validation.seed if "seed" in arguments.given() else None
        console.print(inspect(dataset.inspect, excerpts_of_each=dataset.excerpts, seed=seed), markup=False)
    elif dataset.verify:
        console.print(verify(dataset.verify), markup=False)
    elif dataset.export:
        export(dataset.export, arguments.folder, console)
    elif arguments.dry_run:
        rehearse(request_of(arguments), console=console)
    elif not arguments.deletes_only:
        check_evaluation_files(arguments)  # before hours of work, not after
        made = prepare(request_of(arguments), console=console)
        if made is None:
            console.print("this share is done; the same command without --share completes the dataset", markup=False)
            return
        finish(arguments, made, console)
    else:
        check_evaluation_files(arguments)
        finish(arguments, read_manifest(arguments.folder), console)


def check_evaluation_files(arguments: Arguments) -> None:
    """Refuse evaluation files that are missing or lack the text key."""
    for file in arguments.deletions.contamination or ():
        evaluation_sources(str(file), arguments.documents.text_key)


def finish(arguments: Arguments, manifest: Manifest, console: Console) -> None:
    """Delete what the flags ask to be deleted, and sum up."""
    output = arguments.folder
    if arguments.deletions.dedup or arguments.deletions.contamination is not None:
        place = open_place(arguments.work.executor, arguments.work.workers)
        try:
            with locked(output, ask_of_other_hosts=True), place.open() as executor:
                manifest = deletions(arguments, manifest, executor, console)
        except KeyboardInterrupt:
            raise stopped("the dataset is whole, each of these deletions is done or not begun") from None
    console.print(printable(summary(output, manifest)), markup=False)


def deletions(arguments: Arguments, manifest: Manifest, executor: Executor, console: Console) -> Manifest:
    """Mark repeated and contaminated documents as deleted."""
    output, flags = arguments.folder, arguments.deletions
    if flags.dedup:
        manifest = deduplicate(
            output, method=flags.dedup, threshold=flags.near_threshold, executor=executor, console=console
        )
    if flags.contamination is not None:
        manifest = check_contamination(
            output,
            flags.contamination,
            delete=flags.delete_contaminated,
            text_key=arguments.documents.text_key,
            executor=executor,
            console=console,
        )
    return manifest


def export(folder: Path, output: Path, console: Console) -> None:
    """Write every split that has tokens."""
    manifest = read_manifest(folder)
    for split in SPLITS:
        if manifest.total(split, "tokens"):
            for path in export_llmc(folder, output, split=split):
                console.print(f"wrote {path}", markup=False)


def summary(output: Path, manifest: Manifest) -> str:
    """What was made, in plain lines, and what to do next."""
    lines = []
    for split in manifest.splits:
        documents, tokens = manifest.total(split, "documents"), manifest.total(split, "tokens")
        text = manifest.total(split, "text_bytes")
        ratio = f", {text / (tokens - documents):.3f} bytes/token" if tokens > documents else ""
        held = f"{counted(documents, 'document')}, {counted(tokens, 'token')}, {counted(text, 'byte')} of text"
        lines.append(f"{split}: {held}{ratio}")
    lines.append(f"split: {manifest.split_rule}")
    around = f"a document is the ids of its text and EOS {manifest.eos_id}, nothing else is added"
    lines.append(f"tokenizer: {manifest.vocab_size:,} tokens, {manifest.dtype}; {around}")
    for reason, count in manifest.drops.items():
        seen = "" if reason == EMPTY else f", see {output / 'quarantine.jsonl'}"
        lines.append(f"dropped: {count:,} x {with_remedy(reason)}{seen}")
    all_tokens = sum(manifest.total(split, "tokens") for split in manifest.splits)
    for what, count in manifest.noticed.items():
        rate = f", {count / all_tokens:.2%} of all" if what == UNKNOWN_TOKENS else ""
        lines.append(f"noticed: {count:,} x {what}{rate}")
    lines += [f"failed: unit {unit.unit}: {unit.reason}" for unit in manifest.failed]
    if manifest.deduplication:
        found = manifest.deduplication
        lines.append(f"deleted: {found.exact.documents:,} equal and {found.near.documents:,} near copies")
    if manifest.contamination:
        state = "deleted" if manifest.contamination.deleted else "kept"
        lines.append(f"contaminated: {counted(manifest.contamination.documents, 'training document')}, {state}")
    lines.append(f"dataset: {output}, digest {manifest.data_digest[:16]}")
    run = f"--data.path {output} --run-dir runs/{output.resolve().name}"
    lines.append(f"next: python pretrain.py configs/quickstart.yaml {run}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
