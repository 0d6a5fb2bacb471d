"""Small sound files of every kind, from which the fuzzer makes damaged ones.

In: an empty folder. Out: one folder in it for each kind. Nothing is read from outside but the library of Python.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
import zstandard
from rich.console import Console
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.config import ModelConfig
from pipeline.data.deleting.contamination import check_contamination
from pipeline.data.deleting.dedup import deduplicate
from pipeline.data.tokenizer import load_tokenizer
from pipeline.model.hf import save_hf
from pipeline.model.transformer import build_model, initialise
from tests.support import make_dataset, run_main, tiny_settings, write_config
from tests.test_foreign import write_megatron

SHAPE = {"n_layers": 2, "n_heads": 2, "d_model": 16, "context_length": 32}
LLAMA = {"norm": "rmsnorm", "position": "rotary", "mlp": "swiglu", "bias": False}
LINES = [f"line {number} of a text that is not long: {'abc' * (number % 7)} é 三" for number in range(60)]
QUIET = Console(quiet=True)


def make_all(root: Path) -> None:
    """One folder for each kind, named after it."""
    make_prepared(root / "dataset")
    make_run(root / "checkpoint", root / "dataset" / "data")
    make_tokenizers(root / "tokenizer")
    make_hf(root / "hf", root / "tokenizer" / "trained.json")
    make_foreign(root / "foreign", root / "tokenizer" / "trained.json")
    make_corpora(root / "corpus")
    make_configs(root / "config")


def make_prepared(folder: Path) -> None:
    """A dataset with duplicates and contaminated documents deleted, so that it has files of every kind."""
    folder.mkdir()
    data = make_dataset(folder / "data", documents=60, tokenizer="train:300")
    question = json.loads((folder / "data.jsonl").read_text().splitlines()[3])["text"]
    (folder / "questions.jsonl").write_text(json.dumps({"text": question}) + "\n")
    deduplicate(data, method="near", threshold=0.8, executor=None, console=QUIET)
    files = [folder / "questions.jsonl"]
    check_contamination(data, files, delete=True, text_key="text", executor=None, console=QUIET)


def make_run(folder: Path, dataset: Path) -> None:
    """A run of 4 steps with 2 checkpoints."""
    folder.mkdir()
    settings = tiny_settings(dataset, folder / "run", model=SHAPE, train={"steps": 4}, checkpoint={"every": 2})
    child = os.fork()
    if child == 0:  # it starts threads, and a process with threads must not fork
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends
        try:
            run_main([str(write_config(folder / "run.yaml", settings))])
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert (folder / "run" / "checkpoints" / "step-00000004" / "manifest.json").exists(), "the run was not finished"


def make_tokenizers(folder: Path) -> None:
    """A trained one, and one for each kind of model that the library has."""
    folder.mkdir()
    load_tokenizer("train:300", texts=LINES).save(folder / "trained.json")
    load_tokenizer("chars", texts=LINES).save(folder / "chars.json")
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106 - no password
    words.pre_tokenizer, words.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    words.train_from_iterator(LINES, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[SEP]"]))
    words.save(str(folder / "words.json"))
    pieces = Tokenizer(models.Unigram())
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>")  # noqa: S106
    pieces.train_from_iterator(LINES, trainer)
    pieces.save(str(folder / "pieces.json"))


def make_hf(folder: Path, tokenizer_file: Path) -> None:
    """A GPT-2 in one file, and a Llama in two."""
    folder.mkdir()
    for name, more in (("gpt2", {}), ("llama", LLAMA)):
        tokenizer = load_tokenizer(str(tokenizer_file))
        model = build_model(ModelConfig.model_validate({**SHAPE, **more}), n_tokens=tokenizer.vocab_size)
        initialise(model, seed=1)
        files = tokenizer.exported(context_length=model.config.context_length)
        save_hf(model, folder / name, tokenizer_files=files, eos_id=tokenizer.eos_id)
    split_weights(folder / "llama")


def split_weights(folder: Path) -> None:
    """The weights of a Hugging Face folder in two files with an index."""
    from safetensors.torch import load_file

    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    whole.unlink()


def make_foreign(folder: Path, tokenizer_file: Path) -> None:
    """Token files of Megatron, llm.c and nanoGPT, with the tokenizer that they need."""
    folder.mkdir()
    tokenizer = load_tokenizer(str(tokenizer_file))
    tokenizer.save(folder / "tokenizer.json")
    documents = [[*tokenizer.encode(line), tokenizer.eos_id] for line in LINES]
    write_megatron(folder / "megatron", [[ids] for ids in documents])
    stream = np.concatenate([np.array(ids) for ids in documents])
    header = np.zeros(256, "<i4")
    header[:3] = (20240520, 1, len(stream))
    (folder / "llmc.bin").write_bytes(header.tobytes() + stream.astype("<u2").tobytes())
    (folder / "nano").mkdir()
    stream.astype("<u2").tofile(folder / "nano" / "train.bin")
    stream[:99].astype("<u2").tofile(folder / "nano" / "val.bin")


def make_corpora(folder: Path) -> None:
    """One file of each format that is read."""
    folder.mkdir()
    rows = [{"text": line, "number": number} for number, line in enumerate(LINES)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.txt").write_text("\n".join(LINES))
    (folder / "c.csv").write_text("text,number\n" + "".join(f'"{row["text"]}",{row["number"]}\n' for row in rows))
    (folder / "d.json").write_text(json.dumps(rows))
    pq.write_table(pa.table({"text": LINES}), folder / "e.parquet")
    (folder / "f.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "g.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))


def make_configs(folder: Path) -> None:
    """Settings with lists, numbers, words and nulls."""
    folder.mkdir()
    settings = tiny_settings(Path("data/x"), Path("runs/x"), model={**SHAPE, "windows": [16, None]})
    settings["data"] = {"sources": [{"path": "a", "weight": 0.5}, {"path": "b", "tokenizer": "bytes", "val": "c"}]}
    settings["train"]["batch_ramp"] = [{"steps": 2, "batch_tokens": 128}]
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
