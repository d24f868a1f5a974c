"""`evaluation`: how checkpoints are scored by what they generate."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from raytune_vlm.config.section import Section
from raytune_vlm.errors import did_you_mean

METRIC_MODES: dict[str, Literal["max", "min"]] = {
    "nted@donut": "max",
    "field_f1@donut": "max",
    "exact_match@strip": "max",
    "exact_match@squad": "max",
    "token_f1@squad": "max",
    "cer@micro": "min",
    "wer@micro": "min",
    "vqa@official": "max",
    "vqa@always_normalise": "max",
    "vqa@m4c": "max",
    "vqa@min_k_over_3": "max",
    "anls@rrc": "max",
    "anls@strict": "max",
    "anls_star@json": "max",
    "anls_star@tags": "max",
    "relaxed_accuracy@pix2struct": "max",
    "ocrbench@official": "max",
    "choice@letter": "max",
    "choice@vlmevalkit": "max",
    "ai2d@lmms_eval": "max",
    "realworldqa@lmms_eval": "max",
    "mmmu@official": "max",
    "mathvista@rules": "max",
    "medical_open@llava_med_recall": "max",
    "medical_open@llava_med_f1": "max",
    "medical_closed@llava_med": "max",
    "medical_closed@exact": "max",
    "cider@coco": "max",
    "bleu1@coco": "max",
    "bleu2@coco": "max",
    "bleu3@coco": "max",
    "bleu4@coco": "max",
    "rouge_l@coco": "max",
    "json_valid@strict": "max",
    "field_accuracy@json": "max",
}
"""Every metric variant and whether more or less of it is better.

Kept here, free of heavy imports, so that a typo fails before anything starts; the functions are
`raytune_vlm.evaluate.metrics.METRICS`, and a test holds the two tables together.
"""


BENCHMARK_NAMES = (
    "mmmu",
    "mmmu_test",
    "mathvista",
    "ocrbench",
    "ai2d",
    "ai2d_no_mask",
    "chartqa",
    "docvqa",
    "docvqa_test",
    "textvqa",
    "realworldqa",
    "vqav2",
    "coco_karpathy",
    "cord",
    "rdr",
    "vqa_rad",
    "slake",
)
"""The keys of `BENCHMARKS`: here, so that a typo in an experiment fails before anything starts."""


class EvaluationConfig(Section):
    """Greedy generation, answer parsing, metrics, intervals."""

    metrics: tuple[str, ...] = ("exact_match@strip",)
    """Metric variants to compute; every one of them is stored per sample."""
    answer: Literal["text", "json_tags", "choice"] = "text"
    """What an answer must be to count as parsed: not empty, tags of a document, or one choice of
    the reference, by its letter or its text."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest generation; an answer cut here is counted as truncated."""
    batch_size: int = Field(default=64, ge=1)
    """Prompts generated at once on one worker."""
    guard: tuple[str, ...] = ()
    """Benchmarks that the base model, the default recipe and the winner are scored on beside
    `report` at the end of a sweep, to show what tuning made them forget: names of
    `docs/benchmarks.md` (`docvqa`, `chartqa@human`) or YAML files of your own."""
    guard_data: str | None = None
    """Folder of the guard's data, `<folder>/<benchmark>/*.parquet`, or `fixtures`; None: the hub,
    which needs `data.allow_network`."""
    guard_samples: int | None = Field(default=None, ge=1)
    """At most so many questions of each benchmark of the guard (a fixed choice by hash)."""
    every: int | None = Field(default=None, ge=1)
    """Score `select` every so many steps, besides the rungs of the scheduler and the end."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Level of the intervals."""
    num_bootstrap: int = Field(default=2000, ge=100)
    """Bootstrap resamples (of groups) behind intervals and tests."""

    @model_validator(mode="after")
    def _guard_is_used(self) -> "EvaluationConfig":
        for name in ("guard_data", "guard_samples"):
            if getattr(self, name) is not None and not self.guard:
                raise ValueError(f"{name}={getattr(self, name)} has no effect: guard is empty")
        return self

    @field_validator("guard")
    @classmethod
    def _known_benchmarks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            plain = name.partition("@")[0]
            if plain not in BENCHMARK_NAMES and not name.endswith((".yaml", ".yml")):
                near = did_you_mean(plain, BENCHMARK_NAMES)
                raise ValueError(f"no benchmark {plain!r}{near}, nor a YAML file of your own")
        if len(set(value)) != len(value):
            raise ValueError(f"benchmarks must be distinct, got {list(value)}")
        return value

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in METRIC_MODES:
                raise ValueError(f"unknown metric {name!r}{did_you_mean(name, METRIC_MODES)}")
        if len(set(value)) != len(value) or not value:
            raise ValueError(f"metrics must be distinct and at least one, got {list(value)}")
        return value
