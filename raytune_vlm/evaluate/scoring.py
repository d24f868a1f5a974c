"""From generated texts to `predictions.parquet` and `scores.json`, and back without a model.

Every sample keeps its own score and weight, so that any later stage (intervals, paired tests, the
choice of a winner) works from the files alone.
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raytune_vlm.errors import EvaluationError, did_you_mean
from raytune_vlm.evaluate.categories import category_scores, statistics_of
from raytune_vlm.evaluate.extraction import extracted_answers, score_extracted
from raytune_vlm.evaluate.metrics import METRICS, Metric, SampleScore
from raytune_vlm.evaluate.metrics.letters import plain_letter
from raytune_vlm.evaluate.statistics import estimate
from raytune_vlm.json_tokens import is_parsable
from raytune_vlm.records import (
    PREDICTION_COLUMNS,
    CleanScores,
    MetricEstimate,
    Scores,
    write_json,
)
from raytune_vlm.references import Reference, read_reference

Answer = Literal["text", "json_tags", "choice"]
Floats = NDArray[np.float64]

PREDICTIONS_FILE = "predictions.parquet"
SCORES_FILE = "scores.json"

_TYPES = dict.fromkeys(PREDICTION_COLUMNS, pa.string()) | {
    "parsed": pa.bool_(),
    "num_tokens": pa.int32(),
    "truncated": pa.bool_(),
}
_METADATA_KEY = b"raytune_vlm"
WEIGHT = "/weight"
SUMS = "/sums"
_EXTRACTED = "/extracted"


@dataclass(frozen=True)
class Prediction:
    """What a model generated for one sample."""

    sample_id: str
    group_id: str
    prompt: str
    reference: str
    text: str
    num_tokens: int
    truncated: bool
    """Whether generation stopped at `max_new_tokens` and not at an end token."""


def score(
    predictions: Sequence[Prediction],
    *,
    trial_id: str,
    step: int,
    split: str,
    metrics: Sequence[str],
    answer: Answer,
    confidence: float,
    num_bootstrap: int,
    seed: int,
    seconds: float,
    overlapping: Collection[str] = (),
    extracted: Mapping[str, Sequence[str | None]] | None = None,
    benchmark: dict[str, Any] | None = None,
) -> tuple[Scores, pa.Table]:
    """Score predictions with every metric.

    Parameters
    ----------
    overlapping
        Samples that are much like one of `train`: where some are here, `Scores.clean` tells the
        scores without them.
    extracted
        Metric -> what was extracted of each prediction, for metrics with a judge; None where
        nothing could be: the sample then has no score and counts as a failure.
    benchmark
        Facts about it, kept beside the scores. A metric that has no score for any of the samples is
        then left out: a few samples may all be of another kind.

    Returns
    -------
    The scores, and a table of one row a prediction: `records.PREDICTION_COLUMNS`, then for every
    metric its value and `<metric>/weight`, `<metric>/sums` where it has any, and
    `<metric>/extracted` of a metric with a judge. The table's
    metadata says which trial, step and split it is of, so that `rescore` needs nothing else.
    Characters that UTF-8 cannot hold (lone surrogates) are scored as they are and stored as `?`.

    Raises
    ------
    EvaluationError
        There are no predictions, a sample stands twice, or a metric is unknown.
    """
    refuse_repeats([prediction.sample_id for prediction in predictions], f"{trial_id} on {split}")
    if not predictions:
        raise EvaluationError(f"{trial_id} at step {step} has no predictions on {split!r}")
    chosen = {name: _metric(name) for name in metrics}
    samples = _Samples.of(predictions, overlapping)
    pairs = zip(predictions, samples.references, strict=True)
    parsed = [_is_answer(entry.text, answer, reference) for entry, reference in pairs]
    found = _Found(columns=_text_columns(predictions, parsed))
    options = {"confidence": confidence, "num_bootstrap": num_bootstrap, "seed": seed}
    for name, metric in chosen.items():
        has_score = found.add(name, metric, samples, extracted, options)
        if not has_score and benchmark is None:
            raise EvaluationError(f"{name} has no score for any of {len(predictions)} samples")
    number = len(predictions)
    scores = Scores(
        trial_id=trial_id,
        step=step,
        split=split,
        num_samples=number,
        num_groups=len(set(samples.groups)),
        metrics=found.estimates,
        by_category=found.by_category,
        parse_failure_rate=1 - sum(parsed) / number,
        empty_rate=sum(not row.text.strip() for row in predictions) / number,
        truncation_rate=sum(row.truncated for row in predictions) / number,
        seconds=seconds,
        clean=samples.clean_scores(found.clean),
        extraction_failures=found.failures,
        benchmark=benchmark or {},
    )
    origin: dict[str, Any] = {"trial_id": trial_id, "step": step, "split": split, "answer": answer}
    if benchmark is not None:
        origin["benchmark"] = benchmark
    here = [
        row.sample_id for row, clean in zip(predictions, samples.clean, strict=True) if not clean
    ]
    origin |= {"seconds": seconds, "overlapping": here}
    metadata = {_METADATA_KEY: json.dumps(origin).encode()}
    return scores, pa.table(found.columns).replace_schema_metadata(metadata)


@dataclass(frozen=True)
class _Samples:
    """What every metric is computed on, in the order of the predictions."""

    texts: list[str]
    references: list[Reference]
    groups: list[str]
    clean: NDArray[np.bool_]
    """Which samples overlap no training sample."""

    @classmethod
    def of(cls, predictions: Sequence[Prediction], overlapping: Collection[str]) -> "_Samples":
        dirty = set(overlapping)
        return cls(
            texts=[row.text for row in predictions],
            references=[read_reference(row.reference) for row in predictions],
            groups=[row.group_id for row in predictions],
            clean=np.array([row.sample_id not in dirty for row in predictions]),
        )

    @property
    def clean_groups(self) -> list[str]:
        """The groups of the clean samples."""
        return [name for name, is_clean in zip(self.groups, self.clean, strict=True) if is_clean]

    def clean_scores(self, estimates: dict[str, MetricEstimate]) -> CleanScores | None:
        """None where all samples are clean."""
        groups = self.clean_groups
        if len(groups) == len(self.groups):
            return None
        return CleanScores(len(groups), len(set(groups)), estimates)


@dataclass
class _Found:
    """What the metrics give, one after the other."""

    columns: dict[str, pa.Array]
    estimates: dict[str, MetricEstimate] = field(default_factory=dict)
    clean: dict[str, MetricEstimate] = field(default_factory=dict)
    by_category: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)

    def add(
        self,
        name: str,
        metric: Metric,
        samples: _Samples,
        extracted: Mapping[str, Sequence[str | None]] | None,
        options: dict[str, Any],
    ) -> bool:
        """Compute one metric; whether any sample has a score."""
        if metric.needs_extraction:
            answers = extracted_answers(name, extracted)
            self.failures[name] = answers.count(None)
            results = score_extracted(metric, answers, samples.references)
            self.columns[name + _EXTRACTED] = pa.array(answers, pa.string())
        else:
            results = metric.score_all(samples.texts, samples.references)
        self.columns |= _metric_columns(name, results)
        values, weights = statistics_of(metric, results)
        if np.isnan(values).all():
            return False
        options = {**options, "combine": metric.combine}
        self.estimates[name] = estimate(values, weights, samples.groups, **options)
        clean = samples.clean
        if not clean.all() and not np.isnan(values[clean]).all():
            kept = samples.clean_groups
            self.clean[name] = estimate(values[clean], weights[clean], kept, **options)
        categories = [reference.category for reference in samples.references]
        if any(categories):
            self.by_category[name] = category_scores(metric, values, weights, categories)
        return True


def write_evaluation(folder: Path, scores: Scores, table: pa.Table) -> None:
    """Write `predictions.parquet`, then `scores.json`: where the scores are, all is there.

    Each file appears whole or not at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{PREDICTIONS_FILE}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            pq.write_table(table, stream)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(folder / PREDICTIONS_FILE)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    write_json(folder / SCORES_FILE, scores)


def rescore(
    folder: Path,
    *,
    metrics: Sequence[str] | None = None,
    confidence: float,
    num_bootstrap: int,
    seed: int,
) -> Scores:
    """Score the stored predictions again and replace both files; no model is needed.

    Without `metrics`, those that the file holds are computed.

    Raises
    ------
    EvaluationError
        `folder` has no readable predictions of ours, or a metric is unknown.
    """
    table, origin = _stored(folder)
    stored = metrics_in(table.column_names)
    predictions = _predictions(table)
    extracted = {
        name.removesuffix(_EXTRACTED): table[name].to_pylist()
        for name in table.column_names
        if name.endswith(_EXTRACTED)
    }
    scores, table = score(
        predictions,
        **origin,
        metrics=stored if metrics is None else metrics,
        confidence=confidence,
        num_bootstrap=num_bootstrap,
        seed=seed,
        extracted=extracted,
    )
    write_evaluation(folder, scores, table)
    return scores


def read_predictions(folder: Path) -> list[Prediction]:
    """The predictions that an evaluation folder holds.

    Raises
    ------
    EvaluationError
        `folder` has no readable predictions of ours.
    """
    return _predictions(_stored(folder)[0])


def _stored(folder: Path) -> tuple[pa.Table, dict[str, Any]]:
    """The table of an evaluation folder, and of which trial, step and split it is."""
    file = folder / PREDICTIONS_FILE
    table = read_table(file)
    origin = json.loads((table.schema.metadata or {}).get(_METADATA_KEY, b"null"))
    missing = [name for name in PREDICTION_COLUMNS if name not in table.column_names]
    if origin is None or missing:
        what = f"the columns {', '.join(missing)}" if missing else "its trial, step and split"
        raise EvaluationError(f"{file} does not hold {what}: evaluate the checkpoint again")
    return table, origin


def _predictions(table: pa.Table) -> list[Prediction]:
    return [
        Prediction(
            sample_id=row["sample_id"],
            group_id=row["group_id"],
            prompt=row["prompt"],
            reference=row["reference"],
            text=row["prediction"],
            num_tokens=row["num_tokens"],
            truncated=row["truncated"],
        )
        for row in table.select(list(PREDICTION_COLUMNS)).to_pylist()
    ]


def stored_metrics(folder: Path) -> list[str]:
    """The metric variants that the stored predictions of an evaluation hold.

    Raises
    ------
    EvaluationError
        `folder` has no readable predictions.
    """
    try:
        return metrics_in(pq.read_schema(folder / PREDICTIONS_FILE).names)
    except (OSError, pa.ArrowInvalid) as error:
        file = folder / PREDICTIONS_FILE
        raise EvaluationError(f"cannot read the predictions {file}: {error}") from error


def metrics_in(names: Sequence[str]) -> list[str]:
    """The metric variants among the columns of predictions."""
    return [name.removesuffix(WEIGHT) for name in names if name.endswith(WEIGHT)]


def _metric(name: str) -> Metric:
    if name not in METRICS:
        raise EvaluationError(f"unknown metric {name!r}{did_you_mean(name, METRICS)}")
    return METRICS[name]


def _is_answer(text: str, answer: Answer, reference: Reference) -> bool:
    if answer == "choice" and reference.choices:
        return plain_letter(text, reference.choices) is not None
    return is_parsable(text) if answer == "json_tags" else bool(text.strip())


def _text_columns(predictions: Sequence[Prediction], parsed: list[bool]) -> dict[str, pa.Array]:
    """The columns of `PREDICTION_COLUMNS`, in their order."""
    columns: dict[str, pa.Array] = {}
    for name in PREDICTION_COLUMNS:
        attribute = "text" if name == "prediction" else name
        cells: list[Any] = (
            parsed if name == "parsed" else [getattr(row, attribute) for row in predictions]
        )
        if _TYPES[name] == pa.string():
            cells = [cell.encode("utf-8", "replace").decode() for cell in cells]
        columns[name] = pa.array(cells, _TYPES[name])
    return columns


def read_table(file: Path, columns: list[str] | None = None) -> pa.Table:
    """All columns, or those of the named ones that the file has."""
    try:
        with pq.ParquetFile(file) as parquet:
            return parquet.read(columns=columns)
    except (OSError, pa.ArrowInvalid) as error:
        raise EvaluationError(f"cannot read the predictions {file}: {error}") from error


def _metric_columns(name: str, results: Sequence[SampleScore]) -> dict[str, pa.Array]:
    """The columns that keep the samples' scores."""
    columns = {
        name: pa.array([x.value for x in results], pa.float64()),
        name + WEIGHT: pa.array([x.weight for x in results], pa.float64()),
    }
    if results[0].sums:
        columns[name + SUMS] = pa.array([x.sums for x in results], pa.list_(pa.float64()))
    return columns


def refuse_repeats(sample_ids: Sequence[str], where: str) -> None:
    """Raise EvaluationError where a sample stands twice."""
    repeated = [name for name, count in Counter(sample_ids).items() if count > 1]
    if repeated:
        raise EvaluationError(
            f"{where}: {len(repeated)} samples stand more than once, the first is {repeated[0]!r}"
        )
