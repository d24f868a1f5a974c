"""The table of metrics. A variant is named `<metric>@<rules>`: other rules are another metric.

To add one: a pure function `(prediction, reference) -> SampleScore` in a file of its family, a line
here, and its direction in `raytune_vlm.config.evaluation.METRIC_MODES`; `tests/test_metrics.py`
then puts it through the conformance tests.
"""

from raytune_vlm.evaluate.metrics.base import Metric, SampleScore
from raytune_vlm.evaluate.metrics.cord import field_f1, tree_edit_accuracy
from raytune_vlm.evaluate.metrics.text import character_error_rate, exact_match

METRICS: dict[str, Metric] = {
    "nted@donut": Metric("nted@donut", "max", tree_edit_accuracy),
    "field_f1@donut": Metric("field_f1@donut", "max", field_f1),
    "exact_match@strip": Metric("exact_match@strip", "max", exact_match),
    "cer@micro": Metric("cer@micro", "min", character_error_rate),
}

__all__ = ["METRICS", "Metric", "SampleScore"]
