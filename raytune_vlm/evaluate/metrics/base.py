"""What a metric is: one prediction against its references, as a value and a weight.

The score of many samples is always `sum(value * weight) / sum(weight)`, so that one stored pair a
sample is enough for means, micro averages, intervals and paired tests alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from raytune_vlm.errors import EvaluationError


@dataclass(frozen=True)
class SampleScore:
    """The score of one sample and how much it counts in the aggregate."""

    value: float
    weight: float = 1.0


@dataclass(frozen=True)
class Metric:
    """A metric variant: its name, its direction and how it compares two texts.

    `compare(prediction, reference)` is pure, takes any two strings and never raises.
    """

    name: str
    mode: Literal["max", "min"]
    compare: Callable[[str, str], SampleScore]

    def score(self, prediction: str, references: Sequence[str]) -> SampleScore:
        """The prediction against the reference that suits it best (the first of equals).

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
        text = _as_text(prediction)
        scores = [self.compare(text, _as_text(reference)) for reference in references]
        best = max if self.mode == "max" else min
        return best(scores, key=lambda score: score.value)


def _as_text(value: object) -> str:
    missing = value is None or (isinstance(value, float) and value != value)
    return "" if missing else str(value)
