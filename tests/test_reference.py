"""Tokenizers that no text survives: normalizers without bound, regular expressions that give up. One message each."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from pipeline.data.preparing.reference import refuse_growth
from pipeline.data.tokenizer import load_tokenizer
from pipeline.data.tokenizer_library import growth
from pipeline.errors import UserError

ROOT = Path(__file__).parents[1]


def tokenizer(normalizer: object = None, pre_tokenizer: object = None) -> Tokenizer:
    made = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1, "</s>": 2}, unk_token="[UNK]"))  # noqa: S106 - not a password
    if normalizer:
        made.normalizer = normalizer  # type: ignore[assignment]
    made.pre_tokenizer = pre_tokenizer or pre_tokenizers.Whitespace()  # type: ignore[assignment]
    made.add_special_tokens(["</s>"])
    return made


REPLACE = normalizers.Replace
GROWING = {
    "doubling": normalizers.Sequence([REPLACE("a", "aaaa")] * 12),
    "endless": normalizers.Sequence([REPLACE("a", "aaaa")] * 200),
    "expressions": normalizers.Sequence([REPLACE(Regex("[ab]"), "a" * 30)] * 4),
    "long": REPLACE("a", "x" * 100_000),
    "before": normalizers.Sequence([normalizers.Prepend("a" * 900), REPLACE("a", "a" * 900)]),
    "nested": normalizers.Sequence([normalizers.Sequence([REPLACE("a", "b" * 3000), REPLACE("b", "c" * 300)])]),
}
FAILING = {
    "words": tokenizer(pre_tokenizer=pre_tokenizers.Split(Regex("(a+)+$"), "isolated")),
    "normalizer": tokenizer(REPLACE(Regex("(a+)+$"), "x")),
    "alternatives": tokenizer(pre_tokenizer=pre_tokenizers.Split(Regex("(?:(?:a|aa)+)+b"), "isolated")),
}


def prepared(folder: Path, made: Tokenizer, text: str) -> subprocess.CompletedProcess[str]:
    """data_prep.py within 3 GB of memory."""
    made.save(str(folder / "tokenizer.json"))
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"{text} {n}"}) + "\n" for n in range(120)))
    command = ["data_prep.py", "a.jsonl", "--output", "out", "--tokenizer", "tokenizer.json", "--eos", "</s>"]
    return subprocess.run(
        [sys.executable, str(ROOT / command[0]), *command[1:]],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30)),
    )


@pytest.mark.parametrize("name", ["doubling", "endless", "before"])
def test_a_normalizer_without_bound_is_one_message(tmp_path: Path, name: str) -> None:
    done = prepared(tmp_path, tokenizer(GROWING[name]), "a" * 4000)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: the normalizer of this tokenizer ma")


@pytest.mark.parametrize("name", GROWING)
def test_texts_that_would_grow_are_refused_in_little_memory(tmp_path: Path, name: str) -> None:
    tokenizer(GROWING[name]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"the normalizer of this tokenizer ma.*choose another --tokenizer"):  # noqa: PT012 - either may refuse
        loaded = load_tokenizer(str(tmp_path / "tokenizer.json"), eos="</s>")
        refuse_growth(loaded, [b"b", b"a" * 4000, b"a" * 4000])


@pytest.mark.parametrize(
    "normalizer",
    [
        None,
        normalizers.NFKC(),
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]),
        normalizers.Sequence([normalizers.Prepend("▁"), REPLACE(" ", "▁")]),
        normalizers.Sequence([REPLACE("``", '"'), REPLACE("''", '"'), REPLACE(Regex(" {2,}"), " ")] * 3),
    ],
)
def test_common_normalizers_are_left_alone(tmp_path: Path, normalizer: object) -> None:
    tokenizer(normalizer).save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"), eos="</s>")
    refuse_growth(loaded, [b"a  \xef\xb7\xba `` " * 400_000])


@pytest.mark.parametrize(
    ("normalizer", "text"),
    [
        (REPLACE("a", "xyz"), "aab"),
        (REPLACE("ab", "x" * 9), "ababab"),
        (REPLACE(Regex("b*"), "xy"), "abab"),
        (REPLACE(Regex("(?=a)"), "xy"), "aaaa"),
        (normalizers.Prepend("▁"), "a"),
        (normalizers.NFKC(), "\ufdfa"),
        (normalizers.Sequence([REPLACE("a", "bb"), REPLACE("b", "ccc")]), "aaa"),
        (normalizers.ByteLevel(), "é\n "),
        (normalizers.BertNormalizer(), "日本"),
        (normalizers.Lowercase(), "İ"),
    ],
)
def test_no_text_grows_more_than_is_said(normalizer: object, text: str) -> None:
    definition = json.loads(tokenizer(normalizer).to_str())["normalizer"]
    grown = len(normalizer.normalize_str(text).encode())  # type: ignore[attr-defined]
    assert grown <= growth(definition) * len(text.encode())


@pytest.mark.parametrize("name", FAILING)
def test_an_expression_that_gives_up_is_one_message(tmp_path: Path, name: str) -> None:
    done = prepared(tmp_path, FAILING[name], "a" * 60 + "c")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "retry-limit-in-match over) on a text of 63 characters that begins with 'aaaa" in line
