"""Preparing: the same dataset for any order, any number of workers and any interruption."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
import zstandard
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pipeline.data.dataset import open_dataset
from pipeline.data.deleting.dedup import deduplicate
from pipeline.data.manifest import Manifest, SplitName
from pipeline.data.preparing import unit as preparing_unit
from pipeline.data.preparing.audit import verify
from pipeline.data.preparing.decide import rehearse
from pipeline.data.preparing.encoder import Encoder, EncoderMismatch
from pipeline.data.preparing.flags import parse
from pipeline.data.preparing.ledger import Ledger, LedgerHeader
from pipeline.data.preparing.prepare import _Preparation, prepare, unit_number
from pipeline.data.preparing.request import Request
from pipeline.data.preparing.survey import training_sample
from pipeline.data.preparing.unit import UnitReport, prepare_unit
from pipeline.data.reading.formats import TextRules
from pipeline.data.reading.plan import Unit
from pipeline.data.tokenizer import load_tokenizer
from pipeline.errors import StoppedEarly, Unfinished, UserError, tell, verdict
from pipeline.locks import locked
from pipeline.seeds import named_seed

TEXTS = [f"Document {i}: {'words and ' * (i % 13)}é日本 <|endoftext|> {i * i}\n" for i in range(240)]
SMALL_UNITS = TextRules(unit_bytes=4000)
INPUTS = ["a.jsonl", "b.jsonl"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, name in enumerate(INPUTS):
        write_lines(folder / name, TEXTS[number * 120 : (number + 1) * 120])
    return folder


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def request(corpus: Path, name: str = "out", /, **changes: Any) -> Request:
    base = Request(
        inputs=(str(corpus),),
        output=corpus.parent / name,
        tokenizer="train:300",
        val_fraction=0.1,
        rules=SMALL_UNITS,
    )
    return replace(base, **changes)


def run(wanted: Request) -> tuple[Manifest, str]:
    stream = io.StringIO()
    manifest = prepare(wanted, console=Console(file=stream, soft_wrap=True))
    assert manifest is not None, "only a share of the work has no manifest"
    return manifest, stream.getvalue()


def documents(folder: Path, split: SplitName) -> list[str]:
    """Texts of a split, decoded by `tokenizers` itself."""
    dataset = open_dataset(folder)
    tokenizer = Tokenizer.from_file(str(dataset.path / "tokenizer.json"))
    stream = dataset.split(split)
    ids = stream.tokens(0, stream.n_tokens)
    parts = np.split(ids, np.flatnonzero(ids == dataset.eos_id) + 1)
    assert len(parts.pop()) == 0, "the stream ends with an end of document"
    return [tokenizer.decode(part[:-1].tolist(), skip_special_tokens=False) for part in parts]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_document_is_there_once_with_the_ids_of_tokenizers(corpus: Path) -> None:
    manifest, _ = run(request(corpus))
    output = corpus.parent / "out"
    train, val = documents(output, "train"), documents(output, "val")
    assert len(manifest.splits["train"]) > 3
    assert sorted(train + val) == sorted(TEXTS)
    seed = named_seed(1337, "data", "split")
    held_out = [text for text in TEXTS if xxhash.xxh3_64_intdigest(text.encode(), seed=seed) < 0.1 * 2**64]
    assert val == held_out
    assert train == [text for text in TEXTS if text not in held_out]
    reference = Tokenizer.from_file(str(output / "tokenizer.json"))
    reference.encode_special_tokens = True
    dataset = open_dataset(output)
    split = dataset.split("train")
    expected = [[*reference.encode(text, add_special_tokens=False).ids, dataset.eos_id] for text in train]
    assert split.tokens(0, split.n_tokens).tolist() == [token for ids in expected for token in ids]
    assert [split.describe(n).tokens for n in range(split.n_documents)] == [len(ids) for ids in expected]
    for number in range(split.n_documents):
        info = split.describe(number)
        line = Path(info.source).read_text().splitlines()[info.row]
        assert json.loads(line)["text"] == train[number]
        assert info.text_bytes == len(train[number].encode())
    assert "whole" in verify(output)


@pytest.mark.parametrize("workers", [2, 3, 7])
def test_workers_and_the_order_of_arguments_change_no_byte(corpus: Path, workers: int) -> None:
    run(request(corpus))
    paths = tuple(str(corpus / name) for name in INPUTS)
    run(request(corpus, "others", workers=workers, inputs=paths[::-1]))
    assert content(corpus.parent / "others") == content(corpus.parent / "out")


@pytest.mark.parametrize("change", [{"seed": 1}, {"val_fraction": 0.2}, {"tokenizer": "bytes"}])
def test_what_matters_changes_the_digest(corpus: Path, change: dict[str, Any]) -> None:
    manifest, _ = run(request(corpus))
    other, _ = run(request(corpus, "other", **change))
    assert manifest.data_digest != other.data_digest


SCRIPT = """
import os, signal, sys
from pathlib import Path
from rich.console import Console
from pipeline.data.reading.formats import TextRules
from pipeline.data.reading.plan import Unit
from pipeline.data.preparing.prepare import prepare
from pipeline.data.preparing.request import Request

def dying_fsync(descriptor, left=[int(sys.argv[4])], real=os.fsync):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    real(descriptor)

if __name__ == "__main__":
    os.fsync = dying_fsync
    prepare(Request(inputs=(sys.argv[1],), output=Path(sys.argv[2]), tokenizer="train:300", val_fraction=0.1,
                    rules=TextRules(unit_bytes=4000), workers=int(sys.argv[3])), console=Console())
"""


def start(corpus: Path, output: Path, *, workers: int, fsyncs: int) -> subprocess.Popen[str]:
    """Prepare in another process, which kills itself at the given call of fsync (0: never)."""
    script = corpus.parent / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(corpus), str(output), str(workers), str(fsyncs)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, text=True)


def test_kill_at_many_points_and_go_on(corpus: Path) -> None:
    """Each process dies at a later call of fsync, the next goes on; the end is as if nothing had happened."""
    run(request(corpus))
    output = corpus.parent / "killed"
    for calls in [1, 2, 3, 5, 6, 7, 8, 14, 21]:
        assert start(corpus, output, workers=1, fsyncs=calls).wait() == -signal.SIGKILL
        assert not (output / "manifest.json").exists()
        with pytest.raises(UserError, match="not complete"):
            open_dataset(output)
    _, said = run(request(corpus, "killed"))
    assert "going on:" in said
    finished = {name: data for name, data in content(output).items() if not name.endswith(".tmp")}
    assert finished == content(corpus.parent / "out")


def test_workers_die_with_a_killed_parent(corpus: Path) -> None:
    write_lines(corpus / "c.jsonl", [f"{i} {text}" for i in range(6) for text in TEXTS])
    output = corpus.parent / "killed"
    parent = start(corpus, output, workers=2, fsyncs=0)
    ledger = output / "ledger.jsonl"
    wait_until(lambda: ledger.exists() and len(ledger.read_bytes().splitlines()) > 3)
    found = subprocess.run(["pgrep", "-P", str(parent.pid)], check=True, capture_output=True, text=True)
    workers = [int(pid) for pid in found.stdout.split()]
    parent.kill()
    parent.wait()
    assert len(workers) >= 2
    wait_until(lambda: not any(alive(pid) for pid in workers))
    wanted = request(corpus, "killed")
    _, said = run(wanted)
    assert "going on:" in said
    run(replace(wanted, output=corpus.parent / "out"))
    assert {name: data for name, data in content(output).items() if not name.endswith(".tmp")} == content(
        corpus.parent / "out"
    )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for a minute"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], check=False, capture_output=True, text=True).stdout
    return bool(state.strip()) and not state.startswith("Z")


def test_a_torn_ledger_line_costs_its_unit_only(corpus: Path) -> None:
    run(request(corpus))
    output = corpus.parent / "out"
    before = content(output)
    (output / "manifest.json").unlink()
    (output / "ledger.jsonl").write_bytes(before["ledger.jsonl"][:-200])
    _, said = run(request(corpus))
    units = len(before["ledger.jsonl"].splitlines()) - 1
    assert f"going on: {units - 1} of {units} units done" in said
    assert content(output) == before


def test_a_complete_dataset_is_left_alone(corpus: Path) -> None:
    manifest, _ = run(request(corpus))
    times = {path: path.stat().st_mtime_ns for path in (corpus.parent / "out").iterdir()}
    again, said = run(request(corpus, workers=2, max_bad=0.5))
    assert said.startswith("already complete")
    assert again == manifest
    assert {path: path.stat().st_mtime_ns for path in (corpus.parent / "out").iterdir()} == times


def test_other_settings_on_one_output_are_refused(corpus: Path) -> None:
    run(request(corpus))
    with pytest.raises(
        UserError, match=r"(?s)made with other settings:\n  seed: made with 1337, now 7\n  tokenizer: "
    ) as e:
        run(request(corpus, seed=7, tokenizer="bytes"))
    assert "val_fraction" not in str(e.value)
    (corpus.parent / "out" / "manifest.json").unlink()
    with pytest.raises(UserError, match="other settings"):
        run(request(corpus, seed=7))


def test_a_folder_of_something_else_is_refused(corpus: Path) -> None:
    (corpus.parent / "out").mkdir()
    (corpus.parent / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"holds other files \(thesis.tex\)"):
        run(request(corpus))


@pytest.mark.parametrize("complete", [True, False])
def test_changed_inputs_are_prepared_again(corpus: Path, complete: bool) -> None:
    wanted = request(corpus, tokenizer="bytes")
    run(wanted)
    if not complete:
        (corpus.parent / "out" / "manifest.json").unlink()
    write_lines(corpus / "b.jsonl", [text.upper() for text in TEXTS[120:200]])
    _, said = run(wanted)
    assert "made again because input or files changed" in said
    run(replace(wanted, output=corpus.parent / "fresh"))
    assert content(corpus.parent / "out") == content(corpus.parent / "fresh")


def test_a_truncated_shard_is_made_again(corpus: Path) -> None:
    run(request(corpus))
    before = content(corpus.parent / "out")
    (corpus.parent / "out" / "train-00001.bin").write_bytes(b"short")
    _, said = run(request(corpus))
    assert "1 made again" in said
    assert content(corpus.parent / "out") == before


@pytest.mark.parametrize("text", ["x" * 7 + "é\n", "a", "the quick brown fox\n" * 50])
def test_few_documents_hold_out_their_tails(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    wanted = Request(inputs=(str(tmp_path / "a.txt"),), output=tmp_path / "out", tokenizer="bytes")
    if len(text) == 1:
        with pytest.raises(UserError, match="leaves train empty with 1 document;"):
            run(wanted)
        return
    manifest, said = run(wanted)
    cut = int(len(text) * 0.9)
    assert documents(tmp_path / "out", "train") == [text[:cut]]
    assert documents(tmp_path / "out", "val") == [text[cut:]]
    assert "fewer than 100 documents (1): the last 0.1 of the characters" in said
    assert manifest.split_rule == "the last 0.1 of the characters of each document is val, the rest train"


def test_the_default_holds_out_some_documents_of_a_small_corpus(corpus: Path) -> None:
    manifest, _ = run(request(corpus, val_fraction=None))
    assert "< 0.084 * 2^64" in manifest.split_rule, "20 of 240"
    write_lines(corpus / "c.jsonl", [f"{i} {text}" for i in range(30) for text in TEXTS])
    manifest, _ = run(request(corpus, "larger", val_fraction=None, tokenizer="bytes"))
    assert "< 0.005 * 2^64" in manifest.split_rule


def test_no_validation_split_on_request(corpus: Path) -> None:
    manifest, _ = run(request(corpus, val_fraction=0.0))
    assert manifest.splits["val"] == ()
    assert documents(corpus.parent / "out", "train") == TEXTS


def test_an_empty_validation_split_says_what_would_do(corpus: Path) -> None:
    with pytest.raises(UserError, match="leaves val empty with 240 documents; --val-fraction") as caught:
        run(request(corpus, val_fraction=1e-9))
    assert not (corpus.parent / "out").exists()
    fraction = float(str(caught.value).split("--val-fraction ")[2].split()[0])
    manifest, _ = run(request(corpus, val_fraction=fraction))
    assert manifest.total("val", "documents") >= 1


def test_bad_records_are_kept_aside_and_counted(corpus: Path) -> None:
    with (corpus / "b.jsonl").open("a") as file:
        file.write('{"text": ""}\nbroken\n')
    manifest, _ = run(request(corpus))
    assert manifest.drops["text is empty"] == 1, "counted, but no fault to look at"
    assert manifest.drops == {"malformed JSON": 1, "text is empty": 1}
    assert manifest.records == 242
    lines = [json.loads(line) for line in (corpus.parent / "out" / "quarantine.jsonl").read_text().splitlines()]
    source = str((corpus / "b.jsonl").resolve())
    assert lines == [
        {"source": source, "row": 121, "reason": "malformed JSON", "excerpt": "broken"},
    ]
    assert sorted(documents(corpus.parent / "out", "train") + documents(corpus.parent / "out", "val")) == sorted(TEXTS)


def test_empty_texts_are_dropped_and_counted_and_are_no_fault(tmp_path: Path) -> None:
    """As in a corpus of code, where many files hold nothing, and in records."""
    folder = tmp_path / "code"
    for number in range(30):
        (folder / f"p{number}").mkdir(parents=True)
        (folder / f"p{number}" / "__init__.py").write_text("" if number % 2 else "\ufeff")
        (folder / f"p{number}" / "a.py").write_text(f"x = {number}\n" * 9)
    (folder / "a.jsonl").write_bytes(b"".join(line_of(text) for text in ("", "one", "", "", "two")))
    (folder / "b.csv").write_text('text,id\n"",1\nthree,2\n')
    (folder / "c.txt.gz").write_bytes(gzip.compress(b""))
    pq.write_table(pa.table({"text": ["", "four"]}), folder / "d.parquet")
    wanted = {"strict": True, "max_bad": 0.0, "tokenizer": "bytes", "val_fraction": 0.1, "rules": TextRules()}
    manifest, _ = run(replace(request(folder, **wanted), inputs=(f"{folder}/**/*.*",)))
    assert manifest.drops == {"text is empty": 30 + 3 + 1 + 1 + 1}
    assert manifest.records == 34 + 36
    assert (tmp_path / "out" / "quarantine.jsonl").read_bytes() == b""


def test_a_corpus_of_empty_texts_is_told_to_be_that(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(line_of("") * 3)
    with pytest.raises(UserError, match="no document in 2 inputs: nothing but empty files and empty texts"):
        run(replace(request(tmp_path), inputs=(str(tmp_path),), output=tmp_path / "out"))


def line_of(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def test_one_letter_packed_three_hundred_times_over_is_split(tmp_path: Path) -> None:
    """Far more text than its size makes expect: shares of it are at most all."""
    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"a" * (120 * 2**20), 1))
    manifest, _ = run(request(folder, tokenizer="bytes", rules=TextRules(), val_fraction=None))
    assert manifest.total("train", "text_bytes") + manifest.total("val", "text_bytes") == 120 * 2**20
    assert manifest.total("val", "documents") >= 1


@pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
def test_two_columns_of_one_name_are_refused_before_any_work(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "twice"
    folder.mkdir()
    if name == "a.csv":
        (folder / name).write_text("text,id,text\na,1,b\n")
    else:
        columns = [pa.array(["a"]), pa.array(["b"])]
        pq.write_table(pa.table(columns, names=["text", "text"]), folder / name)
    with pytest.raises(UserError, match=r"a\.(parquet|csv) has 2 columns 'text'; wanted one"):
        run(request(folder))


def test_excerpts_and_names_reach_the_terminal_without_their_escape_sequences(tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    name = "a\x1b[31m.jsonl"
    (folder / name).write_text('{"text": 5, "\x1b]0;title\x07": "\u202eabc\x9b31m"}\n\x1b[2Jbroken\n' * 3)
    with pytest.raises(UserError) as error:
        run(request(folder))
    assert "malformed JSON" in str(error.value)
    _, message = verdict(error.value)
    told = io.StringIO()
    with redirect_stderr(told):
        tell(error.value)
    for character in "\x1b\x07\x9b\u202e":
        assert character not in told.getvalue()
    assert r"a\x1b[31m.jsonl" in told.getvalue()
    assert r"\x1b[2Jbroken" in told.getvalue()
    assert message.count("\n") == told.getvalue().count("\n") - 1, "lines stay lines"


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        (b'{"text": "' + b"long " * 300 + b'"}', r"text over 1024 bytes \(--max-doc-bytes N .*--long-documents cut"),
        (b'{"text": "\xff"}', r"invalid UTF-8 \(--invalid-utf8 replace"),
        (b'{"text": "\\ud800"}', r"lone surrogate \(--invalid-utf8 replace"),
        (b'{"body": ""}', r"no key 'text' \(--text-key KEY"),
    ],
)
def test_what_a_flag_can_do_about_a_bad_record_is_told(tmp_path: Path, line: bytes, remedy: str) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(line_of("good") + line + b"\n")
    rules = TextRules(max_document_bytes=1024)
    for strict in (True, False):
        with pytest.raises(UserError, match=remedy):
            run(request(folder, strict=strict, rules=rules, tokenizer="bytes", val_fraction=0.5))


def test_too_many_bad_records_stop_and_can_be_allowed(corpus: Path) -> None:
    with (corpus / "b.jsonl").open("a") as file:
        file.write("broken\n" * 3)
    with pytest.raises(UserError, match=r"(?s)3 of 243 records are bad.*row 120: malformed JSON: broken.*row 122"):
        run(request(corpus))
    assert not (corpus.parent / "out" / "manifest.json").exists()
    manifest, said = run(request(corpus, max_bad=0.05))
    assert "units done" in said
    assert manifest.drops == {"malformed JSON": 3}


def test_a_second_process_is_told_who_holds_the_folder(corpus: Path) -> None:
    output = corpus.parent / "out"
    output.mkdir()
    with (
        locked(output, ask_of_other_hosts=True),
        pytest.raises(UserError, match=f"is being written by process {os.getpid()} on .* since 20"),
    ):
        run(request(corpus))
    run(request(corpus))


def test_a_lock_of_a_dead_process_is_taken_over_but_not_that_of_another_host(corpus: Path) -> None:
    output = corpus.parent / "out"
    output.mkdir()
    (output / ".lock").write_text('{"pid": 1, "host": "elsewhere", "since": "2020"}')
    with pytest.raises(UserError, match=r"process 1 on elsewhere since 2020.*if that process is gone, remove"):
        run(request(corpus))
    (output / ".lock").write_text(json.dumps({"pid": 2**22 + 1, "host": os.uname().nodename, "since": "2020"}))
    run(request(corpus))
    assert not (output / ".lock").exists()


def test_a_full_disk_keeps_finished_units_and_no_temporaries(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(request(corpus))
    real, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            UserError,
            match=r"is full \(.* free, about \d.* are needed\); finished .* kept: make room and go on with: python",
        ):
            run(request(corpus, "full"))
    assert not list((corpus.parent / "full").glob("*.tmp"))
    assert (corpus.parent / "full" / "train-00000.idx").exists()
    _, said = run(request(corpus, "full"))
    assert "going on: 0 of" not in said
    assert "going on:" in said
    assert content(corpus.parent / "full") == content(corpus.parent / "out")


def test_ctrl_c_says_how_to_go_on(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.preparing.prepare.prepare_unit", interrupted)
        with pytest.raises(StoppedEarly, match=r"stopped: 0 of \d+ units done; go on with: python"):
            run(request(corpus))
    manifest, _ = run(request(corpus))
    assert manifest.total("train", "documents") > 200


def test_an_output_below_the_input_is_no_input(corpus: Path) -> None:
    inputs = (str(corpus), f"{corpus}/**", f"{corpus}/*")
    wanted = request(corpus, tokenizer="bytes", output=corpus / "out", inputs=inputs)
    run(wanted)
    assert run(wanted)[1].startswith("already complete")


def test_the_training_sample_is_bounded_and_ignores_order() -> None:
    contents = [text.encode() for text in TEXTS]
    sample = training_sample(contents, 2000)
    assert sample == training_sample(contents[::-1], 2000)
    assert 1800 < sum(map(len, sample)) <= 2000
    assert set(sample) < set(contents)
    assert sorted(training_sample(contents, 10**9)) == sorted(contents)


def test_every_record_is_accounted_for(corpus: Path) -> None:
    """Every kind of bad record once: documents in = written + each reason, and exactly the bad ones are set aside."""
    bad = {
        b'{"text": ': "malformed JSON",
        b"[1, 2]": "not a JSON object",
        b'{"body": "x"}': "no key 'text'",
        b'{"text": null}': "text is null",
        b'{"text": 7}': "text is not a string",
        b'{"text": ""}': "text is empty",
        b'{"text": "\\ud800"}': "lone surrogate",
        b'{"text": "\xff"}': "invalid UTF-8",
        b'{"text": "' + b"long " * 300 + b'"}': "text over 1024 bytes",
    }
    good = [b'{"text": "kept \\u0000 NUL"}', b'{"text": "a<|endoftext|>b"}\r', b""]
    lines = [
        line
        for pair in zip(bad, [json.dumps({"text": text}).encode() for text in TEXTS], strict=False)
        for line in pair
    ]
    (corpus / "b.jsonl").write_bytes(b"\n".join([*lines, *good]))
    rules = replace(SMALL_UNITS, unit_bytes=500, max_document_bytes=1024)
    manifest, _ = run(request(corpus, max_bad=0.5, rules=rules))
    assert manifest.drops == dict(sorted(Counter(bad.values()).items()))
    written = manifest.total("train", "documents") + manifest.total("val", "documents")
    assert manifest.records == written + len(bad) == 120 + len(bad) * 2 + 2
    found = [json.loads(line) for line in (corpus.parent / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert {record["row"]: record["reason"] for record in found} == {
        2 * n: reason for n, reason in enumerate(bad.values()) if reason != "text is empty"
    }
    assert manifest.noticed["documents with NUL"] == 1
    assert manifest.noticed["documents with the text of a special token"] == 121 + len(bad)
    assert "kept \0 NUL" in documents(corpus.parent / "out", "train") + documents(corpus.parent / "out", "val")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_compressed_file_has_many_shards_and_goes_on_after_a_kill(corpus: Path, suffix: str) -> None:
    texts = [f"{i} {text}" for i in range(20) for text in TEXTS]
    content_ = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    compress = gzip.compress if suffix.endswith("gz") else zstandard.compress
    for name in INPUTS:
        (corpus / name).unlink()
    (corpus / f"a{suffix}").write_bytes(compress(content_))
    rules = TextRules(unit_bytes=30_000)
    manifest, _ = run(request(corpus, tokenizer="bytes", rules=rules, workers=2))
    assert len(manifest.splits["train"]) > 10
    split = open_dataset(corpus.parent / "out").split("train")
    train = documents(corpus.parent / "out", "train")
    for number in range(0, split.n_documents, 97):
        assert texts[split.describe(number).row] == train[number]
    whole = content(corpus.parent / "out")
    ledger = corpus.parent / "out" / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    assert len(lines) > 12
    for kept in ([0, 1], [0, *range(1, 7)], [0, 1, 2, 4, 5, 6]):  # of the last, what follows the gap is made again
        (corpus.parent / "out" / "manifest.json").unlink()
        ledger.write_bytes(b"".join(lines[number] for number in kept))
        times = {path.name: path.stat().st_mtime_ns for path in (corpus.parent / "out").glob("train-*.bin")}
        run(request(corpus, tokenizer="bytes", rules=rules))
        assert content(corpus.parent / "out") == whole
        same = [name for name in sorted(times) if (corpus.parent / "out" / name).stat().st_mtime_ns == times[name]]
        assert len(same) == {2: 1, 7: 6, 6: 2}[len(kept)]


def test_shares_of_an_array_job_complete_to_the_same_dataset(corpus: Path) -> None:
    run(request(corpus))
    output = corpus.parent / "shared"
    for number in (2, 0, 1):
        assert prepare(request(corpus, "shared", share=(number, 3)), console=Console(file=io.StringIO())) is None
        assert not (output / "manifest.json").exists()
    _, said = run(request(corpus, "shared"))
    units = len((output / "ledger.jsonl").read_bytes().splitlines()) - 1
    assert f"going on: {units} of {units} units done" in said
    assert content(output) == content(corpus.parent / "out")


def test_a_share_that_still_works_is_waited_for(corpus: Path) -> None:
    prepare(request(corpus, share=(0, 2)), console=Console(file=io.StringIO()))
    output = corpus.parent / "out"
    with (
        locked(output, ask_of_other_hosts=False, name=".lock-1-of-2"),
        pytest.raises(UserError, match="is being written by process"),
    ):
        run(request(corpus))
    with locked(output, ask_of_other_hosts=True), pytest.raises(UserError, match="is being written by process"):
        prepare(request(corpus, share=(1, 2)), console=Console(file=io.StringIO()))


def test_a_dask_cluster_of_two_processes_makes_the_same_bytes(corpus: Path) -> None:
    from distributed import LocalCluster

    run(request(corpus))
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        address = cluster.scheduler_address.replace("tcp://", "dask://")
        run(request(corpus, "dask", executor=address))
    assert content(corpus.parent / "dask") == content(corpus.parent / "out")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("spark://x", "--executor wants dask://HOST:PORT, got 'spark://x'; a port is"),
        ("dask://", "--executor wants dask://HOST:PORT"),
        ("dask://host", "--executor wants dask://HOST:PORT"),
        ("dask://host:", "--executor wants dask://HOST:PORT"),
        ("dask://:8786", "--executor wants dask://HOST:PORT"),
        ("dask://host:port", "--executor wants dask://HOST:PORT"),
        ("dask://host:99999", "--executor wants dask://HOST:PORT"),
        ("dask://host:0", "--executor wants dask://HOST:PORT"),
        ("dask://host:1/x", "--executor wants dask://HOST:PORT"),
        ("dask://ho st:1", "--executor wants dask://HOST:PORT"),
        ("dask://tcp://host:1", "--executor wants dask://HOST:PORT"),
        ("dask://no.such.host.invalid:8786", "no Dask scheduler answers"),
        ("dask://[::1]:9", "no Dask scheduler answers"),
        ("dask://127.0.0.1:9", "no Dask scheduler answers"),
    ],
)
def test_an_executor_that_is_none_is_refused(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, address: str, message: str
) -> None:
    monkeypatch.setattr("pipeline.data.preparing.executors.DASK_TIMEOUT", "1s")
    with pytest.raises(UserError, match=message):
        run(request(corpus, executor=address))


def damage(corpus: Path) -> None:
    """Two inputs that end too early, beside two that are whole."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (corpus / "c.jsonl.gz").write_bytes(gzip.compress(lines)[:-400])
    pq.write_table(pa.table({"text": TEXTS}), corpus / "d.parquet")
    whole = (corpus / "d.parquet").read_bytes()
    (corpus / "d.parquet").write_bytes(whole[: len(whole) // 2])


def test_damaged_inputs_fail_alone_and_can_be_done_without(corpus: Path) -> None:
    damage(corpus)
    with pytest.raises(Unfinished, match=r"(?s)2 of \d+ units failed.*c\.jsonl\.gz.*d\.parquet.*--allow-failed"):
        run(request(corpus))
    assert not (corpus.parent / "out" / "manifest.json").exists()
    manifest, said = run(request(corpus, allow_failed=True))
    assert "going on:" in said
    assert len(manifest.failed) == 2
    assert "c.jsonl.gz" in manifest.failed[0].reason
    there = documents(corpus.parent / "out", "train") + documents(corpus.parent / "out", "val")
    assert set(TEXTS) <= set(there)
    (corpus.parent / "out" / "manifest.json").unlink()
    with pytest.raises(Unfinished):
        run(request(corpus))


def test_what_shares_a_unit_with_a_damaged_input_is_kept(corpus: Path) -> None:
    damage(corpus)
    manifest, _ = run(request(corpus, allow_failed=True, rules=TextRules()))
    assert [shard.name for shard in manifest.splits["train"]] == ["train-00000"]
    assert len(manifest.failed) == 2
    there = documents(corpus.parent / "out", "train") + documents(corpus.parent / "out", "val")
    assert set(TEXTS) <= set(there)


def test_strict_stops_at_the_first_bad_record(corpus: Path) -> None:
    with (corpus / "b.jsonl").open("a") as file:
        file.write("broken\n")
    with pytest.raises(UserError, match=r"--strict: .*b\.jsonl, row .*: malformed JSON: broken"):
        run(request(corpus, strict=True))
    run(request(corpus))


def test_a_hopeless_corpus_is_given_up_early(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (corpus / "b.jsonl").write_text("broken\n" * 2000)
    write_lines(corpus / "c.jsonl", TEXTS)
    monkeypatch.setattr("pipeline.data.preparing.prepare.EARLY_VERDICT_RECORDS", 500)
    with pytest.raises(UserError, match=r"records so far are bad"):
        run(request(corpus))
    assert not list((corpus.parent / "out").glob("train-00008*"))


def test_inputs_given_for_validation_are_the_validation_split(corpus: Path) -> None:
    manifest, _ = run(
        request(corpus, inputs=(str(corpus / "a.jsonl"),), val_inputs=(str(corpus / "b.jsonl"),), val_fraction=None)
    )
    assert documents(corpus.parent / "out", "train") == TEXTS[:120]
    assert documents(corpus.parent / "out", "val") == TEXTS[120:]
    assert manifest.split_rule == "the inputs of --val-input are val, the others train"


def test_a_dry_run_estimates_and_writes_nothing(corpus: Path) -> None:
    stream = io.StringIO()
    rehearse(request(corpus, tokenizer="bytes"), console=Console(file=stream, soft_wrap=True))
    assert not (corpus.parent / "out").exists()
    manifest, _ = run(request(corpus, tokenizer="bytes"))
    said = stream.getvalue()
    assert "2 inputs, " in said
    expected = int(said.split("tokens: about ")[1].split(";")[0].replace(",", ""))
    found = manifest.total("train", "tokens") + manifest.total("val", "tokens")
    assert abs(expected / found - 1) < 0.3, "the plan counts the JSON around the text too"
    rehearse(request(corpus, "other"), console=Console(file=stream, soft_wrap=True))
    assert "known once train:300 is made" in stream.getvalue()


def test_a_disk_that_will_not_do_is_refused_before_the_work(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(corpus)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(UserError, match=r"has 10 bytes free, the dataset needs about [0-9.]+ kB more; make room"):
        run(request(corpus))
    assert not list((corpus.parent / "out").glob("train-*"))


def test_a_unit_that_fails_the_audit_is_encoded_by_the_reference(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(request(corpus, backend="tokenizers"))
    encode = Encoder.encode

    def deviating(self: Encoder, contents: Sequence[bytes], *, end: int | None = None) -> Any:
        """As if gigatoken and `tokenizers` disagreed about one document."""
        if end is not None and self.backend == "gigatoken" and any(b"Document 77:" in text for text in contents):
            raise EncoderMismatch("gigatoken and tokenizers differ")
        return encode(self, contents, end=end)

    monkeypatch.setattr(Encoder, "encode", deviating)
    manifest, said = run(request(corpus, "redone", backend="gigatoken"))
    assert said.count("differ; encoded with `tokenizers` instead") == 1
    assert manifest.data_digest == open_dataset(corpus.parent / "out").data_digest


def test_rows_are_those_of_the_file_however_it_is_cut(corpus: Path) -> None:
    for unit_bytes in (300, 5000, 10**6):
        rules = TextRules(unit_bytes=unit_bytes)
        name = f"out-{unit_bytes}"
        run(request(corpus, name, tokenizer="bytes", rules=rules))
        split = open_dataset(corpus.parent / name).split("train")
        train = documents(corpus.parent / name, "train")
        for number in range(split.n_documents):
            info = split.describe(number)
            assert json.loads(Path(info.source).read_text().splitlines()[info.row])["text"] == train[number]


def damaged_group(path: Path, *, group: int) -> None:
    """Rows of which one group cannot be unpacked, while the metadata and the other groups are whole."""
    texts = [f"row {i} {'%016x' % (i**7 % 2**61) * 4}" for i in range(600)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=100, compression="gzip", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(group).column(0)
    content_ = bytearray(path.read_bytes())
    begin = column.data_page_offset + column.total_compressed_size // 2
    content_[begin : begin + 400] = b"\xff" * 400
    path.write_bytes(content_)


@pytest.mark.parametrize("unit_bytes", [5000, 25_000, 10**6])
def test_rows_after_damage_are_those_of_the_file(tmp_path: Path, unit_bytes: int) -> None:
    damaged_group(tmp_path / "a.parquet", group=2)
    wanted = request(
        tmp_path / "a.parquet", tokenizer="bytes", allow_failed=True, rules=TextRules(unit_bytes=unit_bytes)
    )
    manifest, _ = run(wanted)
    assert len(manifest.failed) == 1
    split = open_dataset(tmp_path / "out").split("train")
    train = documents(tmp_path / "out", "train")
    assert [text.split()[1] for text in train] == [str(split.describe(n).row) for n in range(len(train))]
    assert len(train) > 150
    assert "whole" in verify(tmp_path / "out")


def test_what_was_read_before_the_damage_is_kept(tmp_path: Path) -> None:
    noise = random.Random(0)
    lines = "".join(json.dumps({"text": f"row {i} {noise.randbytes(400).hex()}"}) + "\n" for i in range(2600)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines, 1)[:-200])
    there = zlib.decompressobj(31).decompress((tmp_path / "a.jsonl.gz").read_bytes())
    manifest, _ = run(request(tmp_path / "a.jsonl.gz", tokenizer="bytes", allow_failed=True, rules=TextRules()))
    assert len(manifest.failed) == 1
    assert manifest.records == there.count(b"\n") > 2590
    train = documents(tmp_path / "out", "train")
    split = open_dataset(tmp_path / "out").split("train")
    assert [text.split()[1] for text in train] == [str(split.describe(n).row) for n in range(len(train))]


def without_the_last_part(output: Path) -> None:
    """As a kill leaves it that comes before the last part is done."""
    (output / "manifest.json").unlink()
    ledger = output / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    assert len(lines) > 3
    assert '"last":true' in lines[-1]
    ledger.write_text("".join(lines[:-1]))


def packed_rows(path: Path) -> bytes:
    """Compressed lines, of several parts."""
    noise = random.Random(0)
    lines = "".join(json.dumps({"text": f"row {i} {noise.randbytes(400).hex()}"}) + "\n" for i in range(900)).encode()
    path.write_bytes(gzip.compress(lines, 1))
    return path.read_bytes()


def test_damage_that_was_told_is_told_once_after_a_kill(tmp_path: Path) -> None:
    path, rules = tmp_path / "a.jsonl.gz", TextRules(unit_bytes=100_000)
    path.write_bytes(packed_rows(path)[:-200])
    asked = request(path, tokenizer="bytes", allow_failed=True, rules=rules)
    undisturbed, _ = run(asked)
    without_the_last_part(tmp_path / "out")
    again, said = run(asked)
    assert "going on" in said
    assert again == undisturbed
    assert len(again.failed) == 1


def test_damage_that_comes_after_parts_were_done_is_told(tmp_path: Path) -> None:
    path, rules = tmp_path / "a.jsonl.gz", TextRules(unit_bytes=100_000)
    whole, asked = packed_rows(path), request(path, tokenizer="bytes", rules=rules)
    run(asked)
    without_the_last_part(tmp_path / "out")
    times = path.stat()
    path.write_bytes(whole[:-20] + bytes(20))  # a bad block: neither size nor time tells
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(Unfinished, match=r"1 of 1 unit failed.*\n.*cannot read .*a\.jsonl\.gz past byte"):
        run(asked)
    path.write_bytes(whole)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert run(asked)[0].failed == ()


def test_inputs_and_validation_inputs_that_change_places_are_other_settings(corpus: Path) -> None:
    first, second = (str(corpus / name) for name in INPUTS)
    run(request(corpus, inputs=(first,), val_inputs=(second,), val_fraction=None))
    with pytest.raises(UserError, match="made with other settings:\n  val_inputs: "):
        run(request(corpus, inputs=(second,), val_inputs=(first,), val_fraction=None))


def test_shares_of_other_divisions_do_not_work_at_the_same_time(corpus: Path) -> None:
    prepare(request(corpus, share=(0, 2)), console=Console(file=io.StringIO()))
    output = corpus.parent / "out"
    with locked(output, ask_of_other_hosts=False, name=".lock-1-of-2"):
        prepare(request(corpus, share=(0, 2)), console=Console(file=io.StringIO()))
        with pytest.raises(UserError, match="is being written by process"):
            prepare(request(corpus, share=(1, 3)), console=Console(file=io.StringIO()))
    prepare(request(corpus, share=(1, 3)), console=Console(file=io.StringIO()))


def test_a_share_leaves_the_units_of_others_alone(tmp_path: Path) -> None:
    """What it would not accept as its own, another share may, which runs with --allow-failed."""
    damaged_group(tmp_path / "a.parquet", group=2)
    wanted = request(tmp_path / "a.parquet", tokenizer="bytes", rules=TextRules(unit_bytes=25_000), share=(0, 2))
    prepare(replace(wanted, allow_failed=True), console=Console(file=io.StringIO()))
    there = sorted((tmp_path / "out").glob("train-*"))
    prepare(replace(wanted, share=(1, 2)), console=Console(file=io.StringIO()))
    assert set(there) < set((tmp_path / "out").glob("train-*"))


def test_shares_that_begin_together_save_one_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, real = load_tokenizer("bytes"), os.fsync

    def met(descriptor: int) -> None:
        """While one writes, another one writes and is done."""
        monkeypatch.setattr(os, "fsync", real)
        tokenizer.save(tmp_path / "tokenizer.json")

    monkeypatch.setattr(os, "fsync", met)
    tokenizer.save(tmp_path / "tokenizer.json")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_an_empty_split_after_shares_leaves_nothing_that_another_fraction_would_meet(corpus: Path) -> None:
    prepare(request(corpus, val_fraction=1e-9, share=(0, 2)), console=Console(file=io.StringIO()))
    with pytest.raises(UserError, match="leaves val empty"):
        run(request(corpus, val_fraction=1e-9))
    assert not (corpus.parent / "out").exists()


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json"])
def test_what_is_damaged_beside_the_shards_is_made_again(corpus: Path, name: str) -> None:
    run(request(corpus))
    before = content(corpus.parent / "out")
    (corpus.parent / "out" / name).write_text("{")
    _, said = run(request(corpus))
    assert "going on: " in said
    assert content(corpus.parent / "out") == before


def test_a_dataset_of_another_version_is_not_touched(corpus: Path) -> None:
    run(request(corpus))
    path = corpus.parent / "out" / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 1'))
    with pytest.raises(UserError, match=r"format version 1 found.*choose another --output, or remove this folder"):
        run(request(corpus))
    path.write_text("{")
    (corpus.parent / "out" / "ledger.jsonl").unlink()
    with pytest.raises(UserError, match=r"run data_prep\.py again into another --output"):
        run(request(corpus))


def test_bad_records_take_no_memory(corpus: Path) -> None:
    """Their excerpts would be 4 MB and more, once for the first look and once for the unit."""
    bad = "".join(json.dumps({"body": f"{i} " + "x" * 200}) + "\n" for i in range(12_000))
    (corpus / "a.jsonl").write_text(json.dumps({"text": "one"}) + "\n" + bad)
    run(request(corpus, "warm", inputs=(str(corpus / "b.jsonl"),), tokenizer="bytes"))
    tracemalloc.start()
    try:
        manifest, _ = run(request(corpus, tokenizer="bytes", max_bad=1.0, rules=TextRules(), backend="tokenizers"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert manifest.drops == {"no key 'text'": 12_000}
    lines = (corpus.parent / "out" / "quarantine.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["row"] for line in lines] == list(range(1, 12_001))
    assert peak < 4e6


def test_an_input_that_changes_during_the_work_is_not_passed_off(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = request(corpus, tokenizer="bytes")

    def late(unit: Unit, **others: Any) -> UnitReport:
        if unit.number == 3:
            write_lines(corpus / "b.jsonl", [text.upper() for text in TEXTS[120:]])
        return prepare_unit(unit, **others)

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.preparing.prepare.prepare_unit", late)
        with pytest.raises(UserError, match=r"1 input changed during the preparation, such as .*b\.jsonl"):
            run(wanted)
    _, said = run(wanted)
    assert "made again because input or files changed" in said
    run(replace(wanted, output=corpus.parent / "fresh"))
    assert content(corpus.parent / "out") == content(corpus.parent / "fresh")


def test_deletions_that_a_new_preparation_takes_back_are_told(corpus: Path) -> None:
    write_lines(corpus / "c.jsonl", TEXTS[:20])
    wanted = request(corpus, tokenizer="bytes")
    run(wanted)
    quiet = Console(file=io.StringIO())
    assert deduplicate(wanted.output, method="exact", executor=None, console=quiet).total("train", "documents") < 240
    write_lines(corpus / "c.jsonl", TEXTS[:21])
    _, said = run(wanted)
    assert "warning: documents that --dedup or --contamination deleted are part of the dataset again" in said
    write_lines(corpus / "c.jsonl", TEXTS[:22])
    assert "warning" not in run(wanted)[1]


def test_a_damaged_shard_is_mended_as_verify_says(corpus: Path) -> None:
    run(request(corpus))
    output = corpus.parent / "out"
    before = content(output)
    (output / "train-00001.bin").write_bytes(before["train-00001.bin"][::-1])
    with pytest.raises(UserError, match=r"(?s)train-00001\.bin: .*remove the files named and run the command"):
        verify(output)
    (output / "train-00001.bin").unlink()
    run(request(corpus))
    assert content(output) == before


def rehearsed(wanted: Request) -> str:
    stream = io.StringIO()
    rehearse(wanted, console=Console(file=stream, soft_wrap=True))
    return stream.getvalue()


def test_a_dry_run_says_of_the_output_what_a_run_would(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, out = request(corpus, tokenizer="bytes"), corpus.parent / "out"
    assert f"output: {out} is yet to be made\n" in rehearsed(wanted)
    manifest, _ = run(wanted)
    files = content(out)
    assert f"output: {out} is complete already and would be left as it is\nnothing was written" in rehearsed(wanted)
    with pytest.raises(UserError, match="made with other settings:\n  seed: "):
        rehearsed(replace(wanted, seed=2))
    with locked(out, ask_of_other_hosts=True), pytest.raises(UserError, match="is being written by process"):
        rehearsed(wanted)
    (out / "manifest.json").unlink()
    count = len({int(shard.name[-5:]) for shards in manifest.splits.values() for shard in shards})
    assert f"output: {out}, {count} units finished earlier would be kept\n" in rehearsed(wanted)
    write_lines(corpus / "b.jsonl", TEXTS[:9])
    said = (
        f"output: {out}, {count} units finished earlier would be kept, but for inputs changed: {corpus / 'b.jsonl'}\n"
    )
    assert said in rehearsed(wanted)
    del files["manifest.json"]
    assert content(out) == files
    with pytest.raises(UserError, match=r"cannot write to .*corpus/a\.jsonl/x: .*corpus/a\.jsonl is a file"):
        rehearsed(replace(wanted, output=corpus / "a.jsonl" / "x"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"cannot write to .*new: no permission to write into "):
        rehearsed(replace(wanted, output=corpus.parent / "new"))


def test_a_dry_run_refuses_a_disk_that_will_not_do(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(corpus)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(UserError, match=r"has 10\.0 kB free, the dataset needs about [0-9.]+ kB more; make room"):
        rehearsed(request(corpus, tokenizer="bytes"))


@pytest.mark.parametrize("complete", [True, False])
def test_inputs_that_come_and_go_are_named(corpus: Path, complete: bool) -> None:
    wanted = request(corpus, tokenizer="bytes")
    run(wanted)
    if not complete:
        (corpus.parent / "out" / "manifest.json").unlink()
    for number in range(7):
        write_lines(corpus / f"c{number}.jsonl", TEXTS[:3])
    (corpus / "b.jsonl").unlink()
    write_lines(corpus / "a.jsonl", TEXTS[:30])
    with pytest.raises(UserError) as caught:
        run(wanted)
    a, b, *new = (corpus / f"{name}.jsonl" for name in ("a", "b", "c0", "c1", "c2", "c3", "c4"))
    line = f"  inputs added: {', '.join(map(str, new))} and 2 more; removed: {b}; changed: {a}\n"
    assert line in str(caught.value)
    assert "digest" not in str(caught.value)


def test_inputs_that_changed_are_named_when_it_goes_on(corpus: Path) -> None:
    run(request(corpus, tokenizer="bytes"))
    write_lines(corpus / "b.jsonl", TEXTS[:30])
    _, said = run(request(corpus, tokenizer="bytes"))
    assert f"inputs changed: {corpus / 'b.jsonl'}\n" in said


@pytest.mark.parametrize(("size", "noted"), [(10**6, False), (10**6 + 1, True)])
def test_a_large_text_is_told_to_be_one_document(tmp_path: Path, size: int, noted: bool) -> None:
    (tmp_path / "a.txt").write_text("x" * 99 + "\n" + "y" * (size - 100))
    (tmp_path / "b.txt").write_text("small")
    plain = Request(inputs=(str(tmp_path),), output=tmp_path / "out", tokenizer="bytes")
    note = f"note: 1 plain text of over 1 MB, such as {tmp_path / 'a.txt'} (1.0 MB): a text file is one document"
    assert (note in rehearsed(plain)) == noted
    assert "--text-separator" not in rehearsed(replace(plain, rules=TextRules(separator="\n\n")))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "jsonl.gz", "txt"])
def test_rows_after_a_unit_done_without_are_those_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Two units of many kill their worker; blank lines are rows, and the last line has no end."""
    noise = random.Random(0)
    texts = [f"row {i} {noise.randbytes(noise.randint(1, 90)).hex()}" for i in range(400)]
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=50)
    elif kind == "txt":
        path.write_text("|".join(texts))
    else:
        lines = "".join(json.dumps({"text": text}) + "\n" * (1 + i % 3) for i, text in enumerate(texts)).encode()
        path.write_bytes(gzip.compress(lines) if kind == "jsonl.gz" else lines.strip())

    def deadly(unit: Unit, settings: Any, *, on_batch: Any = None) -> tuple[UnitReport, ...]:
        if unit.number in {1, 3}:
            raise BrokenProcessPool
        return prepare_unit(unit, settings, on_batch=on_batch)

    def deadly_part(number: int, *rest: Any) -> UnitReport:
        if kind == "jsonl.gz" and number == 2:
            raise BrokenProcessPool
        return real(number, *rest)

    real = preparing_unit._write
    monkeypatch.setattr(preparing_unit, "_write", deadly_part)
    monkeypatch.setattr("pipeline.data.preparing.prepare.prepare_unit", deadly)
    rules = TextRules(unit_bytes=5000, separator="|" if kind == "txt" else None)
    wanted = request(path, tokenizer="bytes", allow_failed=True, rules=rules)
    manifest, _ = run(wanted)
    assert len(manifest.failed) == (1 if kind == "jsonl.gz" else 2)
    assert "killed twice" in manifest.failed[0].reason
    split, train = open_dataset(tmp_path / "out").split("train"), documents(tmp_path / "out", "train")
    assert len(train) > (30 if kind == "jsonl.gz" else 150), "of one file, what was done before"
    numbers = [split.describe(n).row for n in range(len(train))]
    line_of = [i for i in range(400) for _ in range(1 + i % 3)] if kind.startswith("jsonl") else list(range(400))
    right = [int(text.split()[1]) == line_of[row] for text, row in zip(train, numbers, strict=True)]
    said = f"; rows of {path} after it are numbered as if it had none" in manifest.failed[0].reason
    assert said != all(right)
    assert said == (kind == "txt")


# what ends documents is in none


def tokenizer_file(folder: Path, model: Any, *, special: bool = True) -> str:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"][0]["special"] = special
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    return str(folder / "tokenizer.json")


LETTERS = ["<unk>", "</s>", "\u2581", *"abcdefghijklmnopqrstuvwxyz</>0123456789"]
UNIGRAM = models.Unigram([(piece, -2.0 if number > 1 else 0.0) for number, piece in enumerate(LETTERS)], unk_id=0)
BPE = models.BPE(vocab={piece: number for number, piece in enumerate([*LETTERS, "an"])}, merges=[("a", "n")])


@pytest.mark.parametrize(("model", "special"), [(UNIGRAM, True), (BPE, False)])
def test_the_text_of_the_end_is_text_to_any_tokenizer(tmp_path: Path, model: Any, special: bool) -> None:
    texts = [f"document {number} </s>{'</s> and' * (number % 3)} more" for number in range(150)]
    write_lines(tmp_path / "a.jsonl", texts)
    file = tokenizer_file(tmp_path, model, special=special)
    manifest, said = run(request(tmp_path / "a.jsonl", tokenizer=file, val_fraction=0.0, eos="</s>"))
    assert documents(tmp_path / "out", "train") == texts
    assert "is whole: 150 documents" in verify(tmp_path / "out")
    assert manifest.noticed == {"documents with the text of a special token": 150}
    assert "warning" not in said
    again, _ = run(request(tmp_path / "a.jsonl", "again", tokenizer=file, val_fraction=0.0, eos="</s>", workers=2))
    assert again.data_digest == manifest.data_digest


def test_an_end_that_stands_for_text_is_refused_before_the_work(corpus: Path) -> None:
    with pytest.raises(UserError, match="the token 'x' of train:300 cannot end documents"):
        run(request(corpus, eos="x"))


def test_a_document_that_cannot_but_hold_the_end_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [f"a b {number % 2}" for number in range(150)])
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('\n{"text": "a strange word"}\n')
    end = "</s>"  # also what unknown words become
    words = models.WordLevel({end: 0, "\u2581a": 1, "\u2581b": 2, "\u25810": 3, "\u25811": 4}, unk_token=end)
    wanted = request(tmp_path / "a.jsonl", tokenizer=tokenizer_file(tmp_path, words), val_fraction=0.0)
    with pytest.raises(
        UserError, match=r"a\.jsonl, row 151.*: text in it is encoded with '</s>' \(id 0\).*--eos TOKEN"
    ):
        run(replace(wanted, rules=TextRules()))
    assert not (tmp_path / "out" / "manifest.json").exists()


# inputs given for validation that hold nothing


def given(corpus: Path, **changes: Any) -> Request:
    inputs = {"inputs": (str(corpus / "a.jsonl"),), "val_inputs": (str(corpus / "b.jsonl"),)}
    return request(corpus, **inputs, val_fraction=None, tokenizer="bytes", max_bad=1.0, **changes)


def test_validation_inputs_without_a_document_are_refused_before_the_work(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(corpus / "b.jsonl", ["", ""])
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.preparing.prepare.prepare_unit", None)
        with pytest.raises(UserError, match="val is empty: no document in the inputs of --val-input; mend them"):
            run(given(corpus))
    write_lines(corpus / "b.jsonl", TEXTS[120:])
    run(given(corpus))
    assert documents(corpus.parent / "out", "val") == TEXTS[120:]


def test_validation_inputs_without_a_document_do_not_cost_the_training_units(corpus: Path) -> None:
    (corpus / "b.jsonl").write_text("broken\n" * 4001)  # more than are looked at before the work
    with pytest.raises(UserError, match=r"val is empty: .*; finished units are kept"):
        run(given(corpus))
    output = corpus.parent / "out"
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("train-*.bin")}
    assert len(before) > 3
    write_lines(corpus / "b.jsonl", TEXTS[120:])
    run(given(corpus))
    after = {path.name: path.stat().st_mtime_ns for path in output.glob("train-*.bin")}
    assert len(before.items() - after.items()) <= 1, "the last of them may share its unit with the mended file"
    run(replace(given(corpus), output=corpus.parent / "fresh"))
    assert content(output) == content(corpus.parent / "fresh")


# units beyond the five digits of their names


def test_files_of_units_with_six_digits_are_their_own(tmp_path: Path) -> None:
    names = {
        "train-10000.bin.ab12cd34.tmp": 10000, "train-100001.bin.12345678.tmp": 100001,
        "quarantine-100001-0002.jsonl.0a.tmp": 100001, "report-100001-0003.json": 100001,
        "tokenizer.json.12345678.tmp": None, "ledger.jsonl.tmp": None, "ledger.0-of-2.jsonl.tmp": None,
    }  # fmt: skip
    assert {name: unit_number(tmp_path / name) for name in names} == names


def test_a_share_leaves_the_files_of_units_with_six_digits_to_theirs(tmp_path: Path) -> None:
    kept = {"report-100001.json", "train-100001.bin.ab.tmp"}
    gone = {"report-10000.json", "train-10000.bin.ab.tmp"}
    for name in kept | gone:
        (tmp_path / name).touch()
    preparation = _Preparation.__new__(_Preparation)  # a plan of so many units would take minutes
    preparation.request = request(tmp_path, share=(0, 2))
    preparation.output, preparation.units = tmp_path, (Unit(10000, ()), Unit(100001, ()))
    preparation.done = {}
    preparation.ledger = Ledger(tmp_path, share=(0, 2))
    preparation.header = LedgerHeader(settings={}, inputs_digest="", tokenizer_fingerprint="")
    preparation._write_ledger()
    preparation._clean()
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == kept | {"ledger.0-of-2.jsonl"}


def test_judging_the_beginning_takes_as_much_for_each_unit(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    def dropped(self: UnitReport) -> int:
        nonlocal looks
        looks += 1
        return sum(self.drops.values())

    monkeypatch.setattr(UnitReport, "dropped", property(dropped))
    monkeypatch.setattr("pipeline.data.preparing.prepare.EARLY_VERDICT_RECORDS", 1)
    manifest, _ = run(request(corpus, tokenizer="bytes", rules=TextRules(unit_bytes=200)))
    units = len(manifest.splits["train"])
    assert units > 60
    assert looks < 10 * units, "each is looked at a few times, not once for each that follows"


BAD_LISTS = {
    "garbage": b"garbage\n",
    "a list": b"[]\n",
    "another input": b'{"source":99,"row":0,"reason":"r","excerpt":""}\n',
    "a text for a number": b'{"source":0,"row":"x","reason":"r","excerpt":""}\n',
}


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """An output whose only unit, with a rejected record, is done; the manifest is not written yet."""
    rows = [{"text": f"text {number}"} for number in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in [*rows, {"text": 5}]))
    assert prepare(request(tmp_path / "a.jsonl", share=(0, 2), rules=TextRules()), console=Console(quiet=True)) is None
    return tmp_path / "out"


@pytest.mark.parametrize("damage", BAD_LISTS.values(), ids=BAD_LISTS)
def test_a_damaged_list_of_rejected_records_is_named_and_made_again(begun: Path, damage: bytes) -> None:
    (begun / "quarantine-00000.jsonl").write_bytes(damage)
    with pytest.raises(UserError, match=r"quarantine-00000\.jsonl, line 1.*remove the file and run"):
        run(request(begun.parent / "a.jsonl", rules=TextRules()))
    (begun / "quarantine-00000.jsonl").unlink()
    manifest, said = run(request(begun.parent / "a.jsonl", rules=TextRules()))
    assert "1 made again" in said
    assert manifest.drops == {"text is not a string": 1}
    assert len((begun / "quarantine.jsonl").read_bytes().splitlines()) == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"examples":[[0,', b'"examples":[[77,'),
        (b'"first_sources":{"train":0', b'"first_sources":{"train":55'),
        (b'"first_sources":{"train":0', b'"first_sources":{"val":0'),
        (b'"rows":{"0":', b'"rows":{"-9":'),
    ],
)
def test_a_report_that_contradicts_itself_costs_its_unit_only(begun: Path, old: bytes, new: bytes) -> None:
    ledger = begun / "ledger.0-of-2.jsonl"
    assert old in ledger.read_bytes()
    ledger.write_bytes(ledger.read_bytes().replace(old, new))
    manifest, said = run(request(begun.parent / "a.jsonl", rules=TextRules()))
    assert "going on" not in said
    assert manifest.records == 201


@pytest.mark.parametrize("flag", ["--max-doc-bytes", "--max-record-bytes"])
def test_sizes_beyond_any_memory_are_refused(flag: str, tmp_path: Path) -> None:
    words = [str(tmp_path), "--output", str(tmp_path / "out"), "--tokenizer", "bytes", flag]
    parse([*words, "1024G"])
    for size in ("1025G", str(2**63), str(10**30)):
        with pytest.raises(UserError, match=rf"{flag}: .*less than or equal to 1099511627776"):
            parse([*words, size])
