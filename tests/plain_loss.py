"""The loss as it is written down: of the logits of all positions."""

from __future__ import annotations

import torch


def plain_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of -log p over the labelled next tokens; labels are not shifted, -100 has no loss."""
    targets = labels[:, 1:]
    chosen = targets != -100
    logs = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    return -logs[chosen].gather(1, targets[chosen][:, None]).sum()
