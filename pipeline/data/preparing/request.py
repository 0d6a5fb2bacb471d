"""What the user asked for, and whether an output folder already answers it.

In: the settings of the command line. Out: their identity, what they find in the folder, and the refusal of one that
was made for another.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import xxhash

from pipeline.data.manifest import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    DamagedManifestError,
    InputInfo,
    Manifest,
    digest_of,
    read_manifest,
)
from pipeline.data.preparing.encoder import Backend
from pipeline.data.preparing.flags import Arguments
from pipeline.data.preparing.ledger import LedgerHeader, headers, ledgers, unrecorded
from pipeline.data.reading.corpus import Corpus
from pipeline.data.reading.formats import TextRules
from pipeline.data.tokenizer import TextTokenizer
from pipeline.errors import UserError, counted
from pipeline.files import expanded
from pipeline.locks import LOCK_NAME, refuse_held

_NAMED = 5
"""Inputs named in a message."""


@dataclass(frozen=True)
class Request:
    """What the user asked for; `flags.Arguments` documents and checks it."""

    inputs: tuple[str, ...]
    output: Path
    tokenizer: str = "gpt2"
    val_fraction: float | None = None
    val_inputs: tuple[str, ...] = ()
    workers: int = 1
    executor: str | None = None
    share: tuple[int, int] | None = None
    rules: TextRules = field(default_factory=TextRules)
    exclude: tuple[str, ...] = ()
    seed: int = 1337
    eos: str | None = None
    backend: Backend | Literal["auto"] = "auto"
    max_bad: float = 0.01
    strict: bool = False
    allow_failed: bool = False

    def identity(self, corpus: Corpus) -> dict[str, Any]:
        """The settings that the dataset depends on, as recorded and compared. Workers are not among them."""
        names = [source.name for source in corpus.sources]
        held_out = [source.name for source in corpus.sources if source.held_out]
        file = expanded(self.tokenizer)
        file = file / TOKENIZER_NAME if file.is_dir() else file
        tokenizer = f"file of xxh3_128 {xxhash.xxh3_128_hexdigest(file.read_bytes())}" if file.is_file() else None
        return {
            "inputs": f"{len(names)} sources, digest {digest_of(names)[:16]}",
            "tokenizer": tokenizer or self.tokenizer,
            "eos": self.eos,
            "text_key": self.rules.key,
            "text_separator": self.rules.separator,
            "unit_bytes": self.rules.unit_bytes,
            "max_document_bytes": self.rules.max_document_bytes,
            "max_record_bytes": self.rules.max_record_bytes,
            "long_documents": self.rules.long_documents,
            "invalid_utf8": self.rules.invalid_utf8,
            "val_fraction": self.val_fraction,
            "val_inputs": f"{len(held_out)} sources, digest {digest_of(held_out)[:16]}" if held_out else 0,
            "seed": self.seed,
        }


def request_of(arguments: Arguments) -> Request:
    """The preparation that a command line asks for."""
    tokens, documents, validation, work = arguments.tokens, arguments.documents, arguments.validation, arguments.work
    part, _, parts = (work.share or "").partition("/")
    return Request(
        inputs=arguments.inputs,
        output=arguments.folder,
        tokenizer=tokens.tokenizer,
        val_fraction=validation.val_fraction,
        val_inputs=validation.val_input,
        workers=work.workers,
        executor=work.executor,
        share=(int(part), int(parts)) if work.share else None,
        rules=TextRules(
            key=documents.text_key,
            separator=documents.text_separator,
            max_document_bytes=documents.max_doc_bytes,
            max_record_bytes=documents.max_record_bytes,
            long_documents=documents.long_documents,
            invalid_utf8=documents.invalid_utf8,
        ),
        exclude=documents.exclude,
        seed=validation.seed,
        eos=tokens.eos,
        backend=tokens.encoder,
        max_bad=arguments.bad_input.max_bad,
        strict=arguments.bad_input.strict,
        allow_failed=arguments.bad_input.allow_failed,
    )


def look_at(request: Request, corpus: Corpus, identity: dict[str, Any]) -> tuple[str, bool]:
    """What a preparation would find in its output, in words, and whether it is complete. Writes nothing.

    Raises what the preparation would: the folder cannot be written, is held, or was made for something else.
    """
    output = request.output
    if not output.exists():
        check_writable(output)
        return f"output: {output} is yet to be made", False
    check_writable(output)
    own = [LOCK_NAME] + ([f"{LOCK_NAME}-{request.share[0]}-of-{request.share[1]}"] if request.share else [])
    for name in own if request.share else sorted(path.name for path in output.glob(f"{LOCK_NAME}*")):
        refuse_held(output, name=name)
    refuse_foreign(output, identity, corpus)
    if complete_manifest(output, corpus):
        return f"output: {output} is complete already and would be left as it is", True
    done = finished_units(output)
    changed = "; ".join(input_changes(output, corpus))
    begun = f"{counted(len(done), 'unit')} finished earlier would be kept" if done else "nothing to go on from"
    return f"output: {output}, {begun}" + (f", but for inputs {changed}" if done and changed else ""), False


def check_writable(output: Path) -> None:
    """Raise `UserError` when a folder cannot be made or written there."""
    there = existing(output)
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return
    reason = f"no permission to write into {there}" if there.is_dir() else f"{there} is a file"
    raise UserError(f"cannot write to {output}: {reason}; choose another --output")


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    while not path.exists():
        path = path.resolve().parent
    return path


def finished_units(output: Path) -> set[int]:
    """Numbers of the units that an earlier run finished, whatever has changed since."""
    entries = [entry for ledger in ledgers(output) for entry in ledger.read()[1]]
    return {entry.unit for entry in [*entries, *unrecorded(output)] if entry.last}


def refuse_foreign(output: Path, identity: dict[str, Any], corpus: Corpus) -> None:
    """Refuse a folder that something else made, or this program with other settings or inputs."""
    ours = ("ledger", LOCK_NAME)  # and what begins so: temporary files, the ledgers and locks of shares
    # looked for first: another share that begins just now writes its ledger before anything else
    others = sorted(entry.name for entry in output.iterdir() if not entry.name.startswith(ours))
    recorded = next((header.settings for header in headers(output)), None)
    manifest = _manifest(output, vouched=recorded is not None)
    recorded = manifest.settings if manifest else recorded
    if recorded is None:
        if others:
            raise UserError(f"{output} holds other files ({', '.join(others[:3])}); choose an empty --output")
        return
    different = [
        f"  {key}: made with {recorded.get(key)!r}, now {identity.get(key)!r}"
        for key in sorted(recorded.keys() | identity.keys())
        if recorded.get(key) != identity.get(key)
    ]
    if different:
        named = "; ".join(input_changes(output, corpus))
        different = [f"  inputs {named}" if named and line.startswith("  inputs:") else line for line in different]
        remedy = "choose another --output (pretrain.py trains on several datasets: data.sources), or remove this folder"
        raise UserError(
            f"{output} was made with other settings:\n" + "\n".join(different) + f"\n{remedy} to start over"
        )


def input_changes(output: Path, corpus: Corpus) -> list[str]:
    """Which inputs were added, removed and changed since the output was begun; nothing where none are recorded."""
    before = {info.name: info.fingerprint for info in _recorded_inputs(output)}
    now = {source.name: source.fingerprint for source in corpus.sources}
    if not before:
        return []
    changes = {
        "added": [name for name in now if name not in before],
        "removed": [name for name in before if name not in now],
        "changed": [name for name in now if name in before and now[name] != before[name]],
    }
    return [f"{what}: {_few(names)}" for what, names in changes.items() if names]


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _recorded_inputs(output: Path) -> Sequence[InputInfo]:
    """The inputs that an output was made of, or that it was begun with."""
    manifest = _manifest(output, vouched=True)
    found: Iterable[Sequence[InputInfo]] = (header.inputs for header in headers(output) if header.inputs)
    return manifest.inputs if manifest else next(iter(found), ())


def complete_manifest(output: Path, corpus: Corpus) -> Manifest | None:
    """The manifest, if it is there, and inputs and files are as it says."""
    manifest = _manifest(output, vouched=True)
    if manifest is None:
        return None
    shards = [shard for shards in manifest.splits.values() for shard in shards]
    sizes = {name: info.size for shard in shards for name, info in shard.files.items()}
    whole = manifest.inputs == input_infos(corpus) and sizes_agree(output, sizes)
    return manifest if whole and _holds_tokenizer(output, manifest) else None


def _manifest(output: Path, *, vouched: bool) -> Manifest | None:
    """The manifest, if there is one; of a damaged one, which is written anew, a ledger knows what it vouched for."""
    if not (output / MANIFEST_NAME).exists():
        return None
    try:
        return read_manifest(output)
    except DamagedManifestError as error:
        if vouched:
            return None
        raise UserError(f"{error} into another --output, or remove this folder to start over") from None
    except UserError as error:
        raise UserError(f"{error}; choose another --output, or remove this folder to start over") from None


def _holds_tokenizer(output: Path, manifest: Manifest) -> bool:
    try:
        saved = TextTokenizer.from_file(output / TOKENIZER_NAME, eos=manifest.eos_id)
    except UserError:
        return False
    return saved.fingerprint == manifest.tokenizer_fingerprint


def input_infos(corpus: Corpus) -> tuple[InputInfo, ...]:
    """The sources as the manifest records them."""
    return tuple(
        InputInfo(name=source.name, kind=source.kind, size=source.size, fingerprint=source.fingerprint)
        for source in corpus.sources
    )


def header_of(
    identity: dict[str, Any], corpus: Corpus, *, tokenizer_fingerprint: str, eos_id: int | None
) -> LedgerHeader:
    """The header of a ledger whose units are made for these."""
    digest = digest_of([[source.name, source.fingerprint] for source in corpus.sources])
    return LedgerHeader(
        settings=identity,
        inputs_digest=digest,
        tokenizer_fingerprint=tokenizer_fingerprint,
        inputs=input_infos(corpus),
        eos_id=eos_id,
    )


def sizes_agree(output: Path, sizes: dict[str, int]) -> bool:
    """Whether all files are there with these sizes in bytes."""
    return all((output / name).exists() and (output / name).stat().st_size == size for name, size in sizes.items())
