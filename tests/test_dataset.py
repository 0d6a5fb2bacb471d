"""Streams without deleted documents, compared with lists of the documents that are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.dataset import TokenSplit, open_dataset
from pipeline.data.deleting.deletion import delete_documents
from pipeline.data.manifest import read_manifest
from pipeline.data.shards import DocumentInfo
from tests.prepared import write_dataset


class ListPart:
    """Documents of given lengths in memory; token t is the number t + `base`."""

    def __init__(self, number: int, lengths: list[int], keep: list[bool] | None, base: int) -> None:
        self.number = number
        self.lengths = np.array(lengths, np.int32)
        self.n_documents, self.n_tokens = len(lengths), sum(lengths)
        self.keep: npt.NDArray[np.bool_] | None = None if keep is None else np.array(keep, np.bool_)
        self.tokens: npt.NDArray[Any] = np.arange(base, base + self.n_tokens, dtype=np.int32)

    def starts(self, first: int, stop: int) -> npt.NDArray[np.int64]:
        return (np.cumsum(self.lengths) - self.lengths)[first:stop].astype(np.int64)

    def document_at(self, token: int) -> int:
        return int(np.searchsorted(np.cumsum(self.lengths), token, side="right"))

    def describe(self, document: int) -> DocumentInfo:
        return DocumentInfo(source=str(self.number), row=document, tokens=int(self.lengths[document]), text_bytes=0)


@st.composite
def parts(draw: st.DrawFn) -> list[ListPart]:
    """Up to 4 parts; some lack a bitmap, some delete everything, at their edges or between."""
    found, base = [], 0
    for number in range(draw(st.integers(0, 4))):
        lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=8))
        bits = st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))
        found.append(ListPart(number, lengths, draw(st.none() | bits), base))
        base += sum(lengths)
    return found


def kept_by_hand(found: list[ListPart]) -> list[tuple[int, int, list[int]]]:
    """(part, document, tokens) of every document that stays, one by one."""
    documents = []
    for part in found:
        tokens = part.tokens.tolist()
        for number, length in enumerate(part.lengths.tolist()):
            mine, tokens = tokens[:length], tokens[length:]
            if part.keep is None or part.keep[number]:
                documents.append((part.number, number, mine))
    return documents


@given(parts())
def test_a_stream_is_its_kept_documents_end_to_end(found: list[ListPart]) -> None:
    split = TokenSplit(found, text_bytes=0, dtype=np.dtype("<i4"), vocab_size=2**31)
    documents = kept_by_hand(found)
    tokens = [token for _, _, mine in documents for token in mine]
    owners = [number for number, (_, _, mine) in enumerate(documents) for _ in mine]
    assert (split.n_documents, split.n_tokens) == (len(documents), len(tokens))
    assert split.lengths.tolist() == [len(mine) for _, _, mine in documents]
    for start in range(len(tokens) + 1):
        for stop in range(start, len(tokens) + 1, 1 if len(tokens) < 20 else 7):
            assert split.tokens(start, stop).tolist() == tokens[start:stop]
            assert split.document_of(start, stop).tolist() == owners[start:stop]
    described = [split.describe(number) for number in range(len(documents))]
    assert [(info.source, info.row) for info in described] == [(str(part), row) for part, row, _ in documents]


@given(parts(), st.data())
def test_ranges_are_what_tokens_says(found: list[ListPart], data: st.DataObject) -> None:
    split = TokenSplit(found, text_bytes=0, dtype=np.dtype("<i4"), vocab_size=2**31)
    if not split.n_tokens:
        return
    edges = data.draw(st.lists(st.tuples(*[st.integers(0, split.n_tokens)] * 2), max_size=10))
    starts, stops = (np.array([pick(edge) for edge in edges], np.int64) for pick in (min, max))
    wanted = [split.tokens(min(edge), max(edge)).tolist() for edge in edges]
    assert [part.tolist() for part in split.ranges(starts, stops)] == wanted


def test_bitmaps_of_a_dataset_are_heeded(tmp_path: Path) -> None:
    """Through files: more documents than a byte has bits, a shard that loses all of its own."""
    texts = [[f"text {number}" for number in range(20)], ["gone", "too"], ["stays"]]
    folder = write_dataset(tmp_path / "d", {"train": texts, "val": [["held out"]]})
    chosen = np.arange(20) % 3 == 1
    deleted = {"train-00000": chosen, "train-00001": np.array([True, True])}
    before = open_dataset(folder).data_digest
    delete_documents(folder, read_manifest(folder), reason="duplicates", deleted=deleted, record={})
    dataset = open_dataset(folder)
    split = dataset.split("train")
    wanted = [text for number, text in enumerate(texts[0]) if number % 3 != 1] + ["stays"]
    assert split.tokens(0, split.n_tokens).tolist() == [token for text in wanted for token in [*text.encode(), 256]]
    assert (split.n_documents, split.text_bytes) == (len(wanted), sum(map(len, wanted)))
    rows = [number for number in range(20) if number % 3 != 1]
    assert [split.describe(number).row for number in range(split.n_documents)] == [*rows, 22]
    assert dataset.split("val").n_documents == 1
    assert dataset.data_digest != before


def test_a_deleted_document_is_not_described(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", {"train": [["a", "b"]]})
    deleted = {"train-00000": np.array([True, False])}
    delete_documents(folder, read_manifest(folder), reason="duplicates", deleted=deleted, record={})
    split = open_dataset(folder).split("train")
    assert split.describe(0).row == 1
    with pytest.raises(IndexError, match="document 1 of 1"):
        split.describe(1)
