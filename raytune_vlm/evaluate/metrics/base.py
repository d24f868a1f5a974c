"""What a metric is: predictions against their references, as a value and a weight a sample.

The score of many samples is `sum(value * weight) / sum(weight)`, so that one stored pair a sample
is enough for means, micro averages, intervals and paired tests alike. Where it is no such ratio
(BLEU), samples keep `sums` instead, and `Metric.combine` makes the score from their total.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from raytune_vlm.errors import EvaluationError
from raytune_vlm.references import Reference, join_references

Floats = NDArray[np.float64]

Combine = Callable[[Floats], Floats]
"""Totals [..., K] -> scores [...]: finite wherever at least one sample is in the total."""


@dataclass(frozen=True)
class SampleScore:
    """The score of one sample and how much it counts in the aggregate."""

    value: float
    weight: float = 1.0
    sums: tuple[float, ...] = ()
    """What adds up over samples, for a metric with `combine`."""


@dataclass(frozen=True)
class Metric:
    """A metric variant: its name, its direction, and one of three functions.

    All are pure, take any strings and never raise.
    """

    name: str
    mode: Literal["max", "min"]
    compare: Callable[[str, str], SampleScore] | None = None
    """(prediction, answer): the best answer of the reference counts, the first of equals."""
    judge: Callable[[str, Reference], SampleScore] | None = None
    """(prediction, reference): the answers count together, or choices and type are needed."""
    judge_corpus: Callable[[Sequence[str], Sequence[Reference]], list[SampleScore]] | None = None
    """All predictions and references: the score of a sample depends on the others."""
    combine: Combine | None = None
    """From the total of `SampleScore.sums` to the score; None where the score is a ratio."""
    needs_extraction: bool = False
    """Whether predictions are what `evaluation.judge` extracted of the model's texts."""
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Group -> the categories that are scored together, besides each by itself."""

    def score(self, prediction: str, references: Sequence[str]) -> SampleScore:
        """The prediction against all answers of all references.

        A missing text (`None`, or the `nan` that data frames put in its place) counts as `""`.

        Raises
        ------
        EvaluationError
            There is no reference.
        """
        if isinstance(references, str) or not len(references):
            raise EvaluationError(
                f"{self.name} needs a list of at least one reference, got {references!r}"
            )
        return self.score_all([prediction], [join_references([_as_text(x) for x in references])])[0]

    def score_all(
        self, predictions: Sequence[str], references: Sequence[Reference]
    ) -> list[SampleScore]:
        """Each prediction against its reference."""
        texts = [_as_text(prediction) for prediction in predictions]
        if self.judge_corpus:
            return self.judge_corpus(texts, references)
        judge = self.judge or self._best_answer
        return [judge(*pair) for pair in zip(texts, references, strict=True)]

    def _best_answer(self, prediction: str, reference: Reference) -> SampleScore:
        assert self.compare is not None, self.name
        scores = [self.compare(prediction, answer) for answer in reference.answers]
        best = max if self.mode == "max" else min
        return best(scores, key=lambda score: score.value)


def _as_text(value: object) -> str:
    missing = value is None or (isinstance(value, float) and value != value)
    return "" if missing else str(value)
