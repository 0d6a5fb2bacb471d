"""Write a trained model as a Hugging Face folder.

    python -m pipeline.export RUN|CHECKPOINT FOLDER

In: a run folder (its newest checkpoint) or a checkpoint. Out: a new folder that `AutoModelForCausalLM` and
`AutoTokenizer` of transformers read, and `sample.py` too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from pipeline.data.tokenizer import TextTokenizer
from pipeline.data.tokenizer_schema import LARGEST_TOKENIZER
from pipeline.errors import run_command
from pipeline.model.hf import save_hf
from pipeline.train.saving.checkpoint import load_model, read_state, resolve_checkpoint
from pipeline.train.saving.storage import Location, read_bytes


@dataclass(frozen=True)
class Arguments:
    """Write a trained model as a Hugging Face folder: safetensors, config.json and tokenizer files."""

    source: tyro.conf.Positional[str]
    """Run folder (its newest checkpoint) or checkpoint; also an address: s3://..."""
    folder: tyro.conf.Positional[Path]
    """Folder to make."""


def main() -> None:
    """Checkpoint in, folder out."""
    arguments = tyro.cli(Arguments, prog="python -m pipeline.export")
    checkpoint = resolve_checkpoint(arguments.source)
    export(checkpoint, arguments.folder)
    print(f"{checkpoint} -> {arguments.folder}")


def export(checkpoint: Location, folder: Path) -> None:
    """Make `folder` of a checkpoint. Raises `UserError` for a damaged one, and as `save_hf` does."""
    model, _ = load_model(checkpoint, device=torch.device("cpu"))
    eos_id = read_state(checkpoint).tokenizer_eos_id
    file = checkpoint / "tokenizer.json"
    tokenizer = TextTokenizer.from_content(read_bytes(file, limit=LARGEST_TOKENIZER), origin=file, eos=eos_id)
    files = tokenizer.exported(context_length=model.config.context_length)
    save_hf(model, folder, tokenizer_files=files, eos_id=eos_id)


if __name__ == "__main__":
    run_command(main)
