"""What a step minimises: the labels' cross-entropy, or that and the distance to a teacher.

A teacher's and a student's logits over a vocabulary of 150,000 tokens are the largest tensors of a
step, so with a teacher neither is ever whole: output layers see labelled positions only, a chunk at
a time, and compute a chunk again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils.checkpoint import checkpoint

from raytune_vlm.collate.arrays import IGNORED
from raytune_vlm.collate.features import Features
from raytune_vlm.config.distillation import DistillationConfig
from raytune_vlm.errors import ModelError
from raytune_vlm.models.loading import Base
from raytune_vlm.prepare.feed import MicroBatch
from raytune_vlm.train.batches import Batches
from raytune_vlm.train.losses import summed_cross_entropy
from raytune_vlm.train.step_metrics import Sums

PROBE = 100.0
"""Logits between this and its negative show what a model does behind its output layer."""


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

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def __call__(
        self, batch: dict[str, Any], labels: torch.Tensor, micro_batch: MicroBatch
    ) -> torch.Tensor:
        """See `Objective`."""
        return summed_cross_entropy(self._model(**batch).logits, labels)[None]

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
    model: torch.nn.Module, config: DistillationConfig, teacher: Teacher | None, batches: Batches
) -> Objective:
    """What a run minimises; `teacher` is there if `config` wants one."""
    if not config.is_on:
        return FromLabels(model)
    assert teacher is not None, "train.distillation has a teacher, but none was given"
    features = teacher.features

    def shown(batch: dict[str, Any], micro_batch: MicroBatch) -> dict[str, Any]:
        return batches.for_teacher(batch, micro_batch, features)

    return FromTeacher(model, teacher.base.model, config, shown)


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
        float32 `[3]`, sums over labelled tokens, in nats.
    """
    targets = labels[:, 1:]
    chosen = targets != IGNORED
    with torch.no_grad():
        theirs, their_logits = answer_states(teacher, given, chosen)
    ours, our_logits = answer_states(model, batch, chosen)

    def parts(theirs: torch.Tensor, ours: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            expected = their_logits(theirs).float()
        return divergences(expected, our_logits(ours).float(), targets, config.temperature)

    total = torch.zeros(2, device=labels.device)
    tables = (theirs, ours, targets[chosen])
    for chunk in zip(*(table.split(config.chunk_tokens) for table in tables), strict=True):
        # No dropout in an output layer: no adapter is ever put there.
        total = total + checkpoint(parts, *chunk, use_reentrant=False, preserve_rng_state=False)
    weights = total.new_tensor([1 - config.weight, config.weight * config.temperature**2])
    return torch.cat([(weights * total).sum()[None], total])


def divergences(
    teacher: torch.Tensor, student: torch.Tensor, targets: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Sums of the cross-entropy and of KL(teacher || student) at a temperature, float32 `[2]`.

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
        reduction="sum",
        log_target=True,
    )
    return torch.stack([cross_entropy(student, targets, reduction="sum"), divergence])


def answer_states(
    model: Any, batch: dict[str, Any], chosen: torch.Tensor
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """What goes into a model's output layer where it predicts the next token, and that layer.

    The layer sees one position in the pass itself, and its answer there is replaced by known
    numbers, so that what the model makes of them shows whether it does anything behind the layer.

    Parameters
    ----------
    chosen
        bool `[batch, length - 1]`: whether the token that comes next is asked for.

    Returns
    -------
    Tensor, callable
        `[tokens, width]`, and what makes logits `[tokens, vocabulary]` of some of them.

    Raises
    ------
    ModelError
        If the model does something else behind its output layer than capping logits.
    """
    layer = model.get_output_embeddings()
    seen: list[torch.Tensor] = []
    put_in: list[torch.Tensor] = []

    def before(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(args[0])
        return (args[0][:1, :1], *args[1:])

    def after(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        probe = torch.linspace(-PROBE, PROBE, output.shape[-1], dtype=output.dtype)
        put_in.append(probe.to(output.device).expand(1, 1, -1))
        return put_in[-1]

    hooks = (layer.register_forward_pre_hook(before), layer.register_forward_hook(after))
    try:
        came_out = model(**batch).logits
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) != 1:
        raise ModelError(_unusable(model, f"uses its output layer {len(seen)} times"))
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    def capped(logits: torch.Tensor) -> torch.Tensor:
        return torch.tanh(logits / cap) * cap

    states = seen[0][:, :-1][chosen]
    if torch.equal(came_out.float(), put_in[0].float()):
        return states, layer
    if cap is not None and torch.equal(came_out.float(), capped(put_in[0]).float()):
        return states, lambda some: capped(layer(some))
    raise ModelError(_unusable(model, "changes logits behind its output layer"))


def _unusable(model: Any, why: str) -> str:
    return f"train.distillation.teacher: {model.config.model_type} {why}, which is not followed"
