"""The settings that say what to train on: the `data` section of config.py.

In: one path, or a blend of several. Out: a list of sources, however they were given.
"""

from __future__ import annotations

from typing import Literal

from pipeline.section import Clash, Fraction, PositiveFloat, Section, clash


class Origin(Section):
    """What is said of one dataset that another tool made (Megatron, nanoGPT, llm.c), to read it as it is."""

    tokenizer: str | None = None
    """For data of other tools: the tokenizer that its ids belong to, as data_prep.py takes it."""
    dtype: Literal["uint16", "int32", "uint32"] | None = None
    """For data of other tools: the type of the ids in raw token files."""
    eos: str | None = None
    """For data of other tools: the token that ends a document (default: the tokenizer's own)."""
    val: str | None = None
    """For data of other tools: where the validation data is, in the same format."""
    val_fraction: Fraction | None = None
    """For data of other tools: hold out so much of the end instead."""

    def foreign_faults(self, path: str) -> list[str]:
        """Keys that need each other or exclude each other."""
        keys = ("dtype", "eos", "val", "val_fraction")
        given = [key for key in keys if getattr(self, key) is not None]
        found = []
        if given and self.tokenizer is None:
            found.append(f"{', '.join(given)} of {path}: only for data of other tools, which needs tokenizer as well")
        if self.val is not None and self.val_fraction is not None:
            found.append(f"{path}: give val or val_fraction, not both")
        return found


class SourceConfig(Origin):
    """One dataset of a blend."""

    path: str
    """Dataset folder written by data_prep.py; with `tokenizer` also data of other tools."""
    weight: PositiveFloat = 1.0
    """Share of the training tokens, relative to the other weights (of rows, so padding of packed rows counts)."""


class DataConfig(Origin):
    """What to train on."""

    path: str | None = None
    """Dataset folder written by data_prep.py; with `tokenizer` also data of other tools."""
    sources: tuple[SourceConfig, ...] = ()
    """Instead of `path`, a blend: a list of {path, weight, ...}, each with keys for data of other tools if need be."""
    plan: Literal["concat", "pack"] = "concat"
    """concat: documents end to end, cut where a row is full. pack: documents stay whole (up to the context) and are
    fitted into rows with little padding; positions count from 0 in each, document_mask keeps attention within."""
    document_mask: bool = False
    """Confine attention to the document a token belongs to."""
    cross_document_targets: bool = True
    """concat: also learn to predict the first token of a document from the end of the one before it."""
    max_epochs: PositiveFloat | None = 4.0
    """Warn at the start when a dataset will be read more often than this; null never warns."""

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The datasets, however they were given."""
        if self.path is None:
            return self.sources
        about = {key: getattr(self, key) for key in Origin.model_fields}
        return (SourceConfig.model_construct(path=self.path, weight=1.0, **about),)

    def clashes(self) -> list[Clash]:
        """One way to say what the data is."""
        if self.path is not None and self.sources:
            text = "give path or sources, not both; a flag takes the first back: --data.path null"
            return [clash(text, "path", "sources")]
        if self.path is None and not self.sources:
            return [clash("give path (one dataset) or sources (a blend)", "path", "sources")]
        found = []
        misplaced = [key for key in Origin.model_fields if getattr(self, key) is not None]
        if self.sources and misplaced:
            text = f"{', '.join(misplaced)}: give it with each of the sources that it is about"
            found.append(clash(text, "sources", *misplaced))
        paths = [source.path for source in self.sources]
        repeated = sorted({path for path in paths if paths.count(path) > 1})
        found += [
            clash(f"{path} is given {paths.count(path)} times: add up its weights", "sources") for path in repeated
        ]
        about = ("path", "sources", *Origin.model_fields)
        found += [clash(text, *about) for source in self.all_sources for text in source.foreign_faults(source.path)]
        if self.plan == "pack" and not self.cross_document_targets:
            text = "cross_document_targets has no effect with plan pack, which never predicts across documents"
            found.append(clash(text, "cross_document_targets", "plan"))
        return found
