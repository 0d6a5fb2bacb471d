"""The command line of data_prep.py.

In: its arguments. Out: a namespace, and the `Request` that it describes. `--help` is its documentation.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from pipeline.data.preparing.request import Request
from pipeline.data.reading.formats import TextRules
from pipeline.errors import UserError

_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\0": "\0"}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def parse(arguments: list[str], *, description: str | None) -> argparse.Namespace:
    """Parse the command line of the script that describes itself so."""
    parser = argparse.ArgumentParser(
        prog="data_prep.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="files, folders, globs, hf:NAME[:CONFIG][@REVISION], saved datasets")
    add("--output", type=Path, metavar="DIR", help="folder of the dataset, made if missing")
    add("--dry-run", action="store_true", help="only say what it would come to: units, tokens, disk, time")
    _add_text_flags(parser)
    _add_work_flags(parser)
    _add_dataset_flags(parser)
    return parser.parse_intermixed_args(arguments)


def _add_text_flags(parser: argparse.ArgumentParser) -> None:
    """What is a document, and what becomes of it."""
    add = parser.add_argument_group("tokens").add_argument
    add(
        "--tokenizer",
        default="gpt2",
        help="hub name, tokenizer.json, FILE.tiktoken, train:N, chars or bytes (default: gpt2)",
    )
    add("--eos", metavar="TOKEN", help="token that ends a document (default: the tokenizer's own)")
    add("--encoder", choices=("auto", "gigatoken", "tokenizers"), default="auto",
        help="auto: gigatoken where it is proven to give the ids of `tokenizers` (default)")  # fmt: skip

    add = parser.add_argument_group("documents").add_argument
    add("--text-key", default="text", metavar="K", help="key or column that holds the text (default: text)")
    add("--text-separator", metavar="S", help=r"cuts plain text files into documents; \n and \t are understood")
    add("--exclude", nargs="+", default=[], metavar="GLOB", action="extend", help="leave out files that match")
    add("--max-doc-bytes", type=_size, default=TextRules.max_document_bytes, metavar="N[K|M|G]",
        help="longest document (default: 64M)")  # fmt: skip
    add("--long-documents", choices=("quarantine", "cut"), default="quarantine",
        help="what becomes of longer ones: set aside, or cut at white space (default: quarantine)")  # fmt: skip
    add("--invalid-utf8", choices=("quarantine", "replace"), default="quarantine",
        help="what becomes of documents with bad bytes: set aside, or to U+FFFD (default: quarantine)")  # fmt: skip

    add = parser.add_argument_group("validation").add_argument
    add("--val-fraction", type=float, metavar="F",
        help="held out for validation (default: 0.005; more of small corpora)")  # fmt: skip
    add(
        "--val-input",
        nargs="+",
        default=[],
        metavar="INPUT",
        action="extend",
        help="these inputs are the validation split",
    )
    add("--seed", type=int, default=1337, metavar="N", help="decides which documents are held out (default: 1337)")


def _add_work_flags(parser: argparse.ArgumentParser) -> None:
    """Who does the work, and what stops it."""
    add = parser.add_argument_group("work").add_argument
    add("--workers", type=int, default=1, metavar="N", help="processes; the result is the same for any N (default: 1)")
    add("--executor", metavar="dask://HOST:PORT", help="do the work on a Dask cluster that shares the file system")
    add("--share", type=_share, metavar="I/N", help="do only share I (from 0) of N, as a task of an array job")

    add = parser.add_argument_group("bad input").add_argument
    add("--max-bad", type=float, default=0.01, metavar="F", help="bad records tolerated (default: 0.01 of all)")
    add("--strict", action="store_true", help="stop at the first bad record")
    add("--allow-failed", action="store_true", help="do without inputs that cannot be read to their end")


def _add_dataset_flags(parser: argparse.ArgumentParser) -> None:
    """What is done with a dataset that is there."""
    add = parser.add_argument_group("repetition and contamination").add_argument
    add("--dedup", choices=("exact", "near", "none"), help="delete repeated documents; none takes it back")
    add(
        "--near-threshold",
        type=float,
        default=0.8,
        metavar="J",
        help="Jaccard similarity of near copies (default: 0.8)",
    )
    add("--contamination", nargs="*", type=Path, metavar="FILE",
        help="count training documents that share 13 words in a row with evaluation files (none: forget)")  # fmt: skip
    add(
        "--delete-contaminated",
        action="store_true",
        help="also delete them; a later check without this takes them back",
    )

    add = parser.add_argument_group("a dataset that is there").add_argument
    add("--inspect", type=Path, metavar="DIR", help="show what a dataset holds, and samples of it")
    add("--verify", type=Path, metavar="DIR", help="check every byte of a dataset")
    add("--export", type=Path, metavar="DIR", help="write a dataset in the format of llm.c into --output")


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+)([KMG]?)B?", text.strip().upper())
    if not found:
        raise argparse.ArgumentTypeError(f"wanted a number of bytes such as 1000, 64K, 16M or 1G, got {text!r}")
    return int(found[1]) * _UNITS[found[2]]


def _share(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"wanted I/N such as 0/16, got {text!r}")
    return int(found[1]), int(found[2])


def output_of(arguments: argparse.Namespace) -> Path:
    """The folder to write into."""
    if arguments.output is None:
        raise UserError("--output DIR is missing: where to write the dataset")
    output: Path = arguments.output.expanduser()
    return output


def request_of(arguments: argparse.Namespace) -> Request:
    """The request that the flags describe."""
    if not arguments.inputs:
        raise UserError("nothing to prepare: name files, folders, globs or hf:NAME; see --help")
    separator = arguments.text_separator
    for spelled, meant in _ESCAPES.items() if separator is not None else ():
        separator = separator.replace(spelled, meant)
    return Request(
        inputs=tuple(arguments.inputs),
        output=output_of(arguments),
        tokenizer=arguments.tokenizer,
        val_fraction=arguments.val_fraction,
        val_inputs=tuple(arguments.val_input),
        workers=arguments.workers,
        executor=arguments.executor,
        share=arguments.share,
        rules=TextRules(
            key=arguments.text_key,
            separator=separator,
            max_document_bytes=arguments.max_doc_bytes,
            long_documents=arguments.long_documents,
            invalid_utf8=arguments.invalid_utf8,
        ),
        exclude=tuple(arguments.exclude),
        seed=arguments.seed,
        eos=arguments.eos,
        backend=arguments.encoder,
        max_bad=arguments.max_bad,
        strict=arguments.strict,
        allow_failed=arguments.allow_failed,
    )
