"""What explain says a step trained on is what it trained on."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pretrain
from pipeline.cli import load_config
from pipeline.data.loading.loader import RankBatch
from pipeline.data.loading.sources import open_sources
from pipeline.errors import UserError, run_command
from pipeline.explain import main, read_course
from pipeline.train.runtime import Runtime
from tests.support import make_dataset, tiny_settings, write_config

Seen = dict[int, list[list[int]]]


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Training in this process takes the signals over; give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("explain")
    return {
        name: make_dataset(folder / name, documents=60, seed=seed) for seed, name in enumerate(("red", "green", "blue"))
    }


def train(config: Path, *flags: str, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in this process, noting what each step was given: the inputs that have targets, row by row."""
    step_of = pretrain.Trainer.step

    def noting(trainer: Any, batch: RankBatch, *, step: int, lr: float) -> Any:
        seen[step] = [row for part in batch.micro_batches for row in part.inputs["tokens"].tolist()]
        return step_of(trainer, batch, step=step, lr=lr)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Trainer, "step", noting)
        loaded = load_config([str(config), *flags])
        runtime = Runtime.start(loaded)
        pretrain.pretrain(loaded, open_sources(loaded), runtime)
        runtime.stop()


def blend(folders: dict[str, Path], **weights: float) -> dict[str, Any]:
    return {"path": None, "sources": [{"path": str(folders[name]), "weight": w} for name, w in weights.items()]}


def check(run: Path, folders: dict[str, Path], seen: Seen, *, context: int) -> list[tuple[str, int, int]]:
    """Compare every step with the source files; return (dataset, epoch, row of it) of all rows in order."""
    texts = {name: (folder.with_suffix(".jsonl")).read_text().splitlines() for name, folder in folders.items()}
    course, rows, compared = read_course(run), [], 0
    for step, inputs in sorted(seen.items()):
        described = course.describe(course.rows(step))
        assert len(described) == len(inputs)
        for origins, tokens in zip(described, inputs, strict=True):
            assert len(tokens) == context
            for origin in origins:
                text = json.loads(texts[origin.dataset][origin.info.row])["text"]
                part = tokens[origin.span.place : origin.span.place + origin.span.length]
                assert len(part) == origin.span.length
                ended = part[:-1] if part[-1] == 256 else part
                assert bytes(ended).decode() in text
                compared += len(part)
            rows.append((origins[0].dataset, origins[0].epoch, origins[0].row))
    assert compared > 0.9 * sum(len(tokens) for inputs in seen.values() for tokens in inputs)  # the rest is padding
    return rows


@pytest.mark.parametrize("plan", ["concat", "pack"])
def test_explained_is_what_was_seen_through_phases_and_ramps(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: str
) -> None:
    """Three starts: a ramp and two datasets; other weights and batches; one dataset gone, another there."""
    run, context = tmp_path / "run", 32 if plan == "concat" else 160
    ramp = [{"steps": 3, "batch_tokens": 2 * context}, {"steps": 4, "batch_tokens": 5 * context}]
    settings = tiny_settings(
        folders["red"],
        run,
        data={**blend(folders, red=0.7, green=0.3), "plan": plan, "document_mask": plan == "pack"},
        model={"n_layers": 1, "d_model": 16, "context_length": context},
        train={"steps": 9, "batch_tokens": 8 * context, "batch_ramp": ramp},
        optim={"schedule": "constant", "min_lr": 0.0},
        eval={"every": 1000, "tokens": 64},
    )
    seen: Seen = {}
    train(write_config(tmp_path / "1.yaml", settings), seen=seen, monkeypatch=monkeypatch)
    assert [len(seen[step]) for step in range(1, 10)] == [2, 2, 2, 5, 5, 5, 5, 8, 8]
    settings["data"] = {**settings["data"], **blend(folders, red=0.2, green=0.8)}
    settings["train"] = {**settings["train"], "steps": 14, "batch_tokens": 6 * context}
    settings["checkpoint"] = {"every": 4, "allow_changes": True}
    train(write_config(tmp_path / "2.yaml", settings), seen=seen, monkeypatch=monkeypatch)
    settings["data"] = {**settings["data"], **blend(folders, blue=0.5, green=0.5)}
    settings["train"] = {**settings["train"], "steps": 17}
    train(write_config(tmp_path / "3.yaml", settings), seen=seen, monkeypatch=monkeypatch)
    assert [len(seen[step]) for step in range(10, 18)] == [6] * 8
    rows = check(run, folders, seen, context=context)
    assert len(rows) == len(set(rows)), "no row of a dataset twice in an epoch, through all phases"
    assert {name for name, _, _ in rows[: 2 * 3 + 5 * 4 + 8 * 2]} == {"red", "green"}
    assert {name for name, _, _ in rows[-18:]} == {"blue", "green"}
    shares = [sum(name == "green" for name, _, _ in part) / len(part) for part in (rows[:42], rows[42:72])]
    assert shares[0] < 0.5 < shares[1]
    state = json.loads((run / "checkpoints" / "step-00000017" / "state.json").read_text())
    assert [phase["row"] for phase in state["phases"]] == [0, 42, 72]
    assert [(sizes["after"], sizes["row"]) for sizes in state["batches"]] == [(0, 0), (9, 42)]
    # a fourth start that was killed before its first checkpoint: its settings count from the newest one on
    settings["data"] = {**settings["data"], **blend(folders, blue=1, green=3)}
    write_config(run / "config.yaml", {**settings, "train": {**settings["train"], "batch_tokens": 3 * context}})
    course = read_course(run)
    assert [phase.row for phase in course.blend.phases] == [0, 42, 72, 90]
    assert [course.rows(step) for step in (17, 18, 19)] == [range(84, 90), range(90, 93), range(93, 96)]


def test_the_command_names_rows_files_and_text(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    settings = tiny_settings(folders["red"], run, data=blend(folders, red=1, blue=3), train={"steps": 3})
    seen: Seen = {}
    train(write_config(tmp_path / "run.yaml", settings), seen=seen, monkeypatch=monkeypatch)

    def explain(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["explain", str(run), *flags])
        capsys.readouterr()
        try:
            run_command(main)
        except SystemExit as end:
            return f"exit {end.code}: {capsys.readouterr().err}"
        return capsys.readouterr().out

    whole = explain("--step", "2", "--text")
    assert whole.startswith("step 2: 8 rows of 32 tokens\nrow 8: ")
    assert whole.count("\nrow ") == 8
    beginning = bytes(token for token in seen[2][0] if token < 256).decode()[:10]
    assert beginning in whole.split("row 9:")[0]
    assert "blue.jsonl, row " in whole
    parts = [explain("--step", "2", "--rank", str(rank), "--world-size", "3", "--text") for rank in range(3)]
    assert "".join(part.split("\n", 1)[1] for part in parts) == whole.split("\n", 1)[1]
    assert "exit 2: error: wanted a step from 1 on" in explain("--step", "0")
    assert "exit 2: error: wanted a step from 1 on" in explain("--step", "1", "--rank", "1")
    future = explain("--step", "500")
    assert "\nthe run ends with step 3: this is what it would train on if it were extended\n" in future
    assert f"\nrow {499 * 8}: " in future
    assert "the run ends" not in explain("--step", "3")


def test_a_run_without_checkpoints_is_explained_by_its_settings(folders: dict[str, Path], tmp_path: Path) -> None:
    settings = tiny_settings(folders["red"], tmp_path, train={"batch_ramp": [{"steps": 2, "batch_tokens": 64}]})
    write_config(tmp_path / "config.yaml", settings)
    course = read_course(tmp_path)
    assert [course.rows(step) for step in (1, 2, 3)] == [range(2), range(2, 4), range(4, 12)]
    assert {origin.dataset for origins in course.describe(course.rows(3)) for origin in origins} == {"red"}


def test_datasets_that_were_moved_are_known_by_their_digests(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the first phase, one of both; what lies elsewhere under the old name is not taken for it."""
    here = {name: tmp_path / "here" / name for name in ("red", "green")}
    for name, folder in here.items():
        shutil.copytree(folders[name], folder)
    run, config = tmp_path / "run", tmp_path / "run.yaml"
    settings = tiny_settings(here["red"], run, data=blend(here, red=1, green=1), train={"steps": 4})
    train(write_config(config, settings), seen={}, monkeypatch=monkeypatch)
    settings["data"], settings["checkpoint"] = {"path": str(here["green"])}, {"every": 4, "allow_changes": True}
    train(
        write_config(config, {**settings, "train": {**settings["train"], "steps": 8}}), seen={}, monkeypatch=monkeypatch
    )

    def told(*moved: Path) -> list[list[tuple[str, int, int]]]:
        course = read_course(run, moved=[str(path) for path in moved])
        rows = [course.describe(course.rows(step)) for step in range(1, 9)]
        return [[(o.info.source, o.info.row, o.span.start) for origins in step for o in origins] for step in rows]

    before = told()
    moved = {name: tmp_path / "there" / f"{name}-2" for name in here}
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    shutil.rmtree(tmp_path / "here")
    for name, folder in moved.items():
        (tmp_path / "there" / name).rename(folder)
    with pytest.raises(UserError, match=r"(?s)no dataset folder .*green.*if it lies elsewhere now, say where: --data"):
        told()
    assert told(*moved.values()) == before
    assert len({source for step in before for source, _, _ in step}) == 2
    with pytest.raises(UserError, match=r"blue is nothing that .*run trained on: digest \w{16}, wanted one of red "):
        told(moved["green"], folders["blue"])
    shutil.copytree(folders["blue"], here["red"])
    with pytest.raises(UserError, match="is not what red was: digest"):
        told(moved["green"])
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint yet, so nothing says which data is its own"):
        told(*moved.values())
