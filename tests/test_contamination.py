"""Contaminated documents are those that a search with sets of tuples finds, and no others."""

from __future__ import annotations

import json
import multiprocessing
import random
import string
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from pipeline.data.dataset import open_dataset
from pipeline.data.deleting.contamination import TextDecoder, check_contamination
from pipeline.data.deleting.dedup import deduplicate
from pipeline.data.deleting.ngrams import NgramIndex, normalise
from pipeline.data.manifest import Contamination, Manifest, read_manifest
from pipeline.data.preparing.audit import verify
from pipeline.data.tokenizer import TextTokenizer, load_tokenizer
from pipeline.errors import UserError
from tests.prepared import BYTES, texts_of, write_dataset

QUIET = Console(quiet=True)
WORDS = [f"w{number}" for number in range(30)]


def words_by_hand(text: str) -> list[str]:
    """ASCII only: what `string.punctuation` holds goes."""
    stripped = text.lower().translate(str.maketrans("", "", string.punctuation))
    return stripped.split()


def grams_by_hand(text: str, length: int) -> set[tuple[str, ...]]:
    words = words_by_hand(text)
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def found_by_hand(training: list[str], evaluation: list[str], ngram: int) -> list[int]:
    """Numbers of the training texts that hold an n-gram of an evaluation text."""
    wanted: set[tuple[str, ...]] = set()
    for text in evaluation:
        count = min(ngram, len(words_by_hand(text)))
        if count >= min(8, ngram):
            wanted |= grams_by_hand(text, count)
    lengths = {len(gram) for gram in wanted}
    return [i for i, text in enumerate(training) if any(grams_by_hand(text, n) & wanted for n in lengths)]


def noisy(words: list[str], generator: random.Random) -> str:
    """Words with capitals, punctuation and white space of all kinds around them."""
    marks = ["", "", "", ",", "...", '"', "$", "-"]
    spelled = [generator.choice(marks) + generator.choice([word, word.upper()]) for word in words]
    return "".join(word + generator.choice([" ", "\n", " \t", " -- "]) for word in spelled)


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def check(
    folder: Path, files: list[Path], *, ngram: int = 13, delete: bool = True, executor: Executor | None = None
) -> Manifest:
    return check_contamination(
        folder, files, ngram=ngram, delete=delete, text_key="text", executor=executor, console=QUIET
    )


def kept(folder: Path) -> list[str]:
    return texts_of(open_dataset(folder).split("train"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def corpus(generator: random.Random, documents: int = 150) -> tuple[list[str], list[str]]:
    """Training and evaluation texts of so few words that many share several in a row."""
    evaluation = [
        noisy(generator.choices(WORDS, k=generator.choice([3, 7, 8, 9, 12, 13, 40, 60])), generator) for _ in range(30)
    ]
    training = []
    for _ in range(documents):
        words = generator.choices([*WORDS, "other", "more"], k=generator.randint(0, 80))
        if generator.random() < 0.5:
            source = words_by_hand(generator.choice(evaluation))
            start = generator.randrange(len(source))
            part = source[start : start + generator.randint(5, 20)]
            place = generator.randint(0, len(words))
            words[place:place] = part
        training.append(noisy(words, generator) or "x")
    return training, evaluation


@pytest.mark.parametrize("ngram", [5, 8, 13])
def test_it_finds_what_sets_of_tuples_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ngram: int) -> None:
    monkeypatch.setattr("pipeline.data.deleting.contamination._BLOCK_TOKENS", 500)  # a few documents at once
    generator = random.Random(ngram)
    training, evaluation = corpus(generator)
    folder = write_dataset(tmp_path / "d", {"train": [training[:60], training[60:]], "val": [training[:5]]})
    files = [write_jsonl(tmp_path / "a.jsonl", evaluation[:15]), write_jsonl(tmp_path / "b.jsonl", evaluation[10:])]
    manifest = check(folder, files, ngram=ngram)
    wanted = found_by_hand(training, evaluation, ngram)
    assert 5 < len(wanted) < len(training), "the test must have something to find and something to leave"
    assert kept(folder) == [text for number, text in enumerate(training) if number not in wanted]
    assert manifest.contamination == Contamination(
        ngram=ngram,
        files={
            str(files[0]): len(found_by_hand(training, evaluation[:15], ngram)),
            str(files[1]): len(found_by_hand(training, evaluation[10:], ngram)),
        },
        documents=len(wanted),
        deleted=True,
    )
    assert texts_of(open_dataset(folder).split("val")) == training[:5]
    assert manifest == read_manifest(folder)
    verify(folder)


def test_an_ngram_ends_with_its_document(tmp_path: Path) -> None:
    words = [f"v{number}" for number in range(13)]
    halves = [" ".join(words[:6]), " ".join(words[6:])]
    folder = write_dataset(tmp_path / "d", {"train": [[*halves, "x"], [" ".join(["so", *words, "on"])], ["y"]]})
    manifest = check(folder, [write_jsonl(tmp_path / "e.jsonl", [" ".join(words)])])
    assert manifest.contamination is not None
    assert manifest.contamination.documents == 1
    assert kept(folder) == [*halves, "x", "y"]


def test_short_texts_are_looked_for_whole_and_very_short_ones_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eight, seven = " ".join("abcdefgh"), " ".join("ijklmno")
    train = [f"so {eight} on", f"so {eight[:-2]} on", f"so {seven} on"]
    folder = write_dataset(tmp_path / "d", {"train": [train]})
    file = write_jsonl(tmp_path / "e.jsonl", [eight, seven])
    console = Console(soft_wrap=True)
    check_contamination(folder, [file], delete=True, text_key="text", executor=None, console=console)
    assert kept(folder) == train[1:]
    assert capsys.readouterr().out.splitlines() == [
        f"note: {file}: 1 of 2 texts have fewer than 8 words and are not looked for",
        "contamination: 1 of 3 training documents share 13 words in a row with an evaluation file: deleted",
        f"  {file}: 1, such as by hand row 0",
    ]


def test_three_examples_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(f"v{number}" for number in range(13))
    folder = write_dataset(tmp_path / "d", {"train": [["a", text, "b"], [text, text], [text]]})
    file = write_jsonl(tmp_path / "e.jsonl", [text])
    console = Console(soft_wrap=True)
    before = contents(folder)
    check_contamination(folder, [file], delete=False, text_key="text", executor=None, console=console)
    shown = capsys.readouterr().out
    assert f"  {file}: 4, such as by hand row 1, by hand row 3, by hand row 4\n" in shown
    assert "kept; --delete-contaminated deletes them" in shown
    assert {name for name, content in contents(folder).items() if before.get(name) != content} == {"manifest.json"}


def test_files_of_all_kinds(tmp_path: Path) -> None:
    texts = [" ".join(f"{name}{number}" for number in range(20)) for name in "abcd"]
    pq.write_table(pa.table({"text": [texts[0]]}), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text(f"id,text\n1,{texts[1]}\n")
    (tmp_path / "c.txt").write_text(texts[2] + "\n\n" + "z " * 20)
    write_jsonl(tmp_path / "d.jsonl", [texts[3]])
    train = [[f"{i} {text} and" for i, text in enumerate(texts)] + ["clean"]]
    folder = write_dataset(tmp_path / "d", {"train": train})
    files = sorted(path for path in tmp_path.iterdir() if path.is_file())
    manifest = check(folder, files)
    assert manifest.contamination is not None
    assert manifest.contamination.files == {str(path): 1 for path in files}
    assert kept(folder) == ["clean"]


def test_the_executor_does_not_matter(tmp_path: Path) -> None:
    training, evaluation = corpus(random.Random(3))
    shards = [training[i : i + 40] for i in range(0, 150, 40)]
    folders = [write_dataset(tmp_path / name, {"train": shards}) for name in "ab"]
    file = write_jsonl(tmp_path / "e.jsonl", evaluation)
    check(folders[0], [file])
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes:
        check(folders[1], [file], executor=processes)
    assert contents(folders[0]) == contents(folders[1])


def test_it_can_be_undone_and_does_not_depend_on_duplicates(tmp_path: Path) -> None:
    training, evaluation = corpus(random.Random(4))
    shards = [training[:70], [*training[70:], *training[:30]]]
    one, other = (write_dataset(tmp_path / name, {"train": shards}) for name in "ab")
    file = write_jsonl(tmp_path / "e.jsonl", evaluation)
    before = contents(one)
    deduplicate(one, method="exact", executor=None, console=QUIET)
    duplicates_only = contents(one)
    check(one, [file])
    check(other, [file])
    deduplicate(other, method="exact", executor=None, console=QUIET)
    assert contents(one) == contents(other)
    check(one, [])
    assert contents(one) == duplicates_only
    check(other, [file], delete=False)
    assert kept(other) == kept(one)
    deduplicate(one, method="none", executor=None, console=QUIET)
    assert contents(one) == before


def test_what_has_nothing_to_look_for_is_refused(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", {"train": [["a"]]})
    before = contents(folder)
    with pytest.raises(UserError, match=r"none of its 1 texts has 8 words.*--text-key"):
        check(folder, [write_jsonl(tmp_path / "e.jsonl", ["too few words"])])
    with pytest.raises(UserError, match="no key 'text'; found 'question'"):
        check(folder, [write_jsonl(tmp_path / "f.jsonl", ["any"], key="question")])
    with pytest.raises(UserError, match=r"no file or folder .*missing\.jsonl"):
        check(folder, [tmp_path / "missing.jsonl"])
    with pytest.raises(UserError, match="n-grams of 1 words"):
        check(folder, [tmp_path / "e.jsonl"], ngram=1)
    eight = " ".join("abcdefgh")
    everything = write_dataset(tmp_path / "e", {"train": [[eight]]})
    with pytest.raises(UserError, match=r"nothing of train would be left: all its documents \(1\) are"):
        check(everything, [write_jsonl(tmp_path / "g.jsonl", [eight])])
    assert contents(folder) == before


def test_an_index_left_by_a_killed_process_goes(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", {"train": [["a"]]})
    (folder / ".contamination-0123.npz").write_bytes(b"torn")
    check(folder, [write_jsonl(tmp_path / "e.jsonl", [" ".join("abcdefgh")])])
    assert not list(folder.glob(".contamination*"))


# parts


@given(st.text(max_size=40))
def test_words_of_any_text(text: str) -> None:
    """The index splits first and strips each word; stripping the whole text first must give the same words."""
    import unicodedata

    whole = "".join(c for c in text.lower() if unicodedata.category(c)[0] not in "PS").split()
    assert [word for word in map(normalise, text.split()) if word] == whole


@settings(max_examples=50)
@given(st.integers(0, 10**6))
def test_a_long_text_is_split_anywhere_and_its_words_are_the_same(seed: int) -> None:
    generator = random.Random(seed)
    index, _ = NgramIndex.build([(0, " ".join(WORDS))], ngram=13)
    text = noisy(generator.choices([*WORDS, "?", "unknown"], k=200), generator)
    wanted = [WORDS.index(word) + 1 if word in WORDS else 0 for word in words_by_hand(text)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.data.deleting.ngrams._CHUNK_CHARACTERS", generator.randint(1, 300))
        patch.setattr("pipeline.data.deleting.ngrams._CACHED_SPELLINGS", generator.randint(0, 40))
        assert index.word_ids(text).tolist() == wanted
        assert index.word_ids(text).tolist() == wanted


def test_equal_hashes_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hash that is the same in any order of the words the result is the same: hashes only preselect."""
    monkeypatch.setattr("pipeline.data.deleting.ngrams.mix_keys", lambda *parts: np.zeros(1, np.uint64))
    orders = ["a b c d e f g h", "b a c d e f g h", "a b c d e f h g", "b a c d e f g h"]
    index, tally = NgramIndex.build([*enumerate(orders), (0, "short")], ngram=8)
    places, owners = index.search(index.word_ids("x b a c d e f g h x h g f e d c b a"))
    assert sorted(zip(places.tolist(), owners.tolist(), strict=True)) == [(1, 1), (1, 3)]
    assert tally == {0: [1, 1], 1: [1, 0], 2: [1, 0], 3: [1, 0]}


def tokenizers() -> list[TextTokenizer]:
    texts = ["The words of a text, again and again: naïve 東京 🙂\n", "and  more"]
    return [BYTES, load_tokenizer("train:300", texts=texts), load_tokenizer("chars", texts=texts)]


@pytest.mark.parametrize("tokenizer", tokenizers(), ids=["bytes", "train", "chars"])
def test_texts_are_decoded_as_the_library_does(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ids, special ones and halves of characters included."""
    monkeypatch.setattr("pipeline.data.deleting.contamination._BLOCK_TOKENS", 7)
    generator = np.random.default_rng(0)
    ids = [generator.integers(0, tokenizer.vocab_size, n) for n in (0, 1, 7, 8, 500)]
    ids.append(np.array(tokenizer.encode("again and naïve 東京 🙂")))
    tokens = np.concatenate([part for document in ids for part in (document, [tokenizer.eos_id])]).astype(np.uint16)
    ends = np.cumsum([len(document) + 1 for document in ids])
    assert list(TextDecoder(tokenizer).texts(tokens, ends)) == [tokenizer.decode(document) for document in ids]
