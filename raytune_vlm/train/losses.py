"""The loss of the training step: a sum, which is divided by the labels of the global batch."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from raytune_vlm.collate.arrays import IGNORED


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the next-token cross-entropy over labelled positions, in float32.

    Parameters
    ----------
    logits
        `[batch, length, vocabulary]`.
    labels
        int64 `[batch, length]`, not shifted, -100 where there is no loss.
    """
    targets = labels[:, 1:]
    chosen = targets != IGNORED
    return cross_entropy(logits[:, :-1][chosen].float(), targets[chosen], reduction="sum")
