"""The sieve passes every text that holds an n-gram, whatever its letters, and few others."""

from __future__ import annotations

import random
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.deleting.ngrams import NgramIndex, normalise

LETTERS = "aAzZßẞςσΣİiıI\u0307éÉ日ǅǆﬁ٣0_-.,“”€\u00ad\u200b\t \u00a0\u2028\x1c\n"
TEXTS = st.lists(st.one_of(st.text(st.sampled_from(LETTERS), max_size=60), st.text(max_size=30)), max_size=6)


def words_of(text: str) -> list[str]:
    return [word for word in map(normalise, text.split()) if word]


def holding(texts: list[str], wanted: list[str], length: int) -> set[int]:
    """Texts that share a run of `length` words with one of those wanted, by sets of tuples."""

    def runs(text: str) -> set[tuple[str, ...]]:
        words = words_of(text)
        return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}

    sought = set().union(*map(runs, wanted))
    return {number for number, text in enumerate(texts) if runs(text) & sought}


@given(TEXTS, TEXTS, st.randoms())
def test_none_is_missed(texts: list[str], wanted: list[str], generator: random.Random) -> None:
    """Texts of any letters, some with words of those that are wanted in other cases and with other marks."""
    for text in wanted:
        spelled = [generator.choice((str.upper, str.lower, str.title, str))(word) for word in words_of(text)]
        texts.append("x" + "".join(f" -“ {word}. " for word in spelled) + "y")
    index, _ = NgramIndex.build(enumerate(wanted), ngram=2)
    suspects = index.sieve.suspects(texts) if texts else []
    assert set(suspects) >= holding(texts, wanted, 2)
    assert suspects == sorted(set(suspects))


@pytest.mark.parametrize("words", ["ΟΔΟΣ ΜΟΥ", "İZMİR İYİ", "ǅabc Ǆ", "ΣΣ Σ"])
def test_lower_case_that_is_not_letter_by_letter(words: str) -> None:
    index, _ = NgramIndex.build([(0, words.lower())], ngram=2)
    for text in (words, words.lower(), f"“{words}”"):
        assert holding([text], [words.lower()], 2) == {0}
        assert index.sieve.suspects(["x", text]) == [1]


def test_every_character_has_one_value_at_most() -> None:
    """That a lower case is one character but for one is a fact of Unicode, on which the sieve relies."""
    longer = {chr(code) for code in range(sys.maxunicode + 1) if len(chr(code).lower()) != 1}
    assert longer == {"İ"}
    everything = " ".join(chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000)
    index, _ = NgramIndex.build([(0, everything)], ngram=13)
    assert index.sieve.suspects([everything, everything.upper(), everything.swapcase()])[0] == 0


def test_few_others_pass() -> None:
    generator = random.Random(0)
    vocabulary = [f"word{number}" for number in range(3000)]
    wanted = [" ".join(generator.choices(vocabulary, k=200)) for _ in range(200)]
    texts = [" ".join(generator.choices(vocabulary, k=300)) for _ in range(300)]
    texts[17] += " " + wanted[3][50:300].partition(" ")[2]
    texts[18] = wanted[4] + texts[18]
    texts[20] = " ".join(wanted[5].split()[:8])
    index, _ = NgramIndex.build(enumerate(wanted), ngram=8)
    assert index.sieve.suspects(texts) == [17, 18, 20]


def test_texts_that_are_too_many_all_pass() -> None:
    index, _ = NgramIndex.build([(0, "a b c d e f g h")], ngram=8)
    assert index.sieve.suspects(["a b c", "d e f g h i", ""]) == [0]  # over an end: some too many
    assert index.sieve.suspects(["a b c", "e d f g h i", ""]) == []
    assert index.sieve.suspects(["x" * 2**23, "y"]) == [0, 1]
