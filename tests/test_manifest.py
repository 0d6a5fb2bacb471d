"""What is given for a dataset and is none is told apart, with the command that was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.data.manifest import is_dataset, read_manifest
from pipeline.errors import UserError
from tests.prepared import write_dataset

FILES = {
    "run": ("config.yaml", "environment.json", "metrics.jsonl"),
    "checkpoint": ("config.yaml", "state.json", "tokenizer.json", "manifest.json"),
    "saved": ("dataset_info.json", "state.json", "data-00000-of-00001.arrow"),
    "model": ("config.json", "model.safetensors", "tokenizer.json"),
    "nano": ("train.bin", "val.bin"),
    "unfinished": ("train-00000.bin", "tokenizer.json"),
    "begun": ("ledger.jsonl",),
    "texts": ("a.txt", "manifest.txt"),
}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for folder, names in FILES.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text("{}")
    write_dataset(tmp_path / "stories", {"train": [["one"]]})
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("run", r"is a run folder of pretrain\.py: .* python sample\.py .*run writes text with it; wanted"),
        ("checkpoint", r"is a checkpoint of pretrain\.py: python sample\.py .*checkpoint writes"),
        ("saved", r"is text of save_to_disk: python data_prep\.py .*saved --output DIR prepares it"),
        ("model", "is a Hugging Face model: "),
        ("nano", "is data of another tool: pretrain"),
        ("unfinished", r"is not complete: it has no manifest\.json; run the command"),
        ("begun", "is not complete"),
        ("texts", "is no dataset: it has neither"),
        ("texts/a.txt", r"a\.txt is a file, wanted the folder of a dataset: python data_prep\.py .*a\.txt --output"),
        ("stories/train-00000.bin", r"is one file of a dataset; name its folder, .*stories$"),
        ("storys", r"no dataset folder .*storys; did you mean 'stories'\?$"),
        ("text", "no dataset folder .*text; python data_prep.py INPUT"),  # texts is near, and no dataset
        ("soup", "no dataset folder .*soup; python data_prep.py INPUT"),  # stories is one, and not near
        ("nowhere/stories", "no dataset folder .*stories; python data_prep.py INPUT"),
    ],
)
def test_what_is_no_dataset_is_called_by_its_name(folders: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_manifest(folders / name)


def test_datasets_are_known_by_their_files(folders: Path) -> None:
    assert {path.name for path in folders.iterdir() if is_dataset(path)} == {"stories", "unfinished"}
    assert read_manifest(folders / "stories").records == 1
