"""The typed records that stages exchange, and the one place that knows a sweep folder's layout.

Everything a sweep leaves behind is plain JSON, JSON lines, Parquet, SQLite or safetensors, so that
a copied folder can be read without Ray and without torch:

    <storage_path>/<name>/
      experiment.json        the resolved experiment and its fingerprint
      ledger.jsonl           append-only: proposed, started, scored, stopped, failed, finished
      lease.json             who drives this sweep
      study.db               Optuna storage
      result.json            the decision (`SweepResult`), written last
      data/                  manifest.json, plan.json, quarantine.jsonl, gallery/<sample_id>.jpg
      trials/<trial_id>/     trial.json, metrics.jsonl, samples/, checkpoints/step_000200/,
                             evaluations/<split>/step_000200/{predictions.parquet,scores.json},
                             seed-<n>/ (the winner only: its recipe with another seed)
      report/                index.html, leaderboard.csv, leaderboard.json
      best/                  the winner's PEFT adapter, processor, model card, experiment.yaml

The untouched base model is the pseudo-trial `base` at step 0.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "select", "report"]
SPLITS: tuple[Split, ...] = ("train", "select", "report")

BASE_TRIAL = "base"
"""The trial id under which the untouched base model is scored."""


@dataclass(frozen=True)
class Sample:
    """One conversation with its images.

    `messages` holds `{"role", "content": [{"type": "image"} | {"type": "text", "text": str}]}`, and
    `tool_calls` where an assistant calls tools, which `tools` describes as chat templates take it;
    the n-th image part of the conversation is the n-th entry of `images` (encoded bytes, still
    undecoded). `sample_id` is a hash of the content, `group_id` names what must not be split
    (a document, an image family), `origin` is `file:row` for messages to people.
    """

    sample_id: str
    group_id: str
    origin: str
    messages: list[dict[str, Any]]
    images: list[bytes]
    tools: list[dict[str, Any]] = field(default_factory=list)

    @property
    def answer(self) -> str:
        """The text of the last assistant turn: the reference that evaluation compares with."""
        return "".join(part["text"] for part in self.messages[-1]["content"])


@dataclass(frozen=True)
class Quarantined:
    """A sample that was refused, where it stood, and why."""

    origin: str
    reason: str
    split: str

    @property
    def kind(self) -> str:
        """The reason without what differs from row to row: numbers, file names, quoted words."""
        kind = self.reason
        for pattern, mark in _VARYING:
            kind = pattern.sub(mark, kind)
        return kind


_VARYING = (
    (re.compile(r"'[^']*'"), "'…'"),
    (re.compile(r"\S*[/\\]\S*|\b[\w-]+\.[A-Za-z]{3,4}\b"), "…"),
    (re.compile(r"\d+"), "#"),
)


def by_kind(quarantine: Sequence[Quarantined]) -> list[tuple[Quarantined, int]]:
    """The first sample of each kind of refusal and how many there are, the most frequent first."""
    counts: Counter[str] = Counter()
    first: dict[str, Quarantined] = {}
    for entry in quarantine:
        kind = entry.kind
        counts[kind] += 1
        first.setdefault(kind, entry)
    return [(first[kind], count) for kind, count in counts.most_common()]


@dataclass(frozen=True)
class SplitStatistics:
    """What became of the samples of one split, and their lengths in tokens."""

    num_seen: int
    num_used: int
    num_quarantined: int
    num_dropped_over_long: int
    num_groups: int
    num_images: int
    max_length: int
    mean_length: float
    mean_labelled: float
    mean_media: float = 0.0
    """Tokens that stand for images."""
    num_truncated: int = 0
    """Used, but cut to `data.max_length`."""
    num_duplicates: int = 0
    """Exact copies removed (`data.deduplicate`)."""
    length_counts: list[int] = field(default_factory=list)
    """Histogram of the lengths in tokens: samples between one of `length_edges` and the next."""
    length_edges: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class DataManifest:
    """`data/manifest.json`: the prepared store, by content address, and its statistics."""

    digest: str
    store: str
    splits: dict[str, SplitStatistics]
    quarantine_reasons: dict[str, int]
    """The reason of the first sample of each kind -> how many were refused for one like it."""
    overlap: dict[str, int]
    """`"train/report"` -> samples of the second split whose group or images stand in the first."""
    seconds: float = 0.0
    tier: Literal["pixels", "encoded"] = "pixels"
    """What the store holds of the images."""
    tier_reason: str = ""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DataManifest:
        splits = {name: SplitStatistics(**entry) for name, entry in value["splits"].items()}
        known = {entry.name for entry in fields(cls)}
        given = {name: entry for name, entry in value.items() if name in known}
        return cls(**{**given, "splits": splits})


@dataclass(frozen=True)
class MetricEstimate:
    """A metric on n samples with its interval (clustered by group when groups repeat)."""

    value: float
    lower: float
    upper: float
    standard_error: float


@dataclass(frozen=True)
class CategoryScore:
    """A metric on the samples of one category; value * samples are the points of OCRBench."""

    value: float
    num_samples: int


@dataclass(frozen=True)
class Scores:
    """`scores.json`: one checkpoint on one split."""

    trial_id: str
    step: int
    split: str
    num_samples: int
    num_groups: int
    metrics: dict[str, MetricEstimate]
    """Metric variant (`nted@donut`) -> estimate."""
    parse_failure_rate: float
    empty_rate: float
    truncation_rate: float
    seconds: float = 0.0
    by_category: dict[str, dict[str, CategoryScore]] = field(default_factory=dict)
    """Metric variant -> category or group of categories -> score, where references have any."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Scores:
        metrics = {name: MetricEstimate(**entry) for name, entry in value["metrics"].items()}
        by_category = {
            metric: {name: CategoryScore(**entry) for name, entry in scores.items()}
            for metric, scores in value.get("by_category", {}).items()
        }
        return cls(**{**value, "metrics": metrics, "by_category": by_category})


PREDICTION_COLUMNS = (
    "sample_id",
    "group_id",
    "prompt",
    "reference",
    "prediction",
    "parsed",
    "num_tokens",
    "truncated",
)
"""Columns of `predictions.parquet`; one float column per metric variant follows, named by it.

The float is the sample's own score (`nan` for a metric that has none); a second column
`<metric>/weight` holds its weight in the aggregate (1 for means, the number of reference
characters for `cer@micro`): aggregate = sum(score * weight) / sum(weight). A metric whose aggregate
is no such ratio (`bleu4@coco`) has a third column, `<metric>/sums`: what it adds up over samples.
"""


@dataclass(frozen=True)
class TrialRecord:
    """`trial.json`: one point of the search space and how it ended."""

    trial_id: str
    number: int
    recipe: dict[str, Any]
    """Dotted key -> value: only what the search space varies."""
    status: Literal["running", "finished", "stopped", "failed"]
    step: int = 0
    max_steps: int = 0
    failure: str | None = None
    seconds: float = 0.0
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    trainable_parameters: int = 0
    trainable_by_scope: dict[str, int] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)
    micro_batch: dict[str, Any] | None = None
    """`size` and `tokens` that stand in for the recipe's `train.micro_batch_size` and
    `train.micro_batch_tokens`, if memory did not suffice for those."""


@dataclass(frozen=True)
class PairedTest:
    """A paired comparison of two systems on the same samples (`first` minus `second`)."""

    metric: str
    first: str
    second: str
    difference: float
    lower: float
    upper: float
    p_value: float
    num_samples: int


@dataclass(frozen=True)
class Replicate:
    """The winner's recipe trained with another seed, scored on `select` at the winner's step."""

    seed: int
    value: float | None
    """None if it failed; `failure` says why."""
    failure: str | None = None


@dataclass(frozen=True)
class SweepResult:
    """`result.json`: the decision of a sweep, written once at its end."""

    metric: str
    mode: Literal["max", "min"]
    winner: str
    winner_step: int
    default: str | None
    """The trial that ran the experiment's own recipe, if the sweep included it."""
    naive: float
    """The winner's score on `select`: inflated by having been picked."""
    corrected: MetricEstimate | None
    """The same with the selection bias removed (bootstrap over trials x samples)."""
    report: dict[str, str]
    """Role (`base`, `default`, `winner`) -> trial id scored on the `report` split."""
    paired: list[PairedTest]
    indistinguishable: list[str]
    """Trials whose `select` score cannot be told from the winner's, cheapest first."""
    num_report_touches: int
    seconds: float
    replicates: list[Replicate] = field(default_factory=list)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SweepResult:
        corrected = value["corrected"]
        return cls(
            **{
                **value,
                "corrected": MetricEstimate(**corrected) if corrected else None,
                "paired": [PairedTest(**entry) for entry in value["paired"]],
                "replicates": [Replicate(**entry) for entry in value.get("replicates", [])],
            }
        )


class TrialFolder:
    """Paths of one trial inside a sweep folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.record_file = root / "trial.json"
        self.metrics_file = root / "metrics.jsonl"
        """One JSON object per logged step: step, loss, grad_norm, learning_rate, tokens, ..."""
        self.micro_batch_file = root / "micro_batch.json"
        """The smaller micro-batch that the trial goes on with, once it ran out of memory."""
        self.samples = root / "samples"
        """`rank_<r>.jsonl`: step and the ids of the samples that the rank was given in it."""
        self.checkpoints = root / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:06d}"

    def evaluation(self, split: str, step: int) -> Path:
        return self.root / "evaluations" / split / f"step_{step:06d}"

    def scores(self, split: str) -> list[Scores]:
        """The scores of this trial on a split, by step."""
        files = sorted((self.root / "evaluations" / split).glob("step_*/scores.json"))
        return [Scores.from_json(read_json(file)) for file in files]

    def record(self) -> TrialRecord:
        return TrialRecord(**read_json(self.record_file))


class SweepFolder:
    """Paths of a sweep folder; knows the layout, writes nothing by itself."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.experiment_file = self.root / "experiment.json"
        self.ledger_file = self.root / "ledger.jsonl"
        self.lease_file = self.root / "lease.json"
        self.study_file = self.root / "study.db"
        self.result_file = self.root / "result.json"
        self.data = self.root / "data"
        self.manifest_file = self.data / "manifest.json"
        self.plan_file = self.data / "plan.json"
        """Digest and settings of the plan of the experiment's own recipe; checkpoints name it."""
        self.quarantine_file = self.data / "quarantine.jsonl"
        self.gallery = self.data / "gallery"
        self.report = self.root / "report"
        self.best = self.root / "best"

    def trial(self, trial_id: str) -> TrialFolder:
        return TrialFolder(self.root / "trials" / trial_id)

    def trial_ids(self) -> list[str]:
        """All trials that have a record, by number; without the pseudo-trial `base`."""
        found = (file.parent.name for file in (self.root / "trials").glob("*/trial.json"))
        return sorted(trial_id for trial_id in found if trial_id != BASE_TRIAL)

    def result(self) -> SweepResult | None:
        """The decision, or None while the sweep has not ended."""
        if not self.result_file.exists():
            return None
        return SweepResult.from_json(read_json(self.result_file))


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return value


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """All objects of a JSON-lines file; a torn last line (a writer that was killed) is left out."""
    if not file.exists():
        return []
    rows: list[dict[str, Any]] = []
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines) - 1:
                raise
    return rows


def write_json(file: Path, value: Any) -> None:
    """Write JSON (a dataclass or plain data) so that readers see the old or the new file, whole."""
    plain = asdict(value) if hasattr(value, "__dataclass_fields__") else value
    write_text(file, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically: temporary name, fsync, rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("x", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
