"""docs/run_folder.md documents the keys that a run writes: each of them, and no other."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import get_type_hints

from pipeline.status import Status
from pipeline.train.reporting.metrics import Line
from tests.end_to_end.test_bad_steps import spoil
from tests.support import make_dataset, run_pretrain, tiny_settings, write_config

PAGE = Path(__file__).parent.parent / "docs" / "run_folder.md"


def documented(section: str) -> list[str]:
    """The keys in the table of a section."""
    text = PAGE.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)


def test_every_key_of_a_run_is_documented(dataset: Path, tmp_path: Path) -> None:
    """A run with all that writes keys of its own: a blend, a skipped step, a known peak."""
    other = make_dataset(tmp_path / "other", documents=60, seed=2)
    settings = tiny_settings(
        dataset,
        tmp_path / "run",
        data={"path": None, "sources": [{"path": str(dataset), "weight": 1}, {"path": str(other), "weight": 1}]},
        train={"on_nonfinite": "skip"},
        log={"every": 1, "peak_tflops": 1.0},
    )
    config = write_config(tmp_path / "run.yaml", settings)
    code, printed = run_pretrain(config, before=partial(spoil, {6 * 8 + 1}, float("nan")))
    assert code == 0, printed
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    written = {re.sub("^val_loss/.*", "val_loss/NAME", key) for line in lines for key in line}
    assert written == set(documented("metrics.jsonl")) == {*get_type_hints(Line), "val_loss/NAME"}
    for line in lines:
        assert {"step", "tokens", "time", "elapsed_seconds", "peak_memory_bytes"} <= line.keys()
    status = json.loads((run / "status.json").read_text())
    assert list(status) == documented("status.json") == list(Status.model_fields)
    environment = json.loads((run / "environment.json").read_text())
    starts = [f"starts.{key}" for key in environment["starts"][0]]
    assert [*environment, *starts] == documented("environment.json")


def test_no_key_is_documented_twice() -> None:
    for section in ("metrics.jsonl", "status.json", "environment.json"):
        keys = documented(section)
        assert len(keys) == len(set(keys)) > 2
