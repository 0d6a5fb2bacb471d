"""What the user asked for, and whether an output folder already answers it.

In: the settings of the command line. Out: their identity, and the refusal of a folder made for another.
"""

from __future__ import annotations

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
from pipeline.data.preparing.ledger import headers
from pipeline.data.reading.corpus import Corpus, is_unicode
from pipeline.data.reading.formats import TextRules
from pipeline.data.tokenizer import TextTokenizer, check_tokenizer_name
from pipeline.errors import UserError
from pipeline.locks import LOCK_NAME


@dataclass(frozen=True)
class Request:
    """What the user asked for; see `data_prep.py --help`."""

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

    def check(self) -> None:
        """Refuse numbers that make no sense, all at once."""
        faults = []
        if self.val_fraction is not None and not 0 <= self.val_fraction < 1:
            faults.append(f"--val-fraction wants a number in [0, 1), got {self.val_fraction:g}")
        if self.val_fraction and self.val_inputs:
            faults.append("--val-fraction and --val-input exclude each other: give one")
        if not 0 <= self.max_bad <= 1:
            faults.append(f"--max-bad wants a number in [0, 1], got {self.max_bad:g}")
        if self.workers < 1:
            faults.append(f"--workers wants at least 1, got {self.workers}")
        if self.rules.separator == "":
            faults.append("--text-separator wants at least one character, got none")
        if self.rules.max_document_bytes < 1024:
            faults.append(f"--max-doc-bytes wants at least 1024, got {self.rules.max_document_bytes}")
        if self.share is not None and not 0 <= self.share[0] < self.share[1]:
            faults.append(f"--share wants I/N with I from 0 to N - 1, got {self.share[0]}/{self.share[1]}")
        texts = {"--text-key": self.rules.key, "--text-separator": self.rules.separator, "--eos": self.eos}
        faults += [f"{flag} wants UTF-8, got {text!r}" for flag, text in texts.items() if text and not is_unicode(text)]
        if self.share is not None and self.executor is not None:
            faults.append("--share and --executor exclude each other: give one")
        if faults:
            raise UserError("\n".join(faults))
        check_tokenizer_name(self.tokenizer)

    def identity(self, corpus: Corpus) -> dict[str, Any]:
        """The settings that the dataset depends on, as recorded and compared. Workers are not among them."""
        names = [source.name for source in corpus.sources]
        held_out = [source.name for source in corpus.sources if source.held_out]
        file = Path(self.tokenizer).expanduser()
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
            "long_documents": self.rules.long_documents,
            "invalid_utf8": self.rules.invalid_utf8,
            "val_fraction": self.val_fraction,
            "val_inputs": f"{len(held_out)} sources, digest {digest_of(held_out)[:16]}" if held_out else 0,
            "seed": self.seed,
        }


def refuse_foreign(output: Path, identity: dict[str, Any]) -> None:
    """Refuse a folder that something else made, or this program with other settings."""
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
        remedy = "choose another --output, or remove this folder to start over"
        raise UserError(f"{output} was made with other settings:\n" + "\n".join(different) + f"\n{remedy}")


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


def sizes_agree(output: Path, sizes: dict[str, int]) -> bool:
    """Whether all files are there with these sizes in bytes."""
    return all((output / name).exists() and (output / name).stat().st_size == size for name, size in sizes.items())
