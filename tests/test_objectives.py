"""What rows teach, on rows written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.config import DataConfig, ObjectiveConfig
from pipeline.data.loading.objectives import causal, make_batch
from pipeline.data.loading.rows import Rows


def concatenated(*, documents: bool) -> Rows:
    """Two documents, 5 6 9 and 7 8, and one position of padding; 9 ends a document."""
    return Rows(
        tokens=np.array([[5, 6, 9, 7, 0]]),
        labels=np.array([[6, 9, 7, 8, -100]]),
        documents=np.array([[3, 3, 3, 4, -1]]) if documents else None,
        positions=None,
        crossing=np.array([[False, False, True, False, True]]) if documents else None,
    )


def packed(*, documents: bool) -> Rows:
    """The same documents, packed."""
    return Rows(
        tokens=np.array([[5, 6, 7, 0, 0]]),
        labels=np.array([[6, 9, 8, -100, -100]]),
        documents=np.array([[3, 3, 4, -1, -1]]) if documents else None,
        positions=np.array([[0, 1, 0, 0, 1]]),
    )


def test_each_token_is_predicted_from_those_before_it() -> None:
    batch = causal(concatenated(documents=False), document_mask=False, cross_document_targets=True)
    assert set(batch.inputs) == {"tokens"}
    assert batch.inputs["tokens"].tolist() == [[5, 6, 9, 7, 0]]
    assert batch.labels.tolist() == [[6, 9, 7, 8, -100]]
    assert batch.targets == 4


def test_targets_at_document_boundaries_are_left_out_when_asked() -> None:
    rows = concatenated(documents=True)
    batch = causal(rows, document_mask=False, cross_document_targets=False)
    assert set(batch.inputs) == {"tokens"}
    assert batch.labels.tolist() == [[6, 9, -100, 8, -100]]
    assert batch.targets == 3
    assert rows.labels.tolist() == [[6, 9, 7, 8, -100]]  # not written into: other batches may share them


def test_attention_stays_within_documents_when_asked() -> None:
    batch = causal(concatenated(documents=True), document_mask=True, cross_document_targets=True)
    assert set(batch.inputs) == {"tokens", "documents"}
    assert batch.inputs["documents"].tolist() == [[3, 3, 3, 4, -1]]
    assert batch.targets == 4


@pytest.mark.parametrize("mask", [False, True])
def test_packed_spans_have_positions_of_their_own(mask: bool) -> None:
    batch = causal(packed(documents=mask), document_mask=mask, cross_document_targets=True)
    assert set(batch.inputs) == {"tokens", "positions"} | ({"documents"} if mask else set())
    assert batch.inputs["positions"].tolist() == [[0, 1, 0, 0, 1]]
    assert batch.labels.tolist() == [[6, 9, 8, -100, -100]]
    assert batch.targets == 3


def test_what_is_not_known_cannot_be_asked_for() -> None:
    for rows in (concatenated(documents=False), packed(documents=False)):
        with pytest.raises(AssertionError, match="attention"):
            causal(rows, document_mask=True, cross_document_targets=True)
    with pytest.raises(AssertionError, match="boundaries"):
        causal(concatenated(documents=False), document_mask=False, cross_document_targets=False)


def test_settings_reach_the_objective() -> None:
    data = DataConfig(path="x", document_mask=True, cross_document_targets=False)
    batch = make_batch(concatenated(documents=True), objective=ObjectiveConfig(), data=data)
    assert batch.targets == 3
    assert "documents" in batch.inputs


def test_types_are_the_models_and_nothing_is_copied_on_a_cpu() -> None:
    rows = packed(documents=True)
    batch = causal(rows, document_mask=True, cross_document_targets=True)
    moved = batch.to(torch.device("cpu"))
    for name, tensor in moved.inputs.items():
        assert tensor.dtype == torch.int64
        assert tensor.data_ptr() == getattr(rows, name).ctypes.data
    assert moved.labels.dtype == torch.int64
    assert moved.targets == batch.targets
