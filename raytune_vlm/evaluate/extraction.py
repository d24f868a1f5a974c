"""Scores of answers that a judge extracted (`evaluate/judge.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raytune_vlm.errors import EvaluationError
from raytune_vlm.evaluate.metrics import Metric, SampleScore
from raytune_vlm.references import Reference


def extracted_answers(
    name: str, extracted: Mapping[str, Sequence[str | None]] | None
) -> list[str | None]:
    """What the judge extracted for a metric, as UTF-8 can hold it.

    Raises
    ------
    EvaluationError
        It extracted nothing for this metric.
    """
    if extracted is None or name not in extracted:
        raise EvaluationError(
            f"{name} needs answers that evaluation.judge extracted: evaluate the checkpoint again"
        )
    answers = list(extracted[name])
    return [None if x is None else x.encode("utf-8", "replace").decode() for x in answers]


def score_extracted(
    metric: Metric, answers: Sequence[str | None], references: Sequence[Reference]
) -> list[SampleScore]:
    """The extracted answers' scores; a sample without one has none."""
    scored = metric.score_all([answer or "" for answer in answers], references)
    failed = SampleScore(float("nan"))
    return [
        failed if answer is None else score for answer, score in zip(answers, scored, strict=True)
    ]
