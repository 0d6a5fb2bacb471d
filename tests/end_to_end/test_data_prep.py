"""data_prep.py as a user runs it: one message per mistake and exit code 2, a dataset otherwise."""

from __future__ import annotations

import gzip
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.data.dataset import open_dataset

ROOT = Path(__file__).parents[2]


def command(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "data_prep.py"), *map(str, arguments)], check=False, capture_output=True, text=True
    )


def call(
    *arguments: Path | str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    """Run the script in this process, which spares the imports: exit code, output, errors."""
    monkeypatch.setattr(sys, "argv", ["data_prep.py", *map(str, arguments)])
    code = 0
    try:
        runpy.run_path(str(ROOT / "data_prep.py"), run_name="__main__")
    except SystemExit as stop:
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_from_text_to_dataset_and_back(tmp_path: Path) -> None:
    texts = [f"story number {i}\n" for i in range(150)]
    (tmp_path / "stories.txt").write_text("\n\n".join(texts))
    output = tmp_path / "out"
    made = command(
        tmp_path / "*.txt", "--output", output, "--tokenizer", "chars", "--text-separator", r"\n\n\n",
        "--val-fraction", "0.1", "--workers", "2",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert made.stderr == ""
    dataset = open_dataset(output)
    train, val = dataset.split("train"), dataset.split("val")
    assert train.n_documents + val.n_documents == 150
    assert f"train: {train.n_documents} documents, {train.n_tokens:,} tokens" in made.stdout
    assert f"val: {val.n_documents} documents" in made.stdout
    assert f"next: python pretrain.py configs/quickstart.yaml --data.path {output} --run-dir runs/out" in made.stdout
    again = command(tmp_path / "*.txt", "--output", output, "--tokenizer", "chars", "--text-separator", r"\n\n\n",
                    "--val-fraction", "0.1")  # fmt: skip
    assert again.returncode == 0
    assert "already complete" in again.stdout
    verified = command("--verify", output)
    assert (verified.returncode, "is whole: 150 documents" in verified.stdout) == (0, True)
    assert "story number" in command("--inspect", output).stdout


def test_defaults_hold_out_the_tail_of_a_single_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "To be, or not to be: that is the question.\r\n" * 30
    (tmp_path / "play.txt").write_bytes(text.encode())
    code, out, _ = call(
        tmp_path / "play.txt",
        "--output",
        tmp_path / "out",
        "--tokenizer",
        "bytes",
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 0
    assert "the last 0.1 of the characters of each document is val" in out
    dataset = open_dataset(tmp_path / "out")
    train, val = dataset.split("train"), dataset.split("val")
    joined = [*train.tokens(0, train.n_tokens - 1).tolist(), *val.tokens(0, val.n_tokens - 1).tolist()]
    assert bytes(joined).decode() == text


MISTAKES = {
    "no input": ([], "nothing to prepare"),
    "no output": (["good.jsonl"], "--output DIR is missing"),
    "missing file": (["godo.jsonl", "--output", "out"], "no file or folder 'godo.jsonl'; "),
    "nearest name": (["godo.jsonl", "--output", "out"], "did you mean 'good.jsonl'?"),
    "hub name": (["org/data", "--output", "out"], "write hf:org/data"),
    "no match": (["*.parquet", "--output", "out"], "nothing matches '*.parquet'"),
    "wrong key": (["good.jsonl", "--output", "out", "--text-key", "body"], "has no key 'body'; found 'text'"),
    "empty": (["empty.txt", "--output", "out"], "no document in 1 input: nothing but empty files"),
    "all bad": (["bad.txt", "--output", "out"], "no document in 1 input, 1 bad record\n  1 x invalid UTF-8"),
    "too many bad": (["mixed.jsonl", "--output", "out"], "50 of 200 records are bad (25.00%), --max-bad allows 1.00%"),
    "three examples": (["mixed.jsonl", "--output", "out"], "row 8: malformed JSON: {oops"),
    "fraction": (
        ["good.jsonl", "--output", "out", "--val-fraction", "2"],
        "--val-fraction: input should be less than 1, got '2'",
    ),
    "no tokenizer": (["good.jsonl", "--output", "out", "--tokenizer", "none.json"], "no tokenizer file none.json"),
    "small vocabulary": (["good.jsonl", "--output", "out", "--tokenizer", "train:9"], "at least 257, got 'train:9'"),
    "no such EOS": (["good.jsonl", "--output", "out", "--eos", "</s>"], "has no token '</s>' to end documents with"),
    "output is a file": (["good.jsonl", "--output", "empty.txt"], "cannot write to empty.txt"),
    "output in use": (["good.jsonl", "--output", "."], "holds other files"),
    "strict": (["mixed.jsonl", "--output", "out", "--strict"], "--strict: "),
    "share": (["good.jsonl", "--output", "out", "--share", "3/3"], "--share: wants I/N with I from 0 to N - 1"),
    "executor": (["good.jsonl", "--output", "out", "--executor", "x"], "--executor wants dask://HOST:PORT, got 'x'"),
    "both validations": (
        ["good.jsonl", "--output", "out", "--val-fraction", "0.1", "--val-input", "mixed.jsonl"],
        "--val-fraction and --val-input exclude each other",
    ),
    "small documents": (
        ["good.jsonl", "--output", "out", "--max-doc-bytes", "7"],
        "--max-doc-bytes: input should be greater than or equal to 1024",
    ),
    "dedup without workers": (
        ["--output", "nowhere", "--dedup", "near", "--workers", "0"],
        "--workers: input should be greater than 0",
    ),
    "near threshold": (
        ["good.jsonl", "--output", "out", "--dedup", "near", "--near-threshold", "0.2"],
        "--near-threshold 0.2: wanted a similarity from 0.5 to 1",
    ),
    "no evaluation file": (
        ["good.jsonl", "--output", "out", "--contamination", "goood.jsonl"],
        "no file or folder 'goood.jsonl'",
    ),
    "delete what": (
        ["good.jsonl", "--output", "out", "--delete-contaminated"],
        "--delete-contaminated wants --contamination FILE",
    ),
    "misspelt flag": (
        ["good.jsonl", "--tokenzer", "bytes"],
        "--tokenzer: there is no such flag; did you mean '--tokenizer'",
    ),
    "another tool's flag": (["good.jsonl", "--num-proc", "2"], "there is no such flag; did you mean '--workers'?\n"),
    "beginning of a flag": (
        ["good.jsonl", "--tok", "bytes"],
        "--tok: there is no such flag; did you mean '--tokenizer'",
    ),
    "two misspelt flags": (
        ["--zzz", "--worker", "2"],
        "--zzz: there is no such flag\n  --worker: there is no such flag; did you mean",
    ),
    "flag with a wrong value": (
        ["good.jsonl", "--workers", "two"],
        "--workers: input should be a valid integer, unable to parse string as an integer, got 'two'",
    ),
    "flag without a value": (["good.jsonl", "--output"], "--output: a value is missing"),
    "empty separator": (["good.jsonl", "--output", "out", "--text-separator", ""], "should have at least 1 character"),
    "separator that is no text": (
        ["good.jsonl", "--output", "out", "--text-separator", "\udcff"],
        "--text-separator: input should be a valid string, unable to parse raw data as a unicode string",
    ),
    "key that is no text": (
        ["good.jsonl", "--output", "out", "--text-key", "\udcff", "--eos", "\udcff"],
        "raw data as a unicode string, got '\\udcff'\n  --text-key: input should be a valid string",
    ),
    "two modes": (["--inspect", "a", "--verify", "b"], "--inspect and --verify exclude each other"),
    "mode and output": (["--verify", "a", "--output", "out"], "--verify and --output exclude each other"),
    "mode and input": (["--inspect", "a", "good.jsonl"], "--inspect and the input 'good.jsonl' exclude each other"),
    "export and tokenizer": (
        ["--export", "a", "--output", "out", "--tokenizer", "bytes"],
        "--export and --tokenizer exclude each other",
    ),
    "deleting and preparing": (
        ["--output", "out", "--dedup", "near", "--tokenizer", "bytes"],
        "--dedup without an INPUT works on the dataset in --output as it is, and --tokenizer is about preparing one",
    ),
    "rehearsing to delete": (["--output", "out", "--dedup", "near", "--dry-run"], "and --dry-run is about preparing"),
    "threshold of nothing": (
        ["good.jsonl", "--output", "out", "--dedup", "exact", "--near-threshold", "0.7"],
        "--near-threshold is of no use without --dedup near",
    ),
    "dedup nothing": (["--output", "nowhere", "--dedup", "exact"], "no dataset folder nowhere"),
    "export nothing": (["--export", "nowhere", "--output", "out"], "no dataset folder nowhere"),
    "verify nothing": (["--verify", "nowhere"], "no dataset folder nowhere"),
    "inspect anything": (["--inspect", "."], ". is no dataset: it has neither a manifest.json nor shards"),
    "verify a file": (["--verify", "good.jsonl"], "good.jsonl is a file, wanted the folder of a dataset: python"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_message_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    good = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(150))
    (tmp_path / "good.jsonl").write_text(good)
    (tmp_path / "mixed.jsonl").write_text("".join("{oops\n" if i % 4 == 0 else line + "\n" for i, line in
                                                  enumerate((good + good).splitlines()[:200])))  # fmt: skip
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(good.encode())[:-20])
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    arguments, message = MISTAKES[name]
    if arguments and arguments[0][0] != "-" and "--output" in arguments and "--tokenizer" not in arguments:
        arguments = [*arguments, "--tokenizer", "bytes"]
    code, out, err = call(*arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2, out
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert [folder for folder in tmp_path.iterdir() if folder.is_dir() and not any(folder.iterdir())] == []


def test_faults_of_a_command_come_at_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = "--worker 3 --val-fraction 2 --max-bad 9 --share 3/3 --tokenizer trian:500 --max-doc-bytes 3x --seed a"
    contradictory = "--near-threshold 0.7 --delete-contaminated --eos"
    code, _, err = call(*wrong.split(), *contradictory.split(), capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2
    flags = (
        "worker val-fraction max-bad share tokenizer max-doc-bytes seed near-threshold delete-contaminated eos output"
    )
    assert [flag for flag in flags.split() if f"\n  --{flag}" not in err] == []
    assert "nothing to prepare" in err
    assert err.startswith("error: 12 faults in the command:\n")


def test_a_flag_may_be_spelt_with_underscores_and_stand_anywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(lines(100))
    arguments = ("--val_fraction=0.1", "--strict", tmp_path / "a.jsonl", "--output", tmp_path / "out", "--tokenizer")
    code, out, err = call(*arguments, "bytes", tmp_path / "b.jsonl", capsys=capsys, monkeypatch=monkeypatch)
    assert (code, err) == (0, "")
    assert "< 0.1 * 2^64" in out
    assert sum(open_dataset(tmp_path / "out").split(name).n_documents for name in ("train", "val")) == 200


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = call("--help", capsys=capsys, monkeypatch=monkeypatch)
    assert code == 0
    flags = """output dry-run tokenizer eos encoder text-key text-separator exclude max-doc-bytes long-documents
        invalid-utf8 val-fraction val-input seed workers executor share max-bad strict allow-failed dedup
        near-threshold contamination delete-contaminated inspect excerpts verify export"""
    assert [flag for flag in flags.split() if f"--{flag}" not in out] == []


def lines(number: int) -> bytes:
    return b"".join(json.dumps({"text": f"text {i} " * 20}).encode() + b"\n" for i in range(number))


def test_a_truncated_input_ends_with_exit_code_1_and_can_be_done_without(tmp_path: Path) -> None:
    (tmp_path / "good.jsonl").write_bytes(lines(150))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines(900))[:-20])
    arguments = [
        tmp_path / "good.jsonl",
        tmp_path / "cut.jsonl.gz",
        "--output",
        tmp_path / "out",
        "--tokenizer",
        "bytes",
    ]
    failed = command(*arguments)
    assert failed.returncode == 1, failed.stderr
    assert failed.stderr.startswith("unfinished: 1 of ")
    assert "cut.jsonl.gz" in failed.stderr
    assert "Traceback" not in failed.stderr
    allowed = command(*arguments, "--allow-failed")
    assert allowed.returncode == 0, allowed.stderr
    assert "failed: unit 000" in allowed.stdout


def test_sigterm_keeps_what_is_done_and_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(400_000))
    arguments = [str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out"), "--tokenizer", "bytes"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "data_prep.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    ledger = tmp_path / "out" / "ledger.jsonl"
    deadline = time.monotonic() + 60
    while not ledger.exists():
        assert time.monotonic() < deadline, "it did not begin within a minute"
        time.sleep(0.01)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert re.match(r"stopped: .*; go on with: python .*data_prep.py", err)
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_repeated_documents_are_deleted_and_the_rest_exported(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(150) + lines(40))
    output = tmp_path / "out"
    made = command(
        tmp_path / "a.jsonl", "--output", output, "--tokenizer", "bytes", "--val-fraction", "0.1", "--dedup", "exact"
    )
    assert made.returncode == 0, made.stderr
    assert "deleted: 40 equal and 0 near copies" in made.stdout
    dataset = open_dataset(output)
    assert sum(dataset.split(name).n_documents for name in ("train", "val")) == 150
    assert "whole" in command("--verify", output).stdout
    again = command("--output", output, "--dedup", "none")
    assert again.returncode == 0, again.stderr
    assert open_dataset(output).split("train").n_documents > 130
    exported = command("--export", output, "--output", tmp_path / "llmc")
    assert exported.returncode == 0, exported.stderr
    assert exported.stdout.count("wrote ") == 2


def test_ctrl_c_in_deduplication_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(150))
    arguments = [tmp_path / "a.jsonl", "--output", tmp_path / "out", "--tokenizer", "bytes", "--dedup", "exact"]

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.deleting.dedup.deduplicate", interrupted)
        code, _, err = call(*arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 75
    assert re.match(r"stopped: the dataset is whole, .*; go on with: python .*data_prep.py .* --dedup exact", err)
    code, out, _ = call(*arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert (code, "deleted: 0 equal" in out) == (0, True)


def test_the_rate_of_unknown_tokens_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a a a z"}\n' * 150)
    vocabulary = {"<unk>": 0, "</s>": 1, "a": 2}
    definition = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    made = command(tmp_path / "a.jsonl", "--output", tmp_path / "out", "--tokenizer", tmp_path / "tokenizer.json",
                   "--val-fraction", "0", "--eos", "</s>")  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "noticed: 150 x unknown tokens, 20.00% of all" in made.stdout, "one of four, and the end of each document"


@pytest.mark.parametrize(
    "terminal",
    [{"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["latin-1", "C"],
)
def test_a_terminal_that_lacks_a_character_is_shown_its_code(tmp_path: Path, terminal: dict[str, str]) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "日本 {number}"}}\n' for number in range(150)))
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": "名\n')
    inherited = {name: value for name, value in os.environ.items() if name not in ("LC_ALL", "PYTHONIOENCODING")}

    def there(*arguments: Path | str) -> subprocess.CompletedProcess[bytes]:
        script = [sys.executable, str(ROOT / "data_prep.py"), *map(str, arguments)]
        return subprocess.run(script, check=False, capture_output=True, env={**inherited, **terminal})

    output, prepared = tmp_path / "out", ("--tokenizer", "bytes", "--val-fraction", "0")
    for arguments, shown in (
        ((tmp_path / "a.jsonl", "--output", output, *prepared), rb"dataset: .*/out, digest"),
        (("--inspect", output), rb"'\\u65e5\\u672c \d+'"),
        (("--verify", output), rb"out is whole"),
    ):
        made = there(*arguments)
        assert made.returncode == 0, made.stderr
        assert re.search(shown, made.stdout), made.stdout
        assert made.stderr == b""
    refused = there(tmp_path / "b.jsonl", "--output", tmp_path / "other", "--strict", *prepared)
    assert refused.returncode == 2
    assert b"Traceback" not in refused.stderr
    assert re.search(rb"--strict: .*, row 1: .*: .*\\u540d", refused.stderr), refused.stderr


WITH_SMALL_UNITS = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv[:] = sys.argv[1:]
import pipeline.data.preparing.request as request, pipeline.data.preparing.prepare as prepare
from pipeline.data.reading.formats import TextRules
class Small(TextRules):
    def __new__(cls, **values):
        return TextRules(**values, unit_bytes=6000)
request.TextRules = Small
prepare.refuse_small_disk = lambda *_: None  # there was room when it began
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""data_prep.py with units of 6 kB. That the room is measured before the work must not be what stops it."""


def small_units(folder: Path) -> list[str]:
    """A command but for its output: some units of 12 kB of tokens, and last a document of which they take 800 kB."""
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"{number} " * 20}) + "\n" for number in range(900)))
    (folder / "b.jsonl").write_text(json.dumps({"text": "word " * 80_000}) + "\n")
    script = [sys.executable, "-c", WITH_SMALL_UNITS, str(ROOT / "data_prep.py")]
    return [*script, str(folder / "*.jsonl"), "--tokenizer", "bytes", "--val-fraction", "0", "--output"]


def met(script: list[str], folder: Path) -> str:
    """What is said when there is no room for the last unit: one message, exit code 2."""
    found = subprocess.run(script, check=False, capture_output=True, text=True)
    assert found.returncode == 2, found.stderr
    assert "Traceback" not in found.stderr
    assert found.stderr.count("\n") == 1
    output = folder / "disk" / "out"
    assert (output / "train-00003.bin").exists()
    assert not (output / "manifest.json").exists()
    assert not [*output.rglob("*.tmp"), *output.glob("report-*")]
    return found.stderr


def goes_on_to_the_same(wanted: list[str], folder: Path) -> None:
    """The same command, with room, keeps what is done and ends as one that always had it."""
    output = folder / "disk" / "out"
    kept = {path.name: path.stat().st_mtime_ns for path in output.glob("train-*.bin")}
    again = subprocess.run([*wanted, str(output)], check=False, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"going on: {len(kept)} of " in again.stdout
    assert kept.items() < {path.name: path.stat().st_mtime_ns for path in output.glob("train-*.bin")}.items()
    fresh = subprocess.run([*wanted, str(folder / "fresh")], check=False, capture_output=True, text=True)
    assert fresh.returncode == 0, fresh.stderr
    contents = [{p.name: p.read_bytes() for p in sorted(at.iterdir())} for at in (output, folder / "fresh")]
    assert contents[0] == contents[1]


def test_a_limit_on_the_size_of_files_is_told_and_what_is_done_is_kept(tmp_path: Path) -> None:
    """A write that fails in its middle, for real and without privileges."""
    wanted = small_units(tmp_path)
    limited = f"ulimit -f 200; exec {shlex.join([*wanted, str(tmp_path / 'disk' / 'out')])}"
    said = met(["sh", "-c", limited], tmp_path)
    assert re.match(r"error: a file in .*/disk/out would be larger than .* ulimit -f.*; finished units are kept", said)
    goes_on_to_the_same(wanted, tmp_path)


def test_a_disk_that_fills_up_is_told_and_what_is_done_is_kept(tmp_path: Path) -> None:
    """A file system of 768 kB, where the system lets one be mounted."""
    wanted = small_units(tmp_path)
    (tmp_path / "disk").mkdir()
    disk = shlex.quote(str(tmp_path / "disk"))
    mounted = f"mount -t tmpfs -o size=768k none {disk}"
    alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*alone, mounted], check=False, capture_output=True).returncode:
        pytest.skip("needs to be allowed to mount a file system of its own")
    # it goes with the processes that see it, so what it holds at the end is copied to a place that stays
    copied = f"code=$?; cp -a {disk}/out {disk}.copy && umount {disk} && cp -a {disk}.copy {disk}/out; exit $code"
    run = shlex.join([*wanted, str(tmp_path / "disk" / "out")])
    said = met([*alone, f"{mounted} && {run}; {copied}"], tmp_path)
    assert re.match(
        r"error: the disk of .*/disk/out is full \(.* free, about .* more are needed\); finished .*kept", said
    )
    goes_on_to_the_same(wanted, tmp_path)
