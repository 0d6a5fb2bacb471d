"""What a row of tokens teaches: from rows to the model's inputs and labels.

In: `Rows` of a plan. Out: a `Batch`. One function per objective; the training step knows none of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.config import DataConfig, ObjectiveConfig
from pipeline.data.loading.rows import IGNORED, Rows


@dataclass(frozen=True)
class Batch:
    """One forward pass. `inputs` are exactly the model's keyword arguments; labels (B, T) with -100 ignored.

    targets: how many labels count; known from the start, so that no device is waited for.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    targets: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`. To CUDA the host does not wait: the copies are made in the stream's turn."""
        inputs = {name: _moved(tensor, device) for name, tensor in self.inputs.items()}
        return Batch(inputs=inputs, labels=_moved(self.labels, device), targets=self.targets)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        # A copy from pageable memory would wait. Pinned blocks are used again only when copies from them are done.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def make_batch(rows: Rows, *, objective: ObjectiveConfig, data: DataConfig) -> Batch:
    """Rows (B, T) to what `objective` teaches.

    Rows without `documents` can give neither a mask nor labels at document boundaries.
    """
    kinds = {"causal": causal}
    return kinds[objective.kind](
        rows, document_mask=data.document_mask, cross_document_targets=data.cross_document_targets
    )


def causal(rows: Rows, *, document_mask: bool, cross_document_targets: bool) -> Batch:
    """Predict each token from those before it.

    With `document_mask` the inputs carry `documents`, within which attention stays. Without
    `cross_document_targets` the first token of a document is no target: nothing before it tells of it.
    """
    labels = rows.labels
    inputs = {"tokens": torch.from_numpy(rows.tokens)}
    if rows.positions is not None:
        inputs["positions"] = torch.from_numpy(rows.positions)
    if document_mask:
        assert rows.documents is not None, "attention is to stay within documents that are not known"
        inputs["documents"] = torch.from_numpy(rows.documents)
    if not cross_document_targets:
        # packed rows have positions, and no label that begins a document
        known = rows.crossing is not None or rows.positions is not None
        assert known, "targets at document boundaries are to be left out but not known"
        labels = labels if rows.crossing is None else np.where(rows.crossing, IGNORED, labels)
    targets = int(np.count_nonzero(labels != IGNORED))
    return Batch(inputs=inputs, labels=torch.from_numpy(labels), targets=targets)
