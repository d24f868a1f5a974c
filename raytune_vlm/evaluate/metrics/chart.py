"""Relaxed accuracy on charts: `relaxed_accuracy@pix2struct`."""

import math

from raytune_vlm.evaluate.metrics.base import SampleScore

TOLERANCE = 0.05


def relaxed_accuracy(prediction: str, answer: str) -> SampleScore:
    """`relaxed_accuracy@pix2struct`: 1 if two numbers are within 5 %, or two texts are equal.

    Methani et al. 2020, "PlotQA", and Masry et al. 2022, "ChartQA", section 5.1;
    google-research/pix2struct, `pix2struct/metrics.py`, `relaxed_correctness`. A number is what
    Python's `float` reads (blanks around it, `1e3`, `1_000`, digits of any script, `inf`, `nan`;
    not `1,000`, `$5` or `5 kg`); one that ends in `%` is divided by 100; a blank after `%` makes
    it a text. If both are numbers and the answer is not 0, the difference may be 5 % of the answer,
    so years are nearly always right. Otherwise the texts must be equal in lower case, blanks
    included: `0.0` is not `0`.

    The same text twice scores 1 also where it reads as `nan` or `inf` (0 there).
    """
    if prediction == answer:
        return SampleScore(1.0)
    found, gold = _number(prediction), _number(answer)
    if found is not None and gold:
        change = abs(found - gold) / abs(gold)
        return SampleScore(float(change <= TOLERANCE and not math.isnan(change)))
    return SampleScore(float(prediction.lower() == answer.lower()))


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
