"""What a step trained on: every document of every row, with the file and record it came from.

    python -m pipeline.explain RUN --step N [--rank R --world-size W] [--text] [--data FOLDER ...]

In: a run folder and its datasets, wherever they lie now; neither model nor GPU. Out: lines, exact for any step of the
past or of the future, through changes of weights, datasets and batch sizes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from pipeline.cli import config_from_values, read_yaml
from pipeline.config import Config
from pipeline.config_data import DataConfig, SourceConfig
from pipeline.data.loading.blend import Blend, Phase
from pipeline.data.loading.rows import Origin
from pipeline.data.loading.sources import TrainingData, open_source, open_sources, reopen
from pipeline.data.order import share
from pipeline.data.tokenizer import TextTokenizer
from pipeline.errors import UserError, counted, run_command
from pipeline.files import expanded
from pipeline.train.saving.checkpoint import checkpoint_folder, list_checkpoints, read_state
from pipeline.train.state import BatchSizes, rows_of_step

SHOWN_TOKENS, SHOWN_CHARACTERS = 48, 100  # of the text of each document


@dataclass(frozen=True)
class Arguments:
    """Tell which documents a training step saw, or will see."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    step: int
    """Which step; 1 is the first."""
    rank: int | None = None
    """Only the rows of this rank, of `world_size`."""
    world_size: int = 1
    """Number of ranks the run had at that step."""
    text: bool = False
    """Also show how each document's part begins."""
    data: tuple[str, ...] = ()
    """Where datasets of the run lie now, if they were moved; each is known by its digest."""


@dataclass(frozen=True)
class Course:
    """What each row of a run is, and which rows each step takes."""

    config: Config
    data: TrainingData
    blend: Blend
    batches: tuple[BatchSizes, ...]

    def rows(self, step: int, *, rank: int | None = None, world_size: int = 1) -> range:
        """The rows of a step, or one rank's part of them."""
        first, count = rows_of_step(self.batches, step)
        part = range(count) if rank is None else share(count, part=rank, parts=world_size)
        return range(first + part.start, first + part.stop)

    def describe(self, rows: Sequence[int]) -> list[list[Origin]]:
        """Where everything in each of `rows` comes from. Errors: a dataset of an earlier phase is gone."""
        for known in self.blend.missing(np.array(rows, dtype=np.int64)):
            self.blend.sources[known.digest] = reopen(known, self.config).rows(seed=self.config.seed)
        return [self.blend.describe(row) for row in rows]


def main() -> None:
    """Run folder in, lines out."""
    arguments = tyro.cli(Arguments, prog="python -m pipeline.explain", config=(tyro.conf.FlagCreatePairsOff,))
    ranks = range(arguments.world_size)
    if arguments.step < 1 or (arguments.rank is not None and arguments.rank not in ranks):
        raise UserError(
            f"wanted a step from 1 on and a rank below --world-size {arguments.world_size}, got step {arguments.step}"
            f"{'' if arguments.rank is None else f' and rank {arguments.rank}'}"
        )
    course = read_course(arguments.run, moved=arguments.data)
    rows = course.rows(arguments.step, rank=arguments.rank, world_size=arguments.world_size)
    of_rank = "" if arguments.rank is None else f", rank {arguments.rank} of {arguments.world_size}"
    print(f"step {arguments.step}{of_rank}: {counted(len(rows), 'row')} of {course.config.model.context_length} tokens")
    if arguments.step > course.config.total_steps:
        print(f"the run ends with step {course.config.total_steps}: this is what it would train on if it were extended")
    tokenizer = _tokenizer(course.data) if arguments.text else None
    for row, origins in zip(rows, course.describe(rows), strict=True):
        print(f"row {row}: {origins[0].dataset}, epoch {origins[0].epoch}, its row {origins[0].row}")
        for origin in origins:
            print(f"  {_line(origin)}")
            if tokenizer is not None:
                print(f"    {_beginning(course.blend, row, origin, tokenizer)}")


def read_course(run: Path, *, moved: Sequence[str] = ()) -> Course:
    """The course of a run from its settings and its newest checkpoint; before the first one from the settings alone.

    The settings are those of the latest start, so what they changed is in effect from that checkpoint on. `moved` are
    the places of datasets that are not where the run found them.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} is no run folder: it has no config.yaml")
    config = config_from_values(read_yaml(path), origin=str(path))
    found = list_checkpoints(checkpoint_folder(config, run))
    state = read_state(found[-1]) if found else None
    if moved:
        places = _places(moved, state.phases if state else (), run)
        config = config.model_copy(update={"data": _moved_data(config.data, places)})
        if state:
            state = state.model_copy(update={"phases": tuple(_moved_phase(phase, places) for phase in state.phases)})
    data = _open(config)
    if state is None:
        first = Phase(row=0, sources=data.described())
        return Course(config, data, data.blend([first]), (BatchSizes(after=0, row=0, ramp=config.ramp_of_rows),))
    state = state.continued(data.described(), config.ramp_of_rows)
    return Course(config, data, data.blend(state.phases), state.batches)


def _open(config: Config) -> TrainingData:
    """As `open_sources`. Errors: a dataset is not where the settings say."""
    try:
        return open_sources(config)
    except UserError as error:
        if all(expanded(source.path).exists() for source in config.data.all_sources):
            raise
        raise UserError(f"{error}\n  if it lies elsewhere now, say where: --data FOLDER") from None


def _places(moved: Sequence[str], phases: Sequence[Phase], run: Path) -> dict[str, str]:
    """Where what the settings call by a path lies now. Errors: what lies there is nothing that the run trained on."""
    known = {source.digest: source for phase in phases for source in phase.sources}
    if not known:
        raise UserError(f"{run} has no checkpoint yet, so nothing says which data is its own; --data needs one")
    places: dict[str, str] = {}
    for path in moved:
        digests = {}
        for source in known.values():
            settings = source.settings.model_copy(update={"path": path})
            digests[source.digest] = open_source(settings).data_digest
        found = [known[digest] for digest, now in digests.items() if digest == now]
        if not found:
            wanted = ", ".join(f"{source.name} {source.digest[:16]}" for source in known.values())
            got = ", ".join(sorted({digest[:16] for digest in digests.values()}))
            raise UserError(f"{path} is nothing that {run} trained on: digest {got}, wanted one of {wanted}")
        places |= {source.settings.path: path for source in found}
    return places


def _moved_data(data: DataConfig, places: Mapping[str, str]) -> DataConfig:
    """The settings with the paths of `places` replaced."""
    if data.path is not None:
        return data.model_copy(update={"path": places.get(data.path, data.path)})
    return data.model_copy(update={"sources": tuple(_moved_source(source, places) for source in data.sources)})


def _moved_source(source: SourceConfig, places: Mapping[str, str]) -> SourceConfig:
    return source.model_copy(update={"path": places.get(source.path, source.path)})


def _moved_phase(phase: Phase, places: Mapping[str, str]) -> Phase:
    """What a checkpoint remembers, with the paths of `places` replaced."""
    sources = [
        source.model_copy(update={"settings": _moved_source(source.settings, places)}) for source in phase.sources
    ]
    return phase.model_copy(update={"sources": tuple(sources)})


def _line(origin: Origin) -> str:
    span, info = origin.span, origin.info
    return (
        f"{info.source}, row {info.row}: positions {span.place} to {span.place + span.length - 1} "
        f"({span.length} of its {info.tokens} tokens, from token {span.start} of the split on)"
    )


def _beginning(blend: Blend, row: int, origin: Origin, tokenizer: TextTokenizer) -> str:
    """The text of the first tokens, on one line."""
    start, length = origin.span.start, min(origin.span.length, SHOWN_TOKENS)
    text = tokenizer.decode(blend.source_of(row).plan.split.checked_tokens(start, start + length))
    return json.dumps(text[:SHOWN_CHARACTERS], ensure_ascii=False)


def _tokenizer(data: TrainingData) -> TextTokenizer:
    return TextTokenizer.from_content(data.tokenizer_json, origin=data.where, eos=data.eos_id)


if __name__ == "__main__":
    run_command(main)
