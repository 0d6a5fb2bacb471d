"""Turn a corpus into a dataset of token shards that pretrain.py trains on.

python data_prep.py INPUT... --output DIR      prepare; run it again to go on after any interruption
python data_prep.py --inspect DIR              show what a dataset holds
python data_prep.py --verify DIR               prove that it is whole
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from pipeline.data.audit import inspect, verify
from pipeline.data.formats import TextRules
from pipeline.data.manifest import Manifest
from pipeline.data.prepare import prepare
from pipeline.data.request import Request
from pipeline.errors import UserError, run_command

_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\0": "\0"}


def main() -> None:
    """Prepare, inspect or verify, as the flags say."""
    arguments = parse(sys.argv[1:])
    console = Console(soft_wrap=True, highlight=False)
    if arguments.inspect:
        console.print(inspect(arguments.inspect), markup=False)
    elif arguments.verify:
        console.print(verify(arguments.verify), markup=False)
    else:
        request = request_of(arguments)
        manifest = prepare(request, console=console)
        console.print(summary(request.output, manifest), markup=False)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line; `--help` is its documentation."""
    parser = argparse.ArgumentParser(
        prog="data_prep.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="files, folders, globs, hf:NAME[:CONFIG][@REVISION], saved datasets")
    add("--output", type=Path, metavar="DIR", help="folder of the dataset, made if missing")
    add("--tokenizer", default="gpt2", help="hub name, tokenizer.json, train:N, chars or bytes (default: gpt2)")
    add(
        "--val-fraction", type=float, metavar="F", help="held out for validation (default: 0.005, of few documents 0.1)"
    )
    add("--workers", type=int, default=1, metavar="N", help="processes; the result is the same for any N (default: 1)")
    add("--text-key", default="text", metavar="K", help="key or column that holds the text (default: text)")
    add("--exclude", nargs="+", default=[], metavar="GLOB", action="extend", help="leave out files that match")
    add("--text-separator", metavar="S", help=r"cuts plain text files into documents; \n and \t are understood")
    add("--seed", type=int, default=1337, metavar="N", help="decides which documents are held out (default: 1337)")
    add("--eos", metavar="TOKEN", help="token that ends a document (default: the tokenizer's own)")
    add("--max-bad", type=float, default=0.01, metavar="F", help="bad records tolerated (default: 0.01 of all)")
    add("--inspect", type=Path, metavar="DIR", help="show what a dataset holds, and samples of it")
    add("--verify", type=Path, metavar="DIR", help="check every byte of a dataset")
    return parser.parse_intermixed_args(arguments)


def request_of(arguments: argparse.Namespace) -> Request:
    """The request that the flags describe."""
    if not arguments.inputs:
        raise UserError("nothing to prepare: name files, folders, globs or hf:NAME; see --help")
    if arguments.output is None:
        raise UserError("--output DIR is missing: where to write the dataset")
    separator = arguments.text_separator
    for spelled, meant in _ESCAPES.items() if separator is not None else ():
        separator = separator.replace(spelled, meant)
    return Request(
        inputs=tuple(arguments.inputs),
        output=arguments.output.expanduser(),
        tokenizer=arguments.tokenizer,
        val_fraction=arguments.val_fraction,
        workers=arguments.workers,
        rules=TextRules(key=arguments.text_key, separator=separator),
        exclude=tuple(arguments.exclude),
        seed=arguments.seed,
        eos=arguments.eos,
        max_bad=arguments.max_bad,
    )


def summary(output: Path, manifest: Manifest) -> str:
    """What was made, in plain lines, and what to do next."""
    lines = []
    for split in manifest.splits:
        documents, tokens = manifest.total(split, "documents"), manifest.total(split, "tokens")
        text = manifest.total(split, "text_bytes")
        ratio = f", {text / (tokens - documents):.3f} bytes/token" if tokens > documents else ""
        lines.append(f"{split}: {documents:,} documents, {tokens:,} tokens, {text:,} bytes of text{ratio}")
    lines.append(f"split: {manifest.split_rule}")
    lines.append(f"tokenizer: {manifest.vocab_size:,} tokens, {manifest.dtype}, EOS {manifest.eos_id}")
    for reason, count in manifest.drops.items():
        lines.append(f"dropped: {count:,} x {reason} (see {output / 'quarantine.jsonl'})")
    lines.append(f"dataset: {output}, digest {manifest.data_digest[:16]}")
    lines.append(f"next: python pretrain.py configs/NAME.yaml --data.path {output}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
