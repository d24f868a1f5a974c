"""What a step minimises: the labels' cross-entropy, or that and the distance to a teacher.

Output layers see labelled positions only, a chunk at a time: see `train.output_layer`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from raytune_vlm.collate.arrays import IGNORED
from raytune_vlm.collate.features import Features
from raytune_vlm.config.distillation import DistillationConfig
from raytune_vlm.config.train import TrainConfig
from raytune_vlm.errors import ModelError
from raytune_vlm.models.loading import Base
from raytune_vlm.prepare.feed import MicroBatch
from raytune_vlm.train.auditor import Auditor
from raytune_vlm.train.batches import Batches
from raytune_vlm.train.output_layer import Logits, OutputLayer, TokenLosses, Unfollowed, losses
from raytune_vlm.train.step_metrics import Sums


@dataclass(frozen=True)
class Teacher:
    """A frozen model whose distributions are learned from, and what stands in for its pixels."""

    base: Base
    features: Features | None = None


class Objective(Protocol):
    """The sum over the labelled tokens of a micro-batch of what is minimised."""

    num_parts: int
    """Numbers that a call gives."""

    def __call__(
        self, batch: dict[str, Any], labels: torch.Tensor, micro_batch: MicroBatch
    ) -> torch.Tensor:
        """The sum, then what it is made of, float32 `[num_parts]`.

        Parameters
        ----------
        batch
            What the student takes.
        labels
            int64 `[batch, length]`, not shifted, -100 where there is no loss.
        micro_batch
            What both were made of.
        """

    def note(self, sums: Sums, parts: Sequence[float]) -> None:
        """Put down what calls gave in all, divided by the labels of the global batch."""

    def told(self, sums: Sums) -> dict[str, float]:
        """Fields of `StepMetrics` that are of this objective alone."""


class FromLabels:
    """Cross-entropy alone; see `Objective`."""

    num_parts = 1

    def __init__(self, model: torch.nn.Module, auditor: Auditor) -> None:
        self._losses, self._auditor = TokenLosses(model), auditor

    def __call__(
        self, batch: dict[str, Any], labels: torch.Tensor, micro_batch: MicroBatch
    ) -> torch.Tensor:
        """See `Objective`."""
        return self._losses(batch, labels, self._auditor.notes.append).sum()[None]

    def note(self, sums: Sums, parts: Sequence[float]) -> None:
        """See `Objective`."""
        (sums.loss,) = parts

    def told(self, sums: Sums) -> dict[str, float]:
        """See `Objective`."""
        return {}


class FromTeacher:
    """Cross-entropy and the divergence from a teacher, see `distilled` and `Objective`.

    Parameters
    ----------
    shown
        What the teacher takes, of what the student takes and what that was made of.
    """

    num_parts = 3

    def __init__(
        self,
        model: torch.nn.Module,
        teacher: torch.nn.Module,
        config: DistillationConfig,
        shown: Callable[[dict[str, Any], MicroBatch], dict[str, Any]],
    ) -> None:
        self._model, self._teacher, self._config, self._shown = model, teacher, config, shown

    def __call__(
        self, batch: dict[str, Any], labels: torch.Tensor, micro_batch: MicroBatch
    ) -> torch.Tensor:
        """See `Objective`."""
        given = self._shown(batch, micro_batch)
        return distilled(self._model, self._teacher, batch, given, labels, self._config)

    def note(self, sums: Sums, parts: Sequence[float]) -> None:
        """See `Objective`."""
        sums.loss, sums.cross_entropy, sums.kl_divergence = parts

    def told(self, sums: Sums) -> dict[str, float]:
        """See `Objective`."""
        return {"cross_entropy": sums.cross_entropy, "kl_divergence": sums.kl_divergence}


def objective(
    model: torch.nn.Module,
    config: TrainConfig,
    teacher: Teacher | None,
    batches: Batches,
    auditor: Auditor,
) -> Objective:
    """What a run minimises; `teacher` is there if `config` wants one."""
    if not config.distillation.is_on:
        return FromLabels(model, auditor)
    assert teacher is not None, "train.distillation has a teacher, but none was given"
    features = teacher.features

    def shown(batch: dict[str, Any], micro_batch: MicroBatch) -> dict[str, Any]:
        return batches.for_teacher(batch, micro_batch, features)

    return FromTeacher(model, teacher.base.model, config.distillation, shown)


def distilled(
    model: Any,
    teacher: Any,
    batch: dict[str, Any],
    given: dict[str, Any],
    labels: torch.Tensor,
    config: DistillationConfig,
) -> torch.Tensor:
    """(1 - w) * cross-entropy + w * T^2 * KL(teacher || student), then the two by themselves.

    Hinton et al. 2015, section 2: the gradients of the second term are of the order of 1 / T^2. The
    divergence by itself is that at T, without the factor.

    Parameters
    ----------
    batch, given
        What the student takes and what the teacher takes.
    labels
        int64 `[batch, length]`, not shifted, -100 where there is no loss.

    Returns
    -------
    Tensor
        float32 `[3]`, sums over labelled tokens, in nats. The first alone has a gradient.

    Raises
    ------
    ModelError
        If one of them does something else behind its output layer than capping logits.
    """
    targets = labels[:, 1:]
    chosen = targets != IGNORED
    weights = torch.tensor([1 - config.weight, config.weight * config.temperature**2])
    weights = weights.to(labels.device)

    def parts(ours: torch.Tensor, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            expected = their_logits(states).float()
        found = divergences(expected, ours.float(), targets, config.temperature)
        return torch.cat([(found * weights).sum(1, keepdim=True), found], dim=1)

    def compared(states: torch.Tensor, logits_of: Logits) -> torch.Tensor:
        size = config.chunk_tokens
        return losses(states, logits_of, parts, theirs, targets[chosen], chunk_tokens=size)

    try:
        with torch.no_grad():
            theirs, their_logits = OutputLayer(teacher)(given, chosen, lambda *found: found)
        return OutputLayer(model)(batch, chosen, compared).sum(0)
    except Unfollowed as error:
        raise ModelError(
            f"train.distillation.teacher: {model.config.model_type} {error}, which is not followed"
        ) from error


def divergences(
    teacher: torch.Tensor, student: torch.Tensor, targets: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Cross-entropy and KL(teacher || student) at a temperature, float32 `[tokens, 2]`.

    Parameters
    ----------
    teacher, student
        Logits, float32 `[tokens, vocabulary]`. Vocabularies are padded to round numbers: where one
        is longer, the divergence is that of the distributions over what both have.
    targets
        int64 `[tokens]`.
    """
    common = min(teacher.shape[1], student.shape[1])
    divergence = kl_div(
        log_softmax(student[:, :common] / temperature, dim=1),
        log_softmax(teacher[:, :common] / temperature, dim=1),
        reduction="none",
        log_target=True,
    )
    entropy = cross_entropy(student, targets, reduction="none")
    return torch.stack([entropy, divergence.sum(1)], dim=1)
