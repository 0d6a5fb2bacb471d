"""What a run trains on: its datasets, opened, checked against each other and laid out in rows.

In: the settings. Out: `TrainingData`, or a `UserError` for datasets that do not fit together or hold too little. Two
datasets fit when one tokenizer made both: then their ids mean the same, and so does the end of a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import assert_never

from pipeline.config import Config
from pipeline.config_data import SourceConfig
from pipeline.data.dataset import Dataset, TokenSplit, open_dataset
from pipeline.data.exchange.foreign_files import is_foreign
from pipeline.data.loading.blend import Blend, Phase, PhaseSource
from pipeline.data.loading.loader import Fixed, Loader, Shuffled
from pipeline.data.loading.rows import Concat, Pack, Plan
from pipeline.errors import UserError
from pipeline.files import expanded
from pipeline.seeds import named_seed


@dataclass(frozen=True)
class Source:
    """One dataset of the run: what it is called, how it was given, its rows for training and for validation."""

    name: str
    settings: SourceConfig
    dataset: Dataset
    plan: Plan
    validation: Plan | None

    def rows(self, *, seed: int) -> Shuffled:
        """Its rows for training, epoch after epoch."""
        return Shuffled(self.plan, name=self.name, seed=seed, data_digest=self.dataset.data_digest)


@dataclass(frozen=True)
class ValidationSet:
    """The val split of one dataset, as it stands: `plan` lays it out, `loader` reads it."""

    name: str
    plan: Plan
    loader: Loader


class TrainingData:
    """The datasets of a run, at least one; what is asked of them together is asked here."""

    def __init__(self, sources: Sequence[Source], *, seed: int) -> None:
        self.sources, self.seed = tuple(sources), seed
        first = sources[0].dataset
        self.vocab_size, self.eos_id = first.vocab_size, first.eos_id
        self.tokenizer_json, self.tokenizer_fingerprint = first.tokenizer_json, first.tokenizer_fingerprint
        self.where = ", ".join(str(source.dataset.path) for source in sources)

    def described(self) -> tuple[PhaseSource, ...]:
        """What a checkpoint remembers of the datasets."""
        return tuple(
            PhaseSource(name=source.name, digest=source.dataset.data_digest, settings=source.settings)
            for source in self.sources
        )

    def blend(self, phases: Sequence[Phase]) -> Blend:
        """The rows of training under `phases`, of which the last is about these datasets."""
        rows = {source.dataset.data_digest: source.rows(seed=self.seed) for source in self.sources}
        return Blend(phases, rows, seed=self.seed)

    def validation(self, config: Config, *, rank: int, world_size: int) -> list[ValidationSet]:
        """Rows of each val split as they stand, the last one padded: every token once."""
        return [
            ValidationSet(one.name, one.validation, Loader(rows, config, rank=rank, world_size=world_size))
            for one in self.sources
            if one.validation is not None
            for rows in [Fixed(one.validation, name=one.name)]
        ]


def open_sources(config: Config) -> TrainingData:
    """Open every dataset of the run and lay it out in rows.

    Errors: those of opening, tokenizers that differ, one dataset given twice, a dataset that does not fill one row.
    """
    given = config.data.all_sources
    datasets = [open_source(source) for source in given]
    names = unique_names([source.path for source in given])
    _refuse_misfits(datasets, names)
    parts = zip(names, given, datasets, strict=True)
    return TrainingData(
        [lay_out(name, settings, dataset, config) for name, settings, dataset in parts], seed=config.seed
    )


def lay_out(name: str, settings: SourceConfig, dataset: Dataset, config: Config) -> Source:
    """A dataset in rows. Errors: not even one."""
    plan = make_plan(dataset.split("train"), config, digest=dataset.data_digest)
    if plan.rows == 0 and config.data.plan == "pack":
        raise UserError(
            f"{dataset.path} has {plan.split.n_tokens} training tokens, but no document of two or more, so nothing to "
            "predict: prepare more text, or name the token that ends its documents (eos) if another tool made it"
        )
    if plan.rows == 0:
        raise UserError(
            f"{dataset.path} has {plan.split.n_tokens} training tokens, one row needs "
            f"{config.model.context_length + 1}: prepare more text, lower model.context_length, "
            "or set data.plan to pack, which pads"
        )
    validation = make_plan(dataset.split("val"), config, digest=dataset.data_digest)
    return Source(name, settings, dataset, plan, validation if validation.all_rows else None)


def reopen(known: PhaseSource, config: Config) -> Source:
    """A dataset that a run trained on before. Errors: it is not there any more, or not the same."""
    dataset = open_source(known.settings)
    if dataset.data_digest != known.digest:
        raise UserError(
            f"{dataset.path} is not what {known.name} was: digest {dataset.data_digest[:16]}, wanted "
            f"{known.digest[:16]}; restore that dataset there"
        )
    return lay_out(known.name, known.settings, dataset, config)


def open_source(source: SourceConfig) -> Dataset:
    """A dataset of data_prep.py, or where a tokenizer is named, of another tool."""
    if source.tokenizer is None:
        _refuse_unprepared(source.path)
        return open_dataset(source.path)
    from pipeline.data.exchange.foreign import open_foreign  # tokenizers are slow to import and seldom needed to train

    return open_foreign(
        source.path,
        tokenizer=source.tokenizer,
        dtype=source.dtype,
        eos=source.eos,
        val=source.val,
        val_fraction=source.val_fraction,
    )


def make_plan(split: TokenSplit, config: Config, *, digest: str) -> Plan:
    """How the documents of a split of dataset `digest` become rows."""
    context_length = config.model.context_length
    match config.data.plan:
        case "concat":
            return Concat(split, context_length=context_length)
        case "pack":
            return Pack(split, context_length=context_length, key=named_seed(config.seed, "pack", digest))
    assert_never(config.data.plan)


def unique_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, or as many of its last parts as it takes to tell them apart."""
    parts = [PurePath(path).parts for path in paths]
    for length in range(1, max(map(len, parts), default=1)):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def _refuse_unprepared(path: str) -> None:
    """Errors: text that was not prepared; data of other tools without what is to be said of it."""
    if is_foreign(path):
        raise UserError(
            f"{path} is data of another tool, wanted a folder of data_prep.py: to train on it as it is, name the "
            "tokenizer that made it beside the path (data.tokenizer), and for bare ids their type (data.dtype)"
        )
    if expanded(path).is_file():
        raise UserError(
            f"{path} is a file, wanted a folder: python data_prep.py {path} --output FOLDER makes one of it"
        )


def _refuse_misfits(datasets: Sequence[Dataset], names: Sequence[str]) -> None:
    """Errors: tokens that mean different things; the same data twice."""
    meanings = [(one.tokenizer_fingerprint, one.vocab_size, one.eos_id) for one in datasets]
    if len(set(meanings)) > 1:
        lines = [
            f"  {name}: tokenizer {fingerprint[:16]}, {vocab_size} tokens, end of document {eos_id} ({dataset.path})"
            for name, dataset, (fingerprint, vocab_size, eos_id) in zip(names, datasets, meanings, strict=True)
        ]
        raise UserError(
            "datasets of one run need one tokenizer and one end of document, got\n"
            + "\n".join(lines)
            + "\n  prepare them again with the tokenizer.json of one of them"
        )
    seen: dict[str, Dataset] = {}
    for dataset in datasets:
        twin = seen.setdefault(dataset.data_digest, dataset)
        if twin is not dataset:
            raise UserError(f"{twin.path} and {dataset.path} hold the same data: give it once, with the sum of weights")
