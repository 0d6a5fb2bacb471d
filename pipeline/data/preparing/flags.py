"""The command line of data_prep.py.

In: its arguments. Out: a namespace, and the `Request` that it describes. `--help` is its documentation.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pipeline.data.preparing.request import Request
from pipeline.data.reading.formats import TextRules
from pipeline.errors import UserError, nearest

_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\0": "\0"}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_LOOKING = ("--inspect", "--verify", "--export")
"""Each is about a dataset that is there, and says which."""
_DELETING = ("--dedup", "--contamination")
_WITHOUT_INPUT = {*_DELETING, "--output", "--near-threshold", "--delete-contaminated", "--text-key", "--workers",
                  "--executor"}  # fmt: skip
"""What deletes from the dataset in --output; all other flags are about how INPUT is prepared."""


class _Parser(argparse.ArgumentParser):
    """Mistakes are told as everywhere else, not by a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Instead of printing and leaving."""
        raise UserError(f"{message}; see --help")

    def flags(self) -> list[str]:
        """All that there are, in the order of --help."""
        return [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]


def parse(arguments: list[str], *, description: str | None) -> argparse.Namespace:
    """Parse the command line of the script that describes itself so.

    Raises `UserError` for flags that there are not, with the nearest that there is, and for those that exclude each
    other.
    """
    parser = _Parser(
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
    found, unknown = parser.parse_known_intermixed_args(arguments)
    _refuse_unknown([argument for argument in unknown if argument.startswith("-")], parser.flags())
    written = {argument.partition("=")[0] for argument in arguments}
    _refuse_conflicts([flag for flag in parser.flags() if flag in written], found)
    return found


def _refuse_unknown(unknown: Sequence[str], flags: Sequence[str]) -> None:
    """Errors: flags that there are not, all of them."""
    faults = []
    for argument in unknown:
        word = argument.partition("=")[0]
        begun = [flag for flag in flags if flag.startswith(word)]
        hint = f"; did you mean {begun[0]!r}?" if len(begun) == 1 else nearest(word, flags)
        faults.append(f"there is no flag {word}{hint}")
    if faults:
        raise UserError("\n".join(faults) + "\n  all flags: --help")


def _refuse_conflicts(given: Sequence[str], found: argparse.Namespace) -> None:
    """Errors: of the flags `given`, those that would be passed over for another one, or for want of it."""
    looking = [flag for flag in _LOOKING if flag in given]
    if len(looking) > 1:
        raise UserError(f"{' and '.join(looking)} exclude each other: give one")
    if looking:
        (mode,) = looking
        rest = [flag for flag in given if flag != mode and (mode, flag) != ("--export", "--output")]
        rest += [f"the input {name!r}" for name in found.inputs]
        if rest:
            alone = "nothing but --output OUT" if mode == "--export" else "no other flag"
            raise UserError(
                f"{mode} and {rest[0]} exclude each other: {mode} DIR is about a dataset that is there and takes "
                f"{alone}; leave one of them out"
            )
        return
    deleting = [flag for flag in _DELETING if flag in given]
    preparing = [flag for flag in given if flag not in _WITHOUT_INPUT]
    if deleting and preparing and not found.inputs:
        raise UserError(
            f"{deleting[0]} without an INPUT works on the dataset in --output as it is, and {preparing[0]} is about "
            f"preparing one: name the INPUT, or leave {preparing[0]} out"
        )
    if "--near-threshold" in given and found.dedup != "near":
        raise UserError("--near-threshold is of no use without --dedup near: add that, or leave it out")


def _add_text_flags(parser: argparse.ArgumentParser) -> None:
    """What is a document, and what becomes of it."""
    add = parser.add_argument_group("tokens").add_argument
    add(
        "--tokenizer",
        default="gpt2",
        help="hub name, tokenizer.json or its folder, FILE.tiktoken, train:N, chars or bytes (default: gpt2)",
    )
    add("--eos", metavar="TOKEN", help="token that ends a document (default: what the tokenizer's folder says, "
        "else a special token with a common name)")  # fmt: skip
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
