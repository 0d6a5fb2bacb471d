"""Whatever is written has the mode that the umask gives, also what goes through a temporary file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import data_prep
from pipeline import export
from tests.support import run_pretrain, tiny_settings, write_config, write_corpus


@pytest.fixture(params=[0o022, 0o027], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def wrong_modes(folder: Path, umask: int) -> dict[str, str]:
    """Files and folders whose mode is not that of a plain `open` or `mkdir`."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        mode, plain = path.stat().st_mode & 0o777, 0o777 if path.is_dir() else 0o666
        if mode != plain & ~umask:
            found[str(path)] = oct(mode)
    return found


def test_every_file_has_the_mode_that_umask_gives(
    umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepare(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["data_prep.py", *arguments])
        data_prep.main()

    corpus, data, run = tmp_path / "corpus.jsonl", str(tmp_path / "data"), tmp_path / "run"
    write_corpus(corpus)
    with corpus.open("a") as file:
        file.write("no record\n" + corpus.read_text()[:2000].split("\n")[0] + "\n")  # for quarantine and dedup
    prepare(
        str(corpus), "--output", data, "--tokenizer", "train:300", "--val-fraction", "0.2", "--max-bad", "0.5",
        "--dedup", "exact",
    )  # fmt: skip
    prepare("--export", data, "--output", str(tmp_path / "llmc"))
    shape = {"norm": "layernorm", "position": "learned", "mlp": "gelu", "bias": True, "tie_embeddings": True}
    config = write_config(tmp_path / "run.yaml", tiny_settings(Path(data), run, model=shape))
    code, printed = run_pretrain(config, "--train.steps", "4", before=partial(os.umask, umask))
    assert code == 0, printed
    monkeypatch.setattr(sys, "argv", ["export", str(run), str(tmp_path / "hf")])
    export.main()
    assert (tmp_path / "hf" / "model.safetensors").exists()
    for name in ("data", "llmc", "run", "hf"):
        assert wrong_modes(tmp_path / name, umask) == {}
