"""What a window of tokens teaches: from windows to the model's inputs and labels.

In: windows of T + 1 token ids and the documents they come from. Out: a `Batch`. One function per
objective; the training step knows none of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config import DataConfig, ObjectiveConfig

IGNORED = -100  # as a label: nothing to predict here; as a token of a window: beyond the end of the data


@dataclass(frozen=True)
class Batch:
    """One forward pass. `inputs` are exactly the model's keyword arguments; labels (B, T) with -100 ignored."""

    inputs: dict[str, Tensor]
    labels: Tensor

    @property
    def targets(self) -> int:
        """Number of labels that count; on the host, so that no device is waited for."""
        return int((self.labels != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        return Batch(inputs=inputs, labels=self.labels.to(device, non_blocking=True))


def make_batch(
    windows: NDArray[np.int64], documents: NDArray[np.int64] | None, *, objective: ObjectiveConfig, data: DataConfig
) -> Batch:
    """Windows and the document number of each of their tokens, both (B, T + 1), to what `objective` teaches.

    Without `documents` neither a mask nor labels at document boundaries can be asked for.
    """
    kinds = {"causal": causal}
    return kinds[objective.kind](
        windows,
        documents,
        document_mask=data.document_mask,
        cross_document_targets=data.cross_document_targets,
    )


def causal(
    windows: NDArray[np.int64],
    documents: NDArray[np.int64] | None,
    *,
    document_mask: bool,
    cross_document_targets: bool,
) -> Batch:
    """Predict each token from those before it: windows and their document numbers (B, T + 1) -> (B, T).

    With `document_mask` the inputs carry `documents`, within which attention stays. Without
    `cross_document_targets` the first token of a document is no target: nothing before it tells of it.
    """
    tokens = np.maximum(windows[:, :-1], 0)  # padding becomes token 0, whose label is ignored
    labels = windows[:, 1:].copy()
    inputs = {"tokens": torch.from_numpy(tokens)}
    if documents is None:
        assert cross_document_targets, "targets at document boundaries are to be left out but not known"
        assert not document_mask, "attention is to stay within documents that are not known"
        return Batch(inputs=inputs, labels=torch.from_numpy(labels))
    if not cross_document_targets:
        labels[documents[:, 1:] != documents[:, :-1]] = IGNORED
    if document_mask:
        inputs["documents"] = torch.from_numpy(documents[:, :-1].copy())
    return Batch(inputs=inputs, labels=torch.from_numpy(labels))
