"""Duplicates are found as by comparing everything with everything, and deleting them can be undone at any moment."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import string
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from pipeline.data.dataset import open_dataset
from pipeline.data.deleting import deletion
from pipeline.data.deleting.contamination import check_contamination
from pipeline.data.deleting.dedup import Method, choose_bands, deduplicate, find, join, pairs_of_equals
from pipeline.data.deleting.minhash import BINS, signature_path, signatures
from pipeline.data.manifest import Counts, Manifest, SplitName, read_manifest
from pipeline.data.preparing.audit import verify
from pipeline.errors import UserError
from tests.prepared import texts_of, write_dataset

QUIET = Console(quiet=True)


def dedup(
    folder: Path, method: Method = "near", threshold: float = 0.8, *, executor: Executor | None = None
) -> Manifest:
    return deduplicate(folder, method=method, threshold=threshold, executor=executor, console=QUIET)


def kept(folder: Path, split: SplitName = "train") -> list[str]:
    return texts_of(open_dataset(folder).split(split))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def random_text(generator: random.Random, length: int) -> str:
    return "".join(generator.choices(string.ascii_letters, k=length))


def variant(text: str, similarity: float, generator: random.Random) -> str:
    """The text with so many characters replaced, far apart, that its 5-grams are about so similar."""
    grams = len(text) - 4
    changes = round((1 - similarity) / (1 + similarity) * grams / 5)
    characters = list(text)
    for place in generator.sample(range(4, len(text) - 4, 6), changes):
        characters[place] = "#"
    return "".join(characters)


def jaccard(one: str, other: str) -> float:
    """The similarity by definition, of the sets of byte 5-grams."""
    a, b = ({text[i : i + 5] for i in range(len(text) - 4)} for text in (one, other))
    return len(a & b) / len(a | b)


def split_up(texts: list[str], shards: int = 3) -> list[list[str]]:
    size = -(-len(texts) // shards)
    return [texts[i : i + size] for i in range(0, len(texts), size)]


# exact


def test_the_first_of_equals_stays_and_validation_outranks_training(tmp_path: Path) -> None:
    train = [["a", "leaked", "b"], ["a", "", "c", "b"], ["d", "a", ""]]
    val = [["held out", "leaked"], ["held out", "other"]]
    folder = write_dataset(tmp_path / "d", {"train": train, "val": val})
    manifest = dedup(folder, "exact")
    assert kept(folder) == ["a", "b", "", "c", "d"]
    assert kept(folder, "val") == ["held out", "leaked", "other"]
    deleted = ["leaked", "a", "b", "a", "", "held out"]
    assert manifest.deduplication is not None
    assert manifest.deduplication.exact == Counts(
        documents=6, tokens=sum(len(text) + 1 for text in deleted), text_bytes=sum(map(len, deleted))
    )
    assert manifest == read_manifest(folder)
    assert manifest.total("train", "documents") == 5
    assert manifest.total("train", "text_bytes") == open_dataset(folder).split("train").text_bytes == 4
    verify(folder)


@settings(max_examples=30)
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1), min_size=1, max_size=4))
def test_exact_is_what_a_set_says(tmp_path_factory: pytest.TempPathFactory, shards: list[list[str]]) -> None:
    folder = write_dataset(tmp_path_factory.mktemp("d") / "d", {"train": shards})
    dedup(folder, "exact")
    assert kept(folder) == list(dict.fromkeys(text for shard in shards for text in shard))


def test_long_equal_texts_are_the_business_of_exact_and_short_similar_ones_of_nobody(tmp_path: Path) -> None:
    long = random_text(random.Random(1), 300)
    folder = write_dataset(tmp_path / "d", {"train": [[long, "abcd", "abce", long, "abcd"]]})
    manifest = dedup(folder)
    assert kept(folder) == [long, "abcd", "abce"]
    assert manifest.deduplication is not None
    assert (manifest.deduplication.exact.documents, manifest.deduplication.near) == (2, Counts())


# near


@pytest.fixture(scope="module")
def planted() -> list[str]:
    """250 texts of 3 to 2,000 characters, many with variants of similarity 0.5 to 0.97, in any order."""
    generator = random.Random(7)
    texts = []
    for number in range(100):
        text = random_text(generator, generator.choice([60, 200, 500, 2000]))
        wanted = [(), (0.5,), (0.8,), (0.95,), (0.97, 0.95, 0.5)][number % 5]
        texts += [text, *(variant(text, similarity, generator) for similarity in wanted)]
    texts += [random_text(generator, length) for length in range(3, 63)]
    generator.shuffle(texts)
    return list(dict.fromkeys(texts))


@pytest.fixture(scope="module")
def similarities(planted: list[str]) -> list[tuple[int, int, float]]:
    """All pairs that share a 5-gram, and their similarity by definition."""
    grams = [{text[i : i + 5] for i in range(len(text) - 4)} for text in planted]
    found = []
    for j in range(len(planted)):
        for i in range(j):
            shared = len(grams[i] & grams[j])
            if shared:
                found.append((i, j, shared / len(grams[i] | grams[j])))
    return found


def clusters_by_hand(pairs: list[tuple[int, int, float]], size: int, threshold: float) -> list[int]:
    """For each text the first of its connected component."""
    leader = list(range(size))
    for i, j, similarity in pairs:
        if similarity >= threshold:
            low, high = sorted((leader[i], leader[j]))
            leader = [low if name == high else name for name in leader]
    return leader


@pytest.mark.parametrize(("threshold", "slack"), [(0.5, 0.15), (0.65, 0.15), (0.8, 0.12), (0.87, 0.07)])
def test_near_is_what_comparing_everything_says(
    tmp_path: Path, planted: list[str], similarities: list[tuple[int, int, float]], threshold: float, slack: float
) -> None:
    """All pairs by definition; between a little above and a little below the threshold, estimates may err."""
    folder = write_dataset(tmp_path / "d", {"train": split_up(planted)})
    dedup(folder, threshold=threshold)
    found = set(kept(folder))
    surely = clusters_by_hand(similarities, len(planted), threshold + slack)
    perhaps = clusters_by_hand(similarities, len(planted), threshold - slack)
    duplicates = [number for number, first in enumerate(surely) if number != first]
    singles = [number for number, first in enumerate(perhaps) if number == first]
    assert len(duplicates) > 20, "the test must have something to find"
    missed = [planted[number] for number in duplicates if planted[number] in found]
    wrong = [planted[number] for number in singles if planted[number] not in found]
    assert (missed, wrong) == ([], [])


@pytest.mark.parametrize(("similarity", "length"), [(0.5, 60), (0.8, 60), (0.8, 1000), (0.95, 1000), (0.8, 20_000)])
def test_sketches_estimate_jaccard(similarity: float, length: int) -> None:
    """Mean and spread over 200 pairs against the definition and the binomial law."""
    generator = random.Random(3)
    errors, spread = [], []
    for _ in range(200 if length < 2000 else 30):
        one = random_text(generator, length)
        other = variant(one, similarity, generator)
        true = jaccard(one, other)
        ids = np.frombuffer(f"{one}\0{other}\0".encode(), np.uint8).astype(np.uint16)
        sketches = signatures(ids, np.array([length + 1] * 2, np.int32))
        errors.append(float((sketches[0] == sketches[1]).mean()) - true)
        spread.append(true * (1 - true) / BINS)
    sigma = np.sqrt(np.mean(spread))
    assert abs(np.mean(errors)) < 4 * sigma / np.sqrt(len(errors))
    assert np.std(errors) < 1.3 * sigma


def test_a_sketch_depends_on_the_document_alone() -> None:
    """Alone, among others, in a repetitive neighbourhood, across the borders of what is hashed at once."""
    generator = np.random.default_rng(5)
    lengths = np.array([1, 5, 6, 40_000, 7, 200, 30_000, 3, 1200], np.int32)
    tokens = generator.integers(0, 60_000, int(lengths.sum())).astype(np.uint16)
    tokens[52:20_000] = 9  # a document that repeats itself fills its bins in later rounds
    together = signatures(tokens, lengths)
    ends = np.cumsum(lengths)
    for number, (end, length) in enumerate(zip(ends, lengths, strict=True)):
        alone = signatures(tokens[end - length : end], lengths[number : number + 1])
        assert np.array_equal(together[number], alone[0])
    assert not np.array_equal(together[2], together[4])


def sketch_by_hand(tokens: list[int]) -> list[int]:
    """Fast similarity sketching as its authors write it down, in Python's integers."""
    factors = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F)

    def mix(value: int) -> int:
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    grams = {tuple(tokens[i : i + 5]) for i in range(len(tokens) - 4)}
    hashes = [mix(sum(a * b for a, b in zip(gram, factors, strict=True)) % 2**64) for gram in grams]
    bins: list[int | None] = [None] * 128
    for number in range(64 + 128):
        again = hashes if number == 0 else [mix((value + number * 0x9E3779B97F4A7C15) % 2**64) for value in hashes]
        fallen: dict[int, int] = {}
        for value in again:
            place = value % 128 if number < 64 else number - 64
            fallen[place] = min(value >> 32, fallen.get(place, 2**32))
        bins = [fallen.get(place) if value is None else value for place, value in enumerate(bins)]
    return [value % 2**16 for value in bins if value is not None]


@pytest.mark.parametrize("length", [5, 6, 9, 30, 100, 700, 3000])
def test_sketches_are_those_of_the_paper(length: int) -> None:
    tokens = np.random.default_rng(length).integers(0, 60_000, length + 1).astype(np.uint16)
    found = signatures(tokens, np.array([length + 1], np.int32))
    assert found[0].tolist() == sketch_by_hand(tokens[:-1].tolist())


def test_repeated_tokens_count_once() -> None:
    """Sets, not bags: 5-grams of a period of 3 are 3, however often it is repeated."""
    period = np.array([1, 2, 3] * 20_000 + [0], np.uint16)
    short = np.array([1, 2, 3, 1, 2, 3, 1, 0], np.uint16)
    found = signatures(np.concatenate([period, short]), np.array([len(period), len(short)], np.int32))
    assert np.array_equal(found[0], found[1])


def test_of_a_chain_the_first_stays(tmp_path: Path) -> None:
    generator = random.Random(11)
    chain = [random_text(generator, 1000)]
    for step in range(6):
        characters = list(chain[-1])
        for place in range(10 + step * 15, 10 + step * 15 + 900, 100):
            characters[place] = "#"
        chain.append("".join(characters))
    assert min(jaccard(one, other) for one, other in pairwise(chain)) > 0.85
    assert jaccard(chain[0], chain[-1]) < 0.6
    other = random_text(generator, 1000)
    folder = write_dataset(tmp_path / "d", {"train": [[chain[3], other], [chain[0], *chain[4:]], chain[1:3]]})
    dedup(folder, threshold=0.75)
    assert kept(folder) == [chain[3], other]


def test_near_copies_of_validation_leave_training_and_never_the_other_way(tmp_path: Path) -> None:
    """Two validation documents that only a training document connects both stay."""
    generator = random.Random(12)
    middle = random_text(generator, 2000)
    left, right = middle[:1800] + random_text(generator, 200), random_text(generator, 200) + middle[200:]
    assert min(jaccard(left, middle), jaccard(middle, right)) > 0.8 > 0.72 > jaccard(left, right)
    copy = variant(left, 0.95, generator)
    unique = random_text(generator, 500)
    folder = write_dataset(tmp_path / "d", {"train": [[middle, unique]], "val": [[left, right, copy]]})
    dedup(folder, threshold=0.76)
    assert kept(folder) == [unique]
    assert kept(folder, "val") == [left, right]


def test_a_later_document_joins_earlier_ones(tmp_path: Path) -> None:
    generator = random.Random(12)
    middle = random_text(generator, 2000)
    left, right = middle[:1800] + random_text(generator, 200), random_text(generator, 200) + middle[200:]
    folder = write_dataset(tmp_path / "d", {"train": [[left, right, "other"], [middle]]})
    dedup(folder, threshold=0.76)
    assert kept(folder) == [left, "other"]


def test_validation_documents_are_compared_even_when_training_connects_them(tmp_path: Path) -> None:
    """Sketches by hand: each of two is found to be like the third in a band where the other is not."""
    folder = write_dataset(tmp_path / "d", {"train": [["the third", "another"]], "val": [["the first", "the second"]]})
    sketches = np.random.default_rng(1).integers(0, 2**16, (4, BINS)).astype(np.uint16)
    third = sketches[2]
    _, rows = choose_bands(0.8)
    sketches[0], sketches[1] = third, third
    sketches[0][rows], sketches[1][0] = 1, 1  # in the second band, in the first
    manifest = read_manifest(folder)
    for split, part in (("val", sketches[:2]), ("train", sketches[2:])):
        np.save(signature_path(folder, manifest.splits[split][0]), part)
    dedup(folder)
    assert kept(folder, "val") == ["the first"]
    assert kept(folder) == ["another"]


def test_the_executor_does_not_matter(tmp_path: Path, planted: list[str]) -> None:
    folders = [write_dataset(tmp_path / name, {"train": split_up(planted, 5)}) for name in "abc"]
    dedup(folders[0])
    with ThreadPoolExecutor(3) as threads:
        dedup(folders[1], executor=threads)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes:
        dedup(folders[2], executor=processes)
    assert contents(folders[0]) == contents(folders[1]) == contents(folders[2])


def test_another_threshold_needs_no_new_sketches(
    tmp_path: Path, planted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_dataset(tmp_path / "d", {"train": split_up(planted)})
    fresh = write_dataset(tmp_path / "fresh", {"train": split_up(planted)})
    loose = dedup(folder, threshold=0.5)
    dedup(fresh, threshold=0.9)
    monkeypatch.setattr("pipeline.data.deleting.dedup.write_signatures", None)
    tight = dedup(folder, threshold=0.9)
    assert loose.total("train", "documents") < tight.total("train", "documents")
    assert len({loose.data_digest, tight.data_digest}) == 2
    assert contents(folder) == contents(fresh)


def test_sketches_of_other_content_are_made_again(tmp_path: Path) -> None:
    generator = random.Random(2)
    text = random_text(generator, 400)
    folder = write_dataset(tmp_path / "d", {"train": [[text, random_text(generator, 400)]]})
    dedup(folder)
    old = next(folder.glob("*.minhash-*"))
    other = write_dataset(tmp_path / "e", {"train": [[text, variant(text, 0.97, generator)]]})
    (other / old.name).write_bytes(old.read_bytes())
    dedup(other)
    assert kept(other) == [text]
    assert not (other / old.name).exists()


def test_many_shards_do_not_need_many_open_files(tmp_path: Path) -> None:
    """A corpus of 100 GB has more shards than a process may open files."""
    folder = write_dataset(tmp_path / "d", {"train": [[f"text {number}", "all the same"] for number in range(40)]})
    text = " ".join(f"w{number}" for number in range(13))
    (tmp_path / "e.txt").write_text(text)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(int(path.name) for path in Path("/dev/fd").iterdir()) + 12, hard))
    try:
        manifest = dedup(folder)
        check_contamination(folder, [tmp_path / "e.txt"], delete=True, text_key="text", executor=None, console=QUIET)
        verify(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert manifest.total("train", "documents") == 41


# undone, again, killed


@pytest.mark.parametrize("method", ["exact", "near"])
def test_none_undoes(tmp_path: Path, planted: list[str], method: Method) -> None:
    folder = write_dataset(tmp_path / "d", {"train": split_up([*planted, *planted[:9]]), "val": [planted[:3]]})
    before = contents(folder)
    manifest = dedup(folder, method, 0.7)
    assert manifest.data_digest != read_manifest_of(before, tmp_path).data_digest
    assert len(kept(folder)) < len(planted)
    dedup(folder, "none")
    assert contents(folder) == before


def read_manifest_of(files: dict[str, bytes], tmp_path: Path) -> Manifest:
    folder = tmp_path / "before"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(files["manifest.json"])
    return read_manifest(folder)


class Killed(BaseException):
    """What no handler catches."""


@pytest.mark.parametrize("after", range(12))
def test_killed_anywhere_it_is_as_before_or_as_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """From one way of deleting to another; each write and each removal is a moment to be killed at."""
    text = random_text(random.Random(1), 300)
    near = variant(text, 0.9, random.Random(2))
    shards = [["a", "a", text], [near, "a", "b"], ["b", "c"]]
    folder = write_dataset(tmp_path / "d", {"train": shards})
    dedup(folder, "exact")
    before = [open_dataset(folder).data_digest, kept(folder)]
    reference = write_dataset(tmp_path / "reference", {"train": shards})
    dedup(reference, threshold=0.6)
    wanted = [open_dataset(reference).data_digest, kept(reference)]

    done = 0
    write, unlink = deletion.write_durably, Path.unlink

    def tick() -> None:
        nonlocal done
        if done == after:
            raise Killed
        done += 1

    def killed_write(path: Path, content: bytes) -> None:
        tick()
        write(path, content)

    def killed_unlink(path: Path, missing_ok: bool = False) -> None:
        tick()
        unlink(path, missing_ok)

    with monkeypatch.context() as patched:
        for module in ("deleting.deletion", "manifest", "deleting.minhash"):
            patched.setattr(f"pipeline.data.{module}.write_durably", killed_write)

        patched.setattr(Path, "unlink", killed_unlink)
        try:
            dedup(folder, threshold=0.6)
        except Killed:
            pass
        else:
            assert after >= 8, "there are more moments than that"
    assert [open_dataset(folder).data_digest, kept(folder)] in (before, wanted)
    verify(folder)
    dedup(folder, threshold=0.6)
    assert contents(folder) == contents(reference)


def test_reasons_are_independent(tmp_path: Path) -> None:
    """Whatever is deleted first: the same files, and each can be undone alone."""

    def contaminated(folder: Path, chosen: list[bool]) -> None:
        deletion.delete_documents(
            folder,
            read_manifest(folder),
            reason="contaminated",
            deleted={"train-00000": np.array(chosen)},
            record={"contamination": None},
        )

    folders = [write_dataset(tmp_path / name, {"train": [["a", "b", "a", "c"], ["d"]]}) for name in "ab"]
    before = contents(folders[0])
    dedup(folders[0], "exact")
    only_duplicates = contents(folders[0])
    contaminated(folders[0], [False, True, True, False])
    contaminated(folders[1], [False, True, True, False])
    only_contaminated = contents(folders[1])
    dedup(folders[1], "exact")
    assert contents(folders[0]) == contents(folders[1])
    assert kept(folders[0]) == ["a", "c", "d"]
    verify(folders[0])
    contaminated(folders[0], [False] * 4)
    assert contents(folders[0]) == only_duplicates
    dedup(folders[1], "none")
    assert contents(folders[1]) == only_contaminated
    assert kept(folders[1]) == ["a", "c", "d"]
    contaminated(folders[1], [False] * 4)
    assert contents(folders[1]) == before


def test_bitmaps_are_bits_in_order(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", {"train": [["a", "b", "a", "c", "d", "e", "f", "g", "h", "a", "i"]]})
    dedup(folder, "exact")
    bits = np.load(next(folder.glob("train-00000.keep-*.npy")))
    assert bits.tolist() == [0b11011111, 0b10100000]


def test_a_split_is_never_emptied(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", {"train": [["same"]], "val": [["same"]]})
    before = contents(folder)
    with pytest.raises(UserError, match=r"nothing of train would be left: all its documents \(1\) are duplicates"):
        dedup(folder, "exact")
    assert contents(folder) == before


@pytest.mark.parametrize("threshold", [0.49, 1.01, float("nan")])
def test_thresholds_out_of_range_are_refused(tmp_path: Path, threshold: float) -> None:
    folder = write_dataset(tmp_path / "d", {"train": [["a"]]})
    with pytest.raises(UserError, match=r"wanted a similarity from 0\.5 to 1"):
        dedup(folder, "near", threshold)


def test_what_happened_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_dataset(tmp_path / "d", {"train": [["a", "a", "b"]]})
    deduplicate(folder, method="exact", executor=None, console=Console(soft_wrap=True))
    assert capsys.readouterr().out == "duplicates: deleted 1 equal to another of 3 documents, 2 tokens in all\n"


# parts


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_bands_find_pairs_at_the_threshold(threshold: float) -> None:
    bands, rows = choose_bands(threshold)
    assert bands * rows <= BINS
    generator = np.random.default_rng(1)
    agree = generator.random((2000, bands, rows)) < threshold
    assert agree.all(axis=2).any(axis=1).mean() > 0.97


@given(st.lists(st.integers(0, 5), max_size=60))
def test_equal_keys_are_paired(keys: list[int]) -> None:
    found = [
        (int(i), int(j))
        for first, second in pairs_of_equals(np.array(keys, np.uint64))
        for i, j in zip(first, second, strict=True)
    ]
    assert len(found) == len(set(found))
    assert all(i < j and keys[i] == keys[j] for i, j in found)
    for key in set(keys):
        members = [number for number, other in enumerate(keys) if other == key]
        if len(members) <= 33:
            assert {(i, j) for i in members for j in members if i < j} <= set(found)
        assert {(members[0], j) for j in members[1:]} <= set(found)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=60), st.integers(1, 10))
def test_clusters_are_connected_components(pairs: list[tuple[int, int]], at_once: int) -> None:
    leader = list(range(31))
    for one, other in pairs:
        low, high = sorted((leader[one], leader[other]))
        leader = [low if name == high else name for name in leader]
    clusters = np.arange(31)
    for start in range(0, len(pairs), at_once):
        part = np.array(pairs[start : start + at_once])
        join(clusters, part[:, 0], part[:, 1])
    assert find(clusters, np.arange(31)).tolist() == leader


def test_a_worker_that_dies_is_one_message_and_changes_nothing(tmp_path: Path, planted: list[str]) -> None:
    folder = write_dataset(tmp_path / "data", {"train": [planted[:10], planted[10:]]})
    before = contents(folder)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as processes:
        with pytest.raises(BrokenProcessPool):
            processes.submit(os._exit, 1).result()
        with pytest.raises(UserError, match=r"a worker process was killed.*run the same command again"):
            dedup(folder, executor=processes)
    assert contents(folder) == before
