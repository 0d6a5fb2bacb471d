"""The house rules of docs/architecture.md, read off the syntax tree."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "errors": 0,
    "seeds": 0,
    "names": 0,
    "flags": 0,
    "section": 0,
    "ramp": 0,
    "config_data": 0,
    "config_train": 0,
    "config": 0,
    "cli": 0,
    "files": 0,
    "credentials": 0,
    "untrusted": 0,
    "locks": 0,
    "status": 0,
    "data": 1,
    "model": 1,
    "train": 2,
    "generate": 2,
    "export": 3,
    "explain": 3,
}
ROOMS = {  # "": what lies beside the rooms
    "data": {"": 0, "reading": 1, "exchange": 1, "loading": 2, "deleting": 2, "preparing": 3},
    "train": {"processes": 0, "": 1, "saving": 2, "reporting": 3, "running": 4},
}
MAY_TORCH = {"loader", "objectives"}  # of the data room
DOORS = {
    "accelerate": {"train/runtime.py", "train/reporting/trackers.py"},
    "distributed": {"data/preparing/executors.py"},
    "datasets": {"data/reading/hub.py"},
    "filelock": {"locks.py"},
    "tokenizers": {"data/tokenizer.py", "data/tokenizer_library.py", "data/tokenizer_training.py"},
    "gigatoken": {"data/preparing/encoder.py"},
    "huggingface_hub": {"data/reading/hub.py", "data/tokenizer_files.py"},
    "fsspec": {"train/saving/storage.py"},
    "tiktoken": set(),
    "wandb": {"train/reporting/trackers.py"},
    "tensorboard": set(),
    "matplotlib": {"train/reporting/curves.py"},
    "transformers": set(),
    "pickle": set(),
}
ENVIRONMENT = {
    "train/processes/launched.py",
    "data/preparing/executors.py",  # sets the thread count of its own workers
}


def modules() -> list[Path]:
    return sorted((ROOT / "pipeline").rglob("*.py"))


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def room(module: str) -> str:
    return module.split(".")[1]


def inner_room(parts: list[str]) -> str:
    """The room within data or train of `pipeline.data.ROOM.module`, "" for what lies beside the rooms."""
    return parts[2] if len(parts) > 2 and parts[2] in ROOMS[parts[1]] else ""


def faults_of(path: str, source: str) -> list[str]:
    """Broken rules of one module; `path` is relative to pipeline/."""
    tree = ast.parse(source)
    own = path.split("/")[0].removesuffix(".py")
    names = imports(tree)
    found = []
    for name in names:
        if name.startswith("pipeline."):
            other = room(name)
            if FLOORS[other] > FLOORS[own] or (FLOORS[other] == FLOORS[own] > 0 and other != own):
                found.append(f"{path} must not import {name}")
            if own == other and own in ROOMS:
                mine, its = inner_room(["pipeline", *path.split("/")]), inner_room(name.split("."))
                floors = ROOMS[own]
                if floors[its] > floors[mine] or (floors[its] == floors[mine] and mine != its):
                    found.append(f"{path} must not import {name}")
        package = name.split(".")[0]
        if package in DOORS and path not in DOORS[package]:
            found.append(f"{path} must not import {package}")
        if package == "torch" and own == "data" and Path(path).stem not in MAY_TORCH:
            found.append(f"{path} must not import torch")
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    if {"environ", "getenv"} & (attributes | {name.split(".")[-1] for name in names}) and path not in ENVIRONMENT:
        found.append(f"{path} must not read the environment")
    found += [f"{path}:{node.lineno} works at import" for node in tree.body if not _declares(node)]
    return found


def _declares(node: ast.stmt) -> bool:
    declarations = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    if isinstance(node, declarations):
        return True
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)  # a docstring
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_module_keeps_the_rules(path: Path) -> None:
    assert faults_of(str(path.relative_to(ROOT / "pipeline")), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("data/loading/loader.py", "from pipeline.model.layers import MLP"),
        ("model/layers.py", "import pipeline.data.shards"),
        ("config.py", "from pipeline.data import shards"),
        ("data/shards.py", "from pipeline.data.reading.plan import Unit"),
        ("data/reading/plan.py", "from pipeline.data.exchange.foreign import open_foreign"),
        ("data/loading/rows.py", "from pipeline.data.preparing.unit import prepare_unit"),
        ("generate/decode.py", "from pipeline.train.runtime import Runtime"),
        ("train/processes/job.py", "from pipeline.train.runtime import Runtime"),
        ("train/step.py", "from pipeline.train.saving.store import CheckpointStore"),
        ("train/saving/store.py", "from pipeline.train.running.run import Run"),
        ("data/shards.py", "import torch"),
        ("data/preparing/prepare.py", "from torch import nn"),
        ("train/step.py", "from accelerate import Accelerator"),
        ("model/hf.py", "import transformers"),
        ("train/step.py", "import os\nX = os.environ['HOME']"),
        ("train/step.py", "from os import environ"),
        ("data/reading/plan.py", "import torch"),
        ("train/step.py", "import tensorboard"),
        ("train/step.py", "import pickle"),
        ("train/step.py", "print('imported')"),
    ],
)
def test_broken_rule_is_found(path: str, source: str) -> None:
    assert faults_of(path, source) != []


def test_no_file_is_long() -> None:
    files = [*modules(), *ROOT.glob("*.py")]
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_training_loop_fits_one_screen() -> None:
    tree = ast.parse((ROOT / "pretrain.py").read_text(encoding="utf-8"))
    loop = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert loop.end_lineno is not None
    assert loop.end_lineno - loop.lineno + 1 <= 35


def test_data_preparation_starts_without_torch() -> None:
    import subprocess

    code = "import sys; sys.argv = ['data_prep.py']; import data_prep; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
