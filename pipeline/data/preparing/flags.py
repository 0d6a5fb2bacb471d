"""The command line of data_prep.py.

In: its arguments. Out: checked `Arguments`, or one `UserError` that lists every fault of them. `--help` is the
documentation of their fields.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro
from pydantic import AfterValidator, BeforeValidator, Field

from pipeline.files import expanded
from pipeline.flags import checked, flag_name, flags_of, placed, print_help, read_words
from pipeline.names import PREPARE_NAMES
from pipeline.section import Clash, Fraction, PositiveInt, Section, clash

MODES = ("inspect", "verify", "export")
"""Each is about an existing dataset, and names it."""
MODE_FLAGS = {"inspect": {"seed", "excerpts"}, "verify": set[str](), "export": {"output"}}
DELETING = ("dedup", "contamination")
WITHOUT_INPUT = {*DELETING, "output", "near_threshold", "delete_contaminated", "text_key", "workers", "executor"}
"""What deletes from the dataset in --output; all other flags are about how INPUT is prepared."""
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\0": "\0"}
_NO_OUTPUT = "--output DIR is missing: where to write the dataset"
_NOTHING = ("None", "")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def _shown_as(metavar: str) -> Any:
    """How a flag's value is called in --help; a default of nothing is not worth words."""
    hint = "(default: {})".format
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=lambda value: hint(value) if value not in _NOTHING else "")


def _size(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d+)([KMG]?)B?", value.strip().upper())
    if not found:
        raise ValueError(f"wants a number of bytes such as 1000, 64K, 16M or 1G, got {value!r}")
    return int(found[1]) * _UNITS[found[2]]


def _share(value: str) -> str:
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", value)
    if not found or not int(found[1]) < int(found[2]):
        raise ValueError(f"wants I/N with I from 0 to N - 1, such as 0/16, got {value!r}")
    return value


def _unescaped(value: str) -> str:
    for spelled, character in _ESCAPES.items():
        value = value.replace(spelled, character)
    return value


def _tokenizer(value: str) -> str:
    from pipeline.data.tokenizer import check_tokenizer_name  # --help does without it

    check_tokenizer_name(value)
    return value


def _threshold(value: float) -> float:
    from pipeline.data.deleting.dedup import check_threshold

    check_threshold(value)
    return value


Word = Annotated[str, Field(min_length=1)]
"""A bound on its length makes pydantic refuse what is not UTF-8, too."""
Folder = Annotated[Annotated[Path, AfterValidator(expanded)] | None, _shown_as("DIR")]


class TokenFlags(Section):
    """What becomes of text."""

    tokenizer: Annotated[str, AfterValidator(_tokenizer), _shown_as("NAME|FILE|train:N|chars|bytes")] = "gpt2"
    """Hub name, tokenizer.json or its folder, FILE.tiktoken, train:N (trained on the corpus), chars or bytes."""
    eos: Annotated[Word | None, _shown_as("TOKEN")] = None
    """Token that ends a document (default: the one that the tokenizer's folder names, else a special token with a
    common name)."""
    encoder: Literal["auto", "gigatoken", "tokenizers"] = "auto"
    """auto: gigatoken where it is proven to give the ids of `tokenizers`."""


class DocumentFlags(Section):
    """What is a document."""

    text_key: Annotated[Word, _shown_as("K")] = "text"
    """Key or column that holds the text."""
    text_separator: Annotated[Annotated[Word, AfterValidator(_unescaped)] | None, _shown_as("S")] = None
    r"""Cuts plain text files into documents; \n and \t are understood (default: a file is one document)."""
    exclude: Annotated[tuple[str, ...], Field(min_length=1), _shown_as("GLOB ...")] = ()
    """Leave out files that match."""
    max_doc_bytes: Annotated[int, BeforeValidator(_size), Field(ge=1024, le=2**40), _shown_as("N[K|M|G]")] = 2**26
    """Longest document (default: 64M)."""
    max_record_bytes: Annotated[
        Annotated[int, BeforeValidator(_size), Field(ge=1024, le=2**40)] | None, _shown_as("N[K|M|G]")
    ] = None
    """Longest record in its file, keys and all (default: 64M, or --max-doc-bytes if that is more)."""
    long_documents: Literal["quarantine", "cut"] = "quarantine"
    """What becomes of longer ones: set aside, or cut at white space."""
    invalid_utf8: Literal["quarantine", "replace"] = "quarantine"
    """What becomes of documents with bad bytes: set aside, or each to U+FFFD."""


class ValidationFlags(Section):
    """What is held out."""

    val_fraction: Annotated[Fraction | None, _shown_as("F")] = None
    """Share held out for validation (default: 0.005; more of small corpora)."""
    val_input: Annotated[tuple[str, ...], Field(min_length=1), _shown_as("INPUT ...")] = ()
    """These inputs are the validation split."""
    seed: Annotated[int, _shown_as("N")] = 1337
    """Decides which documents are held out; with --inspect, which excerpts are shown (default there: another draw each
    time)."""


class WorkFlags(Section):
    """Who does the work."""

    workers: Annotated[PositiveInt, _shown_as("N")] = 1
    """Processes; the result is the same for any number."""
    executor: Annotated[str | None, _shown_as("dask://HOST:PORT")] = None
    """Do the work on a Dask cluster that shares the file system."""
    share: Annotated[Annotated[str, AfterValidator(_share)] | None, _shown_as("I/N")] = None
    """Do only share I (from 0) of N, as a task of an array job."""


class BadInputFlags(Section):
    """What stops the work."""

    max_bad: Annotated[float, Field(ge=0, le=1), _shown_as("F")] = 0.01
    """Bad records tolerated, as a share of all."""
    strict: bool = False
    """Stop at the first bad record."""
    allow_failed: bool = False
    """Do without inputs that cannot be read to their end."""


class DeletionFlags(Section):
    """Repetition and contamination; without an INPUT, in the dataset in --output as it is."""

    dedup: Literal["exact", "near", "none"] | None = None
    """Delete repeated documents; none takes it back."""
    near_threshold: Annotated[float, AfterValidator(_threshold), _shown_as("J")] = 0.8
    """Jaccard similarity of near copies."""
    contamination: Annotated[tuple[Path, ...] | None, _shown_as("FILE ...")] = None
    """Count training documents that share 13 words in a row with evaluation files (no file: forget)."""
    delete_contaminated: bool = False
    """Also delete them; a later check without this takes them back."""


class DatasetFlags(Section):
    """What to do with an existing dataset."""

    inspect: Folder = None
    """Show what a dataset holds, per input too, and excerpts of it."""
    excerpts: Annotated[int, Field(ge=0), _shown_as("N")] = 3
    """--inspect: random documents to show of each input (the 10 largest), how they begin."""
    verify: Folder = None
    """Check every byte of a dataset."""
    export: Folder = None
    """Write a dataset in the format of llm.c into --output."""


class Arguments(Section):
    """The command line of data_prep.py."""

    other_names: ClassVar[Mapping[str, str]] = PREPARE_NAMES
    inputs: tyro.conf.Positional[Annotated[tuple[str, ...], _shown_as("INPUT ...")]] = ()
    """Files, folders, globs, hf:NAME[:CONFIG][@REVISION], saved datasets."""
    output: Folder = None
    """Folder of the dataset, made if missing."""
    dry_run: bool = False
    """Only say what it would come to: units, tokens, disk, time."""
    tokens: TokenFlags = TokenFlags()
    documents: DocumentFlags = DocumentFlags()
    validation: ValidationFlags = ValidationFlags()
    work: WorkFlags = WorkFlags()
    bad_input: BadInputFlags = BadInputFlags()
    deletions: DeletionFlags = DeletionFlags()
    dataset: DatasetFlags = DatasetFlags()

    def given(self) -> list[str]:
        """Keys of the flags that were given, in the order of --help."""
        keys = []
        for key in type(self).model_fields:
            value = getattr(self, key)
            names = type(value).model_fields if isinstance(value, Section) else ()
            keys += [name for name in names if name in value.model_fields_set]
            keys += [key] if key in self.model_fields_set and not isinstance(value, Section) else []
        return keys

    @property
    def deletes_only(self) -> bool:
        """Whether a dataset is worked on as it is, without preparing one."""
        return not self.inputs and any(key in DELETING for key in self.given())

    @property
    def folder(self) -> Path:
        """The folder to write into; `clashes` makes sure that it is given."""
        assert self.output is not None, "checked when the command line is read"
        return self.output

    def clashes(self) -> list[Clash]:
        """Flags that would be ignored because of another one, or for want of it."""
        given = self.given()
        modes = [key for key in MODES if key in given]
        if len(modes) > 1:
            text = f"{' and '.join(map(_flag, modes))} exclude each other: give one"
            return [clash(text, *(f"dataset.{mode}" for mode in modes))]
        if modes:
            return self._beside(modes[0], given)
        deleting = [key for key in DELETING if key in given]
        preparing = [key for key in given if key not in WITHOUT_INPUT and key != "inputs"]
        validation, work, deletions = self.validation, self.work, self.deletions
        checks = (
            (
                not self.inputs and not deleting,
                "nothing to prepare: name files, folders, globs or hf:NAME; see --help",
                ("inputs",),
            ),
            (self.output is None, _NO_OUTPUT, ("output",)),
            (
                bool(deleting and preparing and not self.inputs),
                (
                    f"{''.join(map(_flag, deleting[:1]))} without an INPUT works on the dataset in --output as it is, "
                    f"and {', '.join(map(_flag, preparing))} is about preparing one: name the INPUT, or leave that out"
                ),
                ("inputs",),
            ),
            (
                "near_threshold" in given and deletions.dedup != "near",
                "--near-threshold is of no use without --dedup near: add that, or leave it out",
                ("deletions.dedup",),
            ),
            (
                deletions.delete_contaminated and not deletions.contamination,
                "--delete-contaminated wants --contamination FILE: the texts to look for",
                ("deletions.contamination",),
            ),
            (
                "excerpts" in given,
                "--excerpts is of no use without --inspect DIR: leave it out",
                ("dataset.inspect",),
            ),
            (
                bool(validation.val_fraction and validation.val_input),
                "--val-fraction and --val-input exclude each other: give one",
                ("validation.val_fraction", "validation.val_input"),
            ),
            (
                work.share is not None and work.executor is not None,
                "--share and --executor exclude each other: give one",
                ("work.share", "work.executor"),
            ),
        )
        return [Clash(text, keys) for wrong, text, keys in checks if wrong]

    def _beside(self, mode: str, given: list[str]) -> list[Clash]:
        """What stands beside a flag that is about an existing dataset."""
        found = []
        rest = [_flag(key) for key in given if key not in {mode, "inputs", *MODE_FLAGS[mode]}]
        rest += [f"the input {name!r}" for name in self.inputs]
        if rest:
            allowed = " and ".join(map(_flag, sorted(MODE_FLAGS[mode])))
            text = (
                f"{_flag(mode)} and {', '.join(rest)} exclude each other: {_flag(mode)} DIR is about an existing "
                f"dataset and takes {f'nothing but {allowed}' if allowed else 'no other flag'}"
            )
            found.append(clash(text, f"dataset.{mode}"))
        if mode == "export" and self.output is None:
            found.append(clash(_NO_OUTPUT, "output"))
        return found


def _flag(key: str) -> str:
    return flag_name((key,))


def parse(arguments: list[str]) -> Arguments:
    """Read a command line. Raises `UserError` that lists every fault of it."""
    flags = flags_of(Arguments, {}, prefixed=False)
    line = read_words(arguments, flags, Arguments)
    given = dict(line.given)
    if line.rest:
        given["inputs",] = line.rest
    names = {flag.path: name for name, flag in flags.items()}
    return checked(Arguments, placed({}, given), origin="the command", names=names, faults=line.faults)


def answer_at_once(description: str | None) -> None:
    """Answer `--help` and exit; it does not wait for the imports of the work."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        default = Arguments.model_construct()
        print_help(Arguments, default, program="data_prep.py", description=description or "", prefixed=False)
        raise SystemExit(0)
