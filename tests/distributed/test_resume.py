"""Saved under any layout, resumed under any other: the run is the same; under its own, bit by bit.

A layout is a number of ranks and a strategy. Every layout trains to the middle and, undisturbed, to the end; every
layout then goes on from the middle of every other. What is compared are loss, gradient norm and validation loss.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import pretrain
from pipeline.cli import config_from_values, read_yaml
from pipeline.data.loading.sources import open_sources
from pipeline.train.processes.job import Job
from pipeline.train.running import run as run_module
from pipeline.train.runtime import Runtime
from pipeline.train.saving.checkpoint import list_checkpoints
from tests.support import make_dataset, record, run_ranks, tiny_settings, write_config

pytestmark = pytest.mark.slow

MIDDLE, END = 3, 6
LAYOUTS = ((1, "single"), (1, "ddp"), (1, "fsdp"), (2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp"), (4, "hsdp"))
DROPOUTS = (0.0, 0.1)


def name_of(layout: tuple[int, str], dropout: float = 0.0) -> str:
    return f"{layout[0]}-{layout[1]}-{dropout}"


def settings_of(folder: Path, name: str, layout: tuple[int, str], *, steps: int, dropout: float = 0.0) -> str:
    """A config: 261 tokens that neither 2 nor 4 ranks divide, 3 layers, uneven rows, accumulation, clipping."""
    parallel: dict[str, Any] = {"strategy": layout[1]}
    if layout[1] == "hsdp":
        parallel["shard_ranks"] = 2
    settings = tiny_settings(
        folder / "words",
        folder / name,
        model={"n_layers": 3, "dropout": dropout, "vocab_size": 261},
        optim={"horizon_steps": END, "clip_norm": 0.5},
        train={"steps": steps, "batch_tokens": 7 * 32, "micro_batch": 1},
        parallel=parallel,
        checkpoint={"every": 100},
        eval={"every": 100},
    )
    return str(write_config(folder / f"{name}.yaml", settings))


def run_all(job: Job) -> None:
    """In each rank: the runs of a list one after the other, in one process group; some begin with another's folder."""
    runs = json.loads(Path(sys.argv[1]).read_text())
    runtime = None
    run_module.draw_curves = lambda *_, **__: None  # a hundred pictures that nobody looks at take half a minute
    for config_file, copied_from in runs:
        config = config_from_values(read_yaml(Path(config_file)), origin=config_file)
        runtime = runtime or Runtime.start(config, job)
        if copied_from and runtime.is_main:
            shutil.copytree(copied_from, config.run_dir)
        runtime.barrier()
        pretrain.pretrain(config, open_sources(config), runtime)
    assert runtime is not None
    runtime.stop()


def launch(folder: Path, ranks: int, runs: list[tuple[str, str | None]], *, label: str) -> None:
    # sharding over one rank needs a process group, which the first run decides
    runs = sorted(runs, key=lambda run: "-fsdp" not in Path(run[0]).stem.split("-to-")[-1])
    listed = folder / f"{label}-{ranks}.json"
    listed.write_text(json.dumps(runs))
    code, printed = run_ranks(ranks, str(listed), output=folder / f"{label}-{ranks}.txt", main=run_all)
    assert code == 0, printed[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    make_dataset(folder / "words", documents=80)
    for ranks in (1, 2, 4):
        runs: list[tuple[str, str | None]] = []
        for layout in (one for one in LAYOUTS if one[0] == ranks):
            for dropout in DROPOUTS:
                name = name_of(layout, dropout)
                runs.append((settings_of(folder, f"full-{name}", layout, steps=END, dropout=dropout), None))
                runs.append((settings_of(folder, f"half-{name}", layout, steps=MIDDLE, dropout=dropout), None))
        launch(folder, ranks, runs, label="first")
    for ranks in (1, 2, 4):
        runs = []
        for layout in (one for one in LAYOUTS if one[0] == ranks):
            for other in LAYOUTS:
                name = f"{name_of(other)}-to-{name_of(layout)}"
                runs.append((settings_of(folder, name, layout, steps=END), str(folder / f"half-{name_of(other)}")))
            name = f"{name_of(layout, 0.1)}-to-{name_of(layout, 0.1)}"
            half = str(folder / f"half-{name_of(layout, 0.1)}")
            runs.append((settings_of(folder, name, layout, steps=END, dropout=0.1), half))
        launch(folder, ranks, runs, label="then")
    return folder


@pytest.mark.parametrize("resumed", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("saved", LAYOUTS, ids=name_of)
def test_any_layout_goes_on_from_any_other(folder: Path, saved: tuple[int, str], resumed: tuple[int, str]) -> None:
    undisturbed = record(folder / f"full-{name_of((1, 'single'))}")
    found = record(folder / f"{name_of(saved)}-to-{name_of(resumed)}")
    # the evaluation at MIDDLE belongs to a run that ended there
    found = [line for line in found if not ("val_loss" in line and line["step"] == MIDDLE)]
    assert [line["step"] for line in found] == [*range(1, END + 1), END]
    for ours, reference in zip(found, undisturbed, strict=True):
        assert ours.keys() == reference.keys()
        for key, expected in reference.items():
            assert ours[key] == pytest.approx(expected, rel=1e-6), (reference["step"], key)


@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_the_same_layout_goes_on_bit_by_bit(folder: Path, layout: tuple[int, str], dropout: float) -> None:
    name = name_of(layout, dropout)
    undisturbed, resumed = folder / f"full-{name}", folder / f"{name}-to-{name}"
    lines = [line for line in record(resumed) if not ("val_loss" in line and line["step"] == MIDDLE)]
    assert lines == record(undisturbed)
    final = [list_checkpoints(run / "checkpoints")[-1] for run in (undisturbed, resumed)]
    files = [sorted(path.relative_to(one) for path in one.rglob("*.safetensors")) for one in final]
    assert files[0] == files[1]
    assert len(files[0]) == 2 * layout[0], "a file per rank for weights and one for moments"
    for file in files[0]:
        assert (final[0] / file).read_bytes() == (final[1] / file).read_bytes(), file


def test_dropout_and_layouts_are_what_the_comparison_takes_them_for(folder: Path) -> None:
    """Losses with dropout differ from those without, and ranks did share the rows."""
    plain, dropped = (record(folder / f"full-{name_of((2, 'fsdp'), dropout)}") for dropout in DROPOUTS)
    assert plain[3]["loss"] != dropped[3]["loss"]
    printed = (folder / "first-4.txt").read_text()
    for expected in ("strategy: hsdp", "strategy: fsdp", "strategy: ddp", "4 ranks x 2 accumulated"):
        assert expected in printed
