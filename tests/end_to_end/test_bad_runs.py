"""A user's mistake: one message that says what to do, exit code 2, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pipeline.data.preparing.prepare import prepare
from pipeline.data.preparing.request import Request
from pipeline.data.tokenizer import load_tokenizer
from pipeline.locks import locked
from pipeline.train.running import run as run_module
from pipeline.train.saving.checkpoint import list_checkpoints, verify
from tests.support import make_dataset, record, run_pretrain, tiny_settings, write_config, write_corpus


def mistake(config: Path, *flags: str, before: Callable[[], None] | None = None) -> str:
    """Run, expect exit code 2 and a message without a traceback."""
    code, printed = run_pretrain(config, *flags, before=before)
    assert code == 2, printed
    assert "Traceback" not in printed
    assert printed.count("error: ") == 1
    return printed


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def config(dataset: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path / "run.yaml", tiny_settings(dataset, tmp_path / "run"))


@pytest.fixture
def finished(config: Path) -> Path:
    code, printed = run_pretrain(config)
    assert code == 0, printed
    return config.parent / "run"


def test_unknown_key(config: Path) -> None:
    config.write_text(config.read_text().replace("n_layers", "n_layerz"))
    assert "model.n_layerz: unknown key; did you mean 'n_layers'?" in mistake(config)
    assert not (config.parent / "run").exists()


def test_negative_size(config: Path) -> None:
    assert "--model.d-model: input should be greater than 0, got '-32'" in mistake(config, "--model.d-model", "-32")


def test_missing_config(tmp_path: Path) -> None:
    assert "no config file" in mistake(tmp_path / "none.yaml")


def test_missing_data_folder(config: Path, dataset: Path) -> None:
    printed = mistake(config, "--data.path", str(dataset) + "x")
    assert "no dataset folder" in printed
    assert "did you mean 'dataset'" in printed


def test_data_folder_without_manifest(config: Path, dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "copy")
    (tmp_path / "copy" / "manifest.json").unlink()
    assert "is not complete" in mistake(config, "--data.path", str(tmp_path / "copy"))


def test_truncated_bin(config: Path, dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "copy")
    file = tmp_path / "copy" / "train-00000.bin"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-2])
    printed = mistake(config, "--data.path", str(tmp_path / "copy"))
    assert f"train-00000.bin has {size - 2} bytes, expected {size}" in printed


def test_vocabulary_larger_than_the_models(config: Path) -> None:
    printed = mistake(config, "--model.vocab-size", "200")
    assert "model.vocab_size is 200" in printed
    assert "257 tokens" in printed


def test_other_tokenizer_than_the_checkpoints(finished: Path, config: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    other = tmp_path / "other"
    request = Request(inputs=(str(corpus),), output=other, tokenizer="chars", val_fraction=0.2)
    prepare(request, console=Console(quiet=True))
    before = files_of(finished)
    assert "the tokenizer of" in mistake(config, "--data.path", str(other), "--train.steps", "14")
    assert files_of(finished) == before


def test_another_end_of_documents_than_the_checkpoints(config: Path, tmp_path: Path) -> None:
    text = load_tokenizer("bytes", eos=None)
    definition = json.loads(json.dumps(text.definition))
    definition["added_tokens"].append({**definition["added_tokens"][0], "id": 257, "content": "<other>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    np.tile(np.arange(65, 90, dtype=np.uint16), 100).tofile(tmp_path / "x.bin")
    about = {"path": str(tmp_path / "x.bin"), "tokenizer": str(tmp_path / "tokenizer.json"), "dtype": "uint16"}
    write_config(config, tiny_settings(tmp_path, tmp_path / "run", data={**about, "eos": "<|endoftext|>"}))
    code, printed = run_pretrain(config, "--train.steps", "4")
    assert code == 0, printed
    printed = mistake(config, "--data.eos", "<other>", "--checkpoint.allow-changes", "true", "--train.steps", "4")
    assert "end with id 257" in printed
    assert "end with 256" in printed


def test_other_data_than_the_checkpoints(finished: Path, config: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", seed=2)
    other = tmp_path / "other"
    request = Request(inputs=(str(corpus),), output=other, tokenizer="bytes", val_fraction=0.2)
    prepare(request, console=Console(quiet=True))
    assert "the data of" in mistake(config, "--data.path", str(other))


def test_other_weights_need_a_word_and_another_plan_is_another_run(dataset: Path, config: Path, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "other", documents=60, seed=2)
    sources = [{"path": str(dataset), "weight": 2}, {"path": str(other), "weight": 1}]
    settings = tiny_settings(dataset, tmp_path / "run", data={"path": None, "sources": sources})
    write_config(config, settings)
    assert run_pretrain(config)[0] == 0
    again = ("--data.sources.0.weight", "4", "--data.sources.1.weight", "2")  # the same shares
    assert "already at step 12" in run_pretrain(config, *again)[1]
    printed = mistake(config, "--data.sources.0.weight", "1")
    assert "data.sources: 66.67% dataset, 33.33% other -> 50.00% dataset, 50.00% other" in printed
    assert "--checkpoint.allow-changes true" in printed
    assert "belongs to another run" in mistake(config, "--data.plan", "pack", "--checkpoint.allow-changes", "true")
    flags = ("--train.steps", "14", "--optim.horizon-steps", "12", "--checkpoint.allow-changes", "true")
    code, printed = run_pretrain(config, "--data.sources.0.weight", "1", *flags)
    assert code == 0, printed
    assert "changed on resuming: data.sources: 66.67% dataset" in printed
    alone = write_config(tmp_path / "alone.yaml", tiny_settings(dataset, tmp_path / "run"))
    assert "the data of" in mistake(alone)


def test_other_model_or_seed_is_another_run(finished: Path, config: Path) -> None:
    before = files_of(finished)
    printed = mistake(config, "--model.n-layers", "3", "--seed", "7")
    assert "belongs to another run" in printed
    assert "model.n_layers: 2 -> 3" in printed
    assert "seed: 1337 -> 7" in printed
    assert files_of(finished) == before


def test_other_settings_need_a_word(finished: Path, config: Path) -> None:
    flags = ("--train.steps", "14", "--optim.lr", "1e-3", "--optim.horizon-steps", "12")
    assert "optim.lr: 0.003 -> 0.001" in mistake(config, *flags)
    code, printed = run_pretrain(config, *flags, "--checkpoint.allow-changes", "true")
    assert code == 0, printed
    assert "changed on resuming: optim.lr: 0.003 -> 0.001" in printed
    assert record(finished)[-1]["step"] == 14


def test_flipped_byte_falls_back_to_the_previous_checkpoint(finished: Path, config: Path) -> None:
    whole = record(finished)
    damaged = list_checkpoints(finished / "checkpoints")[-1]
    file = next((damaged / "model").iterdir())
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    code, printed = run_pretrain(config)
    assert code == 0, printed
    assert f"warning: checkpoint {damaged} is damaged and passed over" in printed
    assert file.name in printed
    assert "step-00000008" in printed
    assert record(finished) == whole
    assert verify(damaged) == []
    assert damaged.with_name(damaged.name + ".damaged").is_dir()


def test_every_checkpoint_damaged_is_refused(finished: Path, config: Path) -> None:
    for checkpoint in list_checkpoints(finished / "checkpoints"):
        (checkpoint / "state.json").write_text("{}")
    assert "every checkpoint in" in mistake(config)


def test_full_disk_while_saving(finished: Path, config: Path, tmp_path: Path) -> None:
    """A limit on file size stands in for the full disk: it fails in the middle of a write, without privileges."""
    before = files_of(finished / "checkpoints")
    limited = tmp_path / "limited.txt"
    code, printed = run_limited(config, limited, "--train.steps", "16", "--optim.horizon-steps", "12")
    assert code == 2, printed
    assert "could not save" in printed
    assert "Traceback" not in printed
    assert f"the last intact checkpoint is {list_checkpoints(finished / 'checkpoints')[-1]}" in printed
    assert files_of(finished / "checkpoints") == before
    code, printed = run_pretrain(config, "--train.steps", "16", "--optim.horizon-steps", "12")
    assert code == 0, printed


def run_limited(config: Path, output: Path, *flags: str) -> tuple[int, str]:
    from tests.support import FORKS

    process = FORKS.Process(target=_limited, args=([str(config), *flags], str(output)))
    process.start()
    process.join(240)
    return process.exitcode or 0, output.read_text()


def _limited(arguments: list[str], output: str) -> None:
    import resource

    from tests.support import _pretrain_into

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    _pretrain_into(arguments, output)


def test_non_finite_loss_names_step_and_documents(dataset: Path, tmp_path: Path) -> None:
    settings = tiny_settings(dataset, tmp_path / "run", optim={"lr": 1e30, "clip_norm": None, "warmup_steps": 0})
    printed = mistake(write_config(tmp_path / "run.yaml", settings))
    assert "The update was not applied" in printed
    assert "corpus.jsonl, row " in printed
    step = int(printed.split("error: step ")[1].split(":")[0])
    assert step >= 2
    assert all(np.isfinite(line["loss"]) for line in record(tmp_path / "run") if "loss" in line)
    assert max(line["step"] for line in record(tmp_path / "run")) == step - 1


def test_no_cuda(config: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    assert "no CUDA device" in mistake(config, "--train.device", "cuda")
    assert "fp16 needs CUDA" in mistake(config, "--train.precision", "fp16")


def test_run_folder_describes_itself(finished: Path) -> None:
    environment: dict[str, Any] = json.loads((finished / "environment.json").read_text())
    assert len(environment["run_id"]) == 12
    assert environment["starts"][0]["from_step"] == 0
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "config.yaml").is_file()


def test_run_folder_that_cannot_be_one(config: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    assert "cannot use" in mistake(config, "--run-dir", str(tmp_path / "taken"))
    assert "cannot use" in mistake(config, "--run-dir", str(tmp_path / "taken" / "below"))
    assert (tmp_path / "taken").read_text() == "a file"


def impatient() -> None:
    run_module.PATIENCE = 1.0


def test_second_process_on_one_run_waits_and_is_refused(config: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run", ask_of_other_hosts=False):
        printed = mistake(config, before=impatient)
        assert printed.index("waiting 1 s: ") < printed.index("error: ")
        assert printed.count(f"is being written by process {os.getpid()} on ") == 2
        assert not (tmp_path / "run" / "status.json").exists()  # that is the other one's to tell


def test_lost_checkpoints_do_not_cost_the_record(finished: Path, config: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    shutil.move(finished / "checkpoints", finished / "elsewhere")
    code, printed = run_pretrain(config)
    assert code == 0, printed
    assert "the checkpoints of an earlier run are gone" in printed
    assert (finished / "metrics.1.jsonl").read_bytes() == before


def test_extending_a_schedule_without_horizon_needs_no_word(dataset: Path, tmp_path: Path) -> None:
    settings = tiny_settings(dataset, tmp_path / "run", optim={"schedule": "constant", "min_lr": 0.0})
    config = write_config(tmp_path / "run.yaml", settings)
    assert run_pretrain(config)[0] == 0
    code, printed = run_pretrain(config, "--train.steps", "14", "--model.d-ff", "128")  # the default, written out
    assert code == 0, printed


def test_other_batch_with_lengths_in_tokens_is_refused(dataset: Path, tmp_path: Path) -> None:
    train = {"steps": None, "tokens": 12 * 256}
    config = write_config(tmp_path / "run.yaml", tiny_settings(dataset, tmp_path / "run", train=train))
    assert run_pretrain(config)[0] == 0
    flags = ("--train.batch-tokens", "128", "--checkpoint.allow-changes", "true")
    assert "counted in steps of one course of batch sizes" in mistake(config, *flags)


def test_micro_batch_is_part_of_the_run_when_there_is_dropout(dataset: Path, tmp_path: Path) -> None:
    settings = tiny_settings(dataset, tmp_path / "run", model={"dropout": 0.1})
    config = write_config(tmp_path / "run.yaml", settings)
    assert run_pretrain(config)[0] == 0
    assert "train.micro_batch: 8 -> 4" in mistake(config, "--train.micro-batch", "4")


def test_other_precision_than_the_checkpoints_needs_a_word(finished: Path, config: Path) -> None:
    printed = mistake(config, "--train.precision", "bf16")
    assert "train.precision: torch.float32 -> torch.bfloat16" in printed
