"""The typed records that stages exchange, and the one place that knows a sweep folder's layout.

Everything a sweep leaves behind is plain JSON, JSON lines, Parquet, SQLite or safetensors, so that
a copied folder can be read without Ray and without torch:

    <storage_path>/<name>/
      experiment.json        the resolved experiment and its fingerprint
      ledger.jsonl           append-only: proposed, started, scored, stopped, failed, finished
      lease.json             who drives this sweep
      control/               requests to the driver that it has not taken yet
      study.db               Optuna storage
      packing.json           how many slots fit at once, where a sharded base found too many
      result.json            the decision (`SweepResult`), written last
      data/                  manifest.json, plan.json, quarantine.jsonl, overlap.jsonl,
                             gallery/<sample_id>.jpg
      trials/<trial_id>/     trial.json, metrics.jsonl, samples/, checkpoints/step_000200/,
                             evaluations/<split>/step_000200/{predictions.parquet,scores.json},
                             evaluations/<benchmark>/step_000200/ the same, benchmark.json and
                             submission.json; evaluations/card.{md,json}
                             origin/ (a clone's: the adapter that it starts from)
                             seed-<n>/ (the best only: the recipe with another seed)
      report/                index.html, leaderboard.csv, leaderboard.json
      best/                  the winner's PEFT adapter, processor, model card, experiment.yaml

The untouched base model is the pseudo-trial `base` at step 0. A model that no sweep trained has its
benchmarks in `<storage_path>/evaluations/<model>/`, which is laid out like a sweep folder.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from raytune_vlm.errors import DataError, first_line
from raytune_vlm.json_files import read_json, read_json_lines, write_json, write_text
from raytune_vlm.records.estimate import MetricEstimate
from raytune_vlm.records.overlap import CleanScores, Overlap
from raytune_vlm.records.reading import as_record
from raytune_vlm.records.result import GuardScore, PairedTest, Replicate, SweepResult
from raytune_vlm.visible import one_line

__all__ = [
    "BASE_TRIAL",
    "PREDICTION_COLUMNS",
    "SPLITS",
    "CategoryScore",
    "CleanScores",
    "DataManifest",
    "GuardScore",
    "MetricEstimate",
    "Overlap",
    "PairedTest",
    "Quarantined",
    "Replicate",
    "Sample",
    "Scores",
    "Split",
    "SplitStatistics",
    "SweepFolder",
    "SweepResult",
    "TrialFolder",
    "TrialRecord",
    "as_record",
    "by_kind",
    "read_json",
    "read_json_lines",
    "write_json",
    "write_text",
]

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
    """A sample that was refused, where it stood, and why: each one line that is safe to show."""

    origin: str
    reason: str
    split: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "origin", one_line(self.origin))
        object.__setattr__(self, "reason", one_line(self.reason))

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
    """`"train/report"` -> samples of the second split with a like one in the first."""
    seconds: float = 0.0
    tier: Literal["pixels", "encoded"] = "pixels"
    """What the store holds of the images."""
    tier_reason: str = ""
    overlap_kinds: dict[str, dict[str, int]] = field(default_factory=dict)
    """`overlap` by kind of likeness; one sample may count in several."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DataManifest:
        known = {entry.name for entry in fields(cls)}
        return as_record(cls, {name: value[name] for name in value if name in known})


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
    clean: CleanScores | None = None
    """On the samples that do not overlap `train`; None where none does."""
    extraction_failures: dict[str, int] = field(default_factory=dict)
    """Metric with a judge -> samples that it got no answer for: they have no score."""
    benchmark: dict[str, Any] = field(default_factory=dict)
    """Of a benchmark: what it was (`sweep.benchmarks.facts_of`), and what of it was left out."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Scores:
        return as_record(cls, value)


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
    peak_memory_gb: float = 0.0
    """Most memory of the GPU that this trial took, in 10^9 bytes; 0 without one, and with several
    slots."""
    audit: dict[str, Any] = field(default_factory=dict)
    micro_batch: dict[str, Any] | None = None
    """`size` and `tokens` that stand in for the recipe's `train.micro_batch_size` and
    `train.micro_batch_tokens`, if memory did not suffice for those."""
    notes: list[str] = field(default_factory=list)
    """What its scores are to be read with: no better than with blank images."""
    origin: dict[str, Any] | None = None
    """Of a clone: `parent`, `step` at which it goes on from there, and the parent's `recipe`."""


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
        self.origin = root / "origin"
        """Of a clone: the adapter that it starts from, `adapter_model.safetensors`."""
        self.card = root / "evaluations" / "card.md"
        """The table of the benchmarks that `evaluate` scored last; `card.json` is the same."""

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:06d}"

    def evaluation(self, split: str, step: int) -> Path:
        return self.root / "evaluations" / split / f"step_{step:06d}"

    def scores(self, split: str) -> list[Scores]:
        """The scores of this trial on a split, by step."""
        files = sorted((self.root / "evaluations" / split).glob("step_*/scores.json"))
        return [Scores.from_json(read_json(file)) for file in files]

    def record(self) -> TrialRecord:
        return as_record(TrialRecord, read_json(self.record_file))


class SweepFolder:
    """Paths of a sweep folder; knows the layout, writes nothing by itself."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.experiment_file = self.root / "experiment.json"
        self.ledger_file = self.root / "ledger.jsonl"
        self.lease_file = self.root / "lease.json"
        self.control = self.root / "control"
        """Requests to the driver, until it has taken them: `raytune-vlm control`."""
        self.study_file = self.root / "study.db"
        self.packing_file = self.root / "packing.json"
        """`together`: see `packed.host.Host`."""
        self.result_file = self.root / "result.json"
        self.data = self.root / "data"
        self.manifest_file = self.data / "manifest.json"
        self.plan_file = self.data / "plan.json"
        """Digest and settings of the plan of the experiment's own recipe; checkpoints name it."""
        self.quarantine_file = self.data / "quarantine.jsonl"
        self.overlap_file = self.data / "overlap.jsonl"
        """Samples that are much like one of another split (`Overlap`), a pair a line."""
        self.facts_file = self.data / "report_samples.jsonl"
        """Source and image size of each sample of `report`, one a line."""
        self.gallery = self.data / "gallery"
        self.report = self.root / "report"
        self.best = self.root / "best"

    def trial(self, trial_id: str) -> TrialFolder:
        """The paths of a trial; raises DataError for an id that would lead out of the folder.

        A command line, a ledger and a `result.json` name trials, and they may be another's.
        """
        if any(part in ("", ".", "..") for part in trial_id.split("/")):
            raise DataError(f"{self.root}: {trial_id!r} is no id of a trial")
        return TrialFolder(self.root / "trials" / trial_id)

    def check_links(self) -> None:
        """Raise DataError where a link leads out of the folder: going on would write there."""
        root = self.root.resolve()
        for parent, folders, files in os.walk(root):
            for name in (*folders, *files):
                entry = Path(parent) / name
                if entry.is_symlink() and not entry.resolve().is_relative_to(root):
                    raise DataError(
                        f"{entry} is a link out of the sweep folder, to {entry.resolve()}; put "
                        "what it shows in its place, if you trust it"
                    )

    def trial_ids(self) -> list[str]:
        """All trials that have a record, by number; without the pseudo-trial `base`."""
        found = (file.parent.name for file in (self.root / "trials").glob("*/trial.json"))
        return sorted(trial_id for trial_id in found if trial_id != BASE_TRIAL)

    def overlapping(self, split: str) -> list[str]:
        """The ids of the samples of a split that are much like one of `train`."""
        rows = read_json_lines(self.overlap_file)
        found = (
            row["sample_id"]
            for row in rows
            if row["split"] == split and row["with_split"] == "train" and row["is_counted"]
        )
        return list(dict.fromkeys(found))

    def facts(self) -> dict[str, dict[str, Any]]:
        """Sample of `report` -> what `facts_file` says of it."""
        return {row["sample_id"]: row for row in read_json_lines(self.facts_file)}

    def report_touches(self) -> list[dict[str, Any]]:
        """The events of the ledger that scored a checkpoint on `report`, over the folder's life."""
        rows = read_json_lines(self.ledger_file)
        return [row for row in rows if row.get("event") == "touched"]

    def result(self) -> SweepResult | None:
        """The decision, or None while the sweep has not ended; raises DataError where it is another
        thing, and as `trial` does."""
        if not self.result_file.exists():
            return None
        try:
            found = SweepResult.from_json(read_json(self.result_file))
        except ValueError as error:
            why = f"is not as a sweep writes it: {first_line(error)}"
            raise DataError(f"{self.result_file}: {why}") from None
        for trial_id in (found.winner, *found.report.values()):
            self.trial(trial_id)
        return found
