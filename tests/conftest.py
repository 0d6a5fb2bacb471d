from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from rich.console import Console

from pipeline.data.preparing.prepare import prepare
from pipeline.data.preparing.request import Request
from tests.support import write_corpus

# The suite runs in as many processes as there are cores; two threads each would wait for each other more than work.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "offline"  # before any process is forked that runs pretrain.py
torch.set_num_threads(1)
hypothesis.settings.register_profile("untimed")  # another process may hold an example up
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 short documents as bytes, a fifth of them held out."""
    folder = tmp_path_factory.mktemp("data")
    corpus = write_corpus(folder / "corpus.jsonl")
    output = folder / "dataset"
    request = Request(inputs=(str(corpus),), output=output, tokenizer="bytes", val_fraction=0.2)
    prepare(request, console=Console(quiet=True))
    return output


@pytest.fixture(autouse=True)
def _garbage_is_collected() -> Iterator[None]:
    """A run that was not stopped would leave all later tests of the process without the garbage collector."""
    yield
    left_on = gc.isenabled()
    gc.enable()
    assert left_on, "the garbage collector was left off: call Runtime.stop"
