"""sample.py and the export, as a user starts them: from a run, a checkpoint and a Hugging Face folder."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import sample
from pipeline import export
from pipeline.data.dataset import open_dataset
from pipeline.data.preparing.prepare import prepare
from pipeline.data.preparing.request import Request
from pipeline.data.tokenizer import load_tokenizer
from pipeline.errors import run_command
from pipeline.generate.decode import Options, generate
from pipeline.model.hf import load_hf
from pipeline.train.saving.checkpoint import Findings, list_checkpoints, load_model
from tests.support import run_pretrain, tiny_settings, write_config
from tests.tokenizer_shapes import ENDS, write_folder

ROOT = Path(__file__).parent.parent.parent
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run_dir(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for 12 steps on bytes."""
    folder = tmp_path_factory.mktemp("run")
    run_dir = folder / "trained"
    code, printed = run_pretrain(write_config(folder / "config.yaml", tiny_settings(dataset, run_dir)))
    assert code == 0, printed
    return run_dir


@pytest.fixture(scope="module")
def hf_folder(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "hf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export", str(run_dir), str(folder)])
        run_command(export.main)
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run sample.py in this process: exit code, standard output, standard error."""

    def call(*arguments: str | Path, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = 0
        try:
            run_command(sample.main)
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return call


def records(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.splitlines()]


def test_run_checkpoint_and_export_write_the_same_text(run_dir: Path, hf_folder: Path, command: Command) -> None:
    checkpoint = list_checkpoints(run_dir / "checkpoints")[-1]
    flags = ("--prompt", "the ", "--max-new-tokens", "60", "--temperature", "0.8")
    texts = [command(source, *flags)[1] for source in (run_dir, checkpoint, hf_folder)]
    assert len(texts[0]) > 20
    assert texts[0].startswith("the ")
    assert texts[0] == texts[1] == texts[2]
    assert command(run_dir, *flags, "--no-cache")[1] == texts[0]
    assert command(run_dir, *flags, "--seed", "3")[1] != texts[0]


def test_the_export_is_the_trained_model_in_transformers(run_dir: Path, hf_folder: Path) -> None:
    model, _ = load_model(list_checkpoints(run_dir / "checkpoints")[-1], device=torch.device("cpu"))
    theirs = AutoModelForCausalLM.from_pretrained(hf_folder).eval()
    tokens = torch.randint(0, 257, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (model(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    assert torch.equal(load_hf(hf_folder).embedding.tokens.weight[:257], model.embedding.tokens.weight[:257])


def test_json_lines_hold_every_sample_in_order(hf_folder: Path, command: Command) -> None:
    code, printed, errors = command(
        hf_folder, "--prompt", "a", "bé", "--num-samples", "2", "--max-new-tokens", "12", "--seed", "9", "--json"
    )
    made = records(printed)
    assert (code, errors) == (0, "")
    assert [record["prompt"] for record in made] == ["a", "a", "bé", "bé"]
    tokenizer, options = load_tokenizer("bytes"), Options(max_new_tokens=12, num_samples=2, seed=9)
    prompts = [tokenizer.encode("a"), tokenizer.encode("bé")]
    expected: dict[tuple[int, int], list[int]] = {}
    for event in generate(load_hf(hf_folder), prompts, options=options, eos_ids=[256]):
        expected.setdefault((event.prompt, event.sample), []).extend([] if event.id is None else [event.id])
    assert [record["tokens"] for record in made] == [expected[key] for key in sorted(expected)]
    for record in made:
        assert set(record) == {"prompt", "text", "tokens", "finish_reason", "seed"}
        assert record["text"] == tokenizer.decode(record["tokens"])
        assert record["finish_reason"] in ("length", "eos")
        assert record["seed"] == 9


def test_several_texts_are_printed_under_headers(hf_folder: Path, command: Command) -> None:
    printed = command(hf_folder, "--prompt", "a", "--prompt", "b", "--num-samples", "2", "--max-new-tokens", "3")[1]
    headers = [line for line in printed.splitlines() if line.startswith("--- prompt")]
    assert headers == [f"--- prompt {p}, sample {s} ---" for p in (0, 1) for s in (0, 1)]
    assert printed.splitlines()[1].startswith("a")


def test_prompts_come_from_flags_files_and_standard_input(hf_folder: Path, command: Command, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("zwei\nZeilen é\n".encode())
    short = ("--max-new-tokens", "1", "--json")

    def prompts(*arguments: str | Path, stdin: bytes = b"") -> list[str]:
        code, printed, errors = command(hf_folder, *arguments, *short, stdin=stdin)
        assert code == 0, errors
        return [record["prompt"] for record in records(printed)]

    assert prompts(stdin=b"piped\r\n") == ["piped"]
    assert prompts("--prompt", "a", "-", stdin=b"piped") == ["a", "piped"]
    assert prompts("--prompt", "a", stdin=b"not asked for") == ["a"]
    assert prompts("--prompt_file", file) == ["zwei\nZeilen é"]
    assert prompts("--prompt", "a", "--prompt-file", file) == ["a", "zwei\nZeilen é"]
    assert prompts(stdin=b"") == [""]


def test_stop_and_eos(hf_folder: Path, command: Command) -> None:
    def one(*arguments: str) -> dict[str, Any]:
        flags = ("--prompt", "the", "--max-new-tokens", "200", "--json", "--top-k", "256")
        (record,) = records(command(hf_folder, *flags, *arguments)[1])
        return record

    whole = one("--ignore-eos", "--top-k", "300")
    assert whole["finish_reason"] == "length"
    assert len(whole["tokens"]) == 200
    stop = whole["text"][30]
    stopped = one("--ignore-eos", "--top-k", "300", "--stop", "never there", stop)
    assert stopped["text"] == whole["text"][: whole["text"].index(stop)]
    assert stopped["finish_reason"] == "stop"
    hot = ("--temperature", "20", "--max-new-tokens", "3000", "--top-k", "300")  # nearly uniform: EOS will come
    ended = one(*hot)
    assert ended["finish_reason"] == "eos"
    assert 256 not in ended["tokens"]
    assert "<|endoftext|>" not in ended["text"]
    assert "<|endoftext|>" in one(*hot, "--ignore-eos")["text"]


def test_bf16_writes_text_too(run_dir: Path, command: Command) -> None:
    code, printed, _ = command(run_dir, "--prompt", "the", "--precision", "bf16", "--temperature", "0")
    assert code == 0
    assert len(printed) > 100


def test_mistakes_end_with_one_message_and_code_2(
    run_dir: Path, hf_folder: Path, command: Command, tmp_path: Path
) -> None:
    def refused(*arguments: str | Path, stdin: bytes = b"") -> str:
        code, printed, errors = command(*arguments, stdin=stdin)
        assert (code, printed) == (2, "")
        assert "Traceback" not in errors
        return " ".join(errors.replace("│", " ").split())

    assert "did you mean" in refused(run_dir.with_name("trainde"), "--prompt", "a")
    assert "neither a checkpoint nor a run" in refused(tmp_path, "--prompt", "a")
    faults = refused(hf_folder, "--temperature", "-1", "--top-p", "0")
    assert "temperature must be 0 (greedy) or above, got -1.0" in faults
    assert "top_p must be above 0 and at most 1, got 0.0" in faults
    assert "byte 1 is 0xff" in refused(hf_folder, stdin=b"a\xff")
    (tmp_path / "latin").write_bytes(b"\xe9")
    assert "not valid UTF-8" in refused(hf_folder, "--prompt-file", tmp_path / "latin")
    assert "cannot read the prompt file" in refused(hf_folder, "--prompt-file", tmp_path / "none")
    assert "not valid UTF-8" in refused(hf_folder, "--prompt", "\udcff")
    assert "standard input" in refused(hf_folder, "--prompt", "-", "-")
    assert "empty stop string" in refused(hf_folder, "--prompt", "a", "--stop", "")
    if not torch.cuda.is_available():
        assert "--device cpu" in refused(hf_folder, "--device", "cuda", "--prompt", "a")


def test_a_tokenizer_that_is_not_the_models_is_refused(
    run_dir: Path, hf_folder: Path, command: Command, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(list_checkpoints(run_dir / "checkpoints")[-1], tmp_path / "step-00000012")
    (checkpoint / "tokenizer.json").unlink()
    assert command(checkpoint, "--prompt", "a")[0] == 2
    load_tokenizer("train:300", texts=["other"]).save(checkpoint / "tokenizer.json")
    assert command(checkpoint, "--prompt", "a")[0] == 2  # by the checksum of the checkpoint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.train.saving.checkpoint.inspect", lambda _: Findings())
        code, printed, errors = command(checkpoint, "--prompt", "a")
    assert (code, printed) == (2, "")
    assert "was trained with the tokenizer" in errors
    folder = shutil.copytree(hf_folder, tmp_path / "hf")
    load_tokenizer("chars", texts=["abc"]).save(folder / "tokenizer.json")
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": 3}))
    code, printed, errors = command(folder, "--prompt", "abcd")
    assert (code, printed) == (2, "")
    assert "'d' (U+0064)" in errors


def test_a_reader_that_goes_away_is_no_error(hf_folder: Path) -> None:
    program = [sys.executable, "sample.py", str(hf_folder), "--prompt", "a", "--max-new-tokens", "5000", "--ignore-eos"]
    with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(5)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_an_export_overwrites_nothing(run_dir: Path, hf_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["export", str(run_dir), str(hf_folder)])
    with pytest.raises(SystemExit) as stop:
        run_command(export.main)
    assert stop.value.code == 2


@pytest.mark.parametrize("shape", ["llama2", "t5"])
def test_any_tokenizer_trains_samples_and_is_exported(shape: str, command: Command, tmp_path: Path) -> None:
    texts = [" ".join(map(str, range(number, number + 40))) for number in range(150)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = str(write_folder(tmp_path / "theirs", shape))
    request = Request(inputs=(str(tmp_path / "a.jsonl"),), output=tmp_path / "data", tokenizer=tokenizer)
    prepare(request, console=Console(quiet=True))
    settings = tiny_settings(tmp_path / "data", tmp_path / "run", train={"steps": 4}, model={"mlp": "gelu"})
    code, printed = run_pretrain(write_config(tmp_path / "config.yaml", settings))
    assert code == 0, printed
    flags = ("--prompt", "12 é", "--max-new-tokens", "300", "--ignore-eos", "--temperature", "3", "--top-k", "500")
    code, text, errors = command(tmp_path / "run", *flags)
    assert (code, errors) == (0, "")
    (record,) = records(command(tmp_path / "run", *flags, "--json")[1])
    assert text == record["prompt"] + record["text"] + "\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export", str(tmp_path / "run"), str(tmp_path / "hf")])
        run_command(export.main)
    assert command(tmp_path / "hf", *flags)[1].endswith(text)  # after what the export printed
    theirs, split = AutoTokenizer.from_pretrained(tmp_path / "hf"), open_dataset(tmp_path / "data").split("train")
    ids = split.tokens(0, split.n_tokens).tolist()
    trained_on = [[*part, theirs.eos_token_id] for part in theirs(texts).input_ids]
    assert theirs.eos_token == ENDS[shape]
    assert any(ids[: len(part)] == part for part in trained_on)


def test_a_prompt_to_a_folder_begins_as_its_tokenizer_says(hf_folder: Path, command: Command, tmp_path: Path) -> None:
    folder = shutil.copytree(hf_folder, tmp_path / "hf")
    write_folder(folder, "gemma")
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        del settings["eos_token_id"], settings["bos_token_id"]
        (folder / name).write_text(json.dumps(settings))
    seen: list[list[int]] = []

    def generated(model: Any, prompts: list[list[int]], **_: Any) -> Any:
        seen.extend(prompts)
        return iter(())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.generate.text.generate", generated)
        command(folder, "--prompt", "the cat", "", "<eos>a", "--num-samples", "2")
    theirs = AutoTokenizer.from_pretrained(folder)
    assert seen == [theirs("the cat").input_ids, [theirs.bos_token_id], theirs("<eos>a").input_ids]
    assert seen[0][0] == theirs.bos_token_id
