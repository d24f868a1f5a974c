"""`evaluation`: how checkpoints are scored by what they generate."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from raytune_vlm.config.section import Section
from raytune_vlm.config.server import ServerConfig
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
    "mathvista@judge": "max",
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


NO_SHARES = frozenset(
    ["cer@micro", "wer@micro", "cider@coco", *(f"bleu{n}@coco" for n in (1, 2, 3, 4))]
)
"""The variants that are no mean of values between 0 and 1."""
JUDGED_METRICS = ("mathvista@judge",)
"""Metrics whose answers a language model extracts: they need `evaluation.judge`."""

Control = Literal["blank_image", "shuffled_image", "text_only", "gold"]
CONTROLS: tuple[Control, ...] = ("blank_image", "shuffled_image", "text_only", "gold")


class RobustnessConfig(Section):
    """Strengths at which the images of `report` are altered before the processor sees them."""

    jpeg_quality: tuple[Annotated[int, Field(ge=1, le=95)], ...] = ()
    """Qualities of a JPEG file that the image is written to and read from again."""
    blur_sigma: tuple[Annotated[float, Field(gt=0, le=100)], ...] = ()
    """Standard deviations of a Gaussian blur, in pixels of the image as it comes."""
    rotation_degrees: tuple[Annotated[float, Field(ge=-180, le=180)], ...] = ()
    """Angles, counter-clockwise; the size stays and grey fills the corners."""
    scale: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """Factors that width and height are shrunk by."""

    @model_validator(mode="after")
    def _distinct(self) -> "RobustnessConfig":
        for kind, strengths in self.strengths().items():
            if len(set(strengths)) != len(strengths):
                raise ValueError(f"{kind}: strengths must be distinct, got {list(strengths)}")
        return self

    def strengths(self) -> dict[str, tuple[float, ...]]:
        """Kind of alteration -> its strengths; those without any left out."""
        return {
            name: tuple(getattr(self, name))
            for name in type(self).model_fields
            if getattr(self, name)
        }


USUAL_CURVE = RobustnessConfig(
    jpeg_quality=(90, 50, 20),
    blur_sigma=(1, 2, 4),
    rotation_degrees=(-5, 5),
    scale=(0.75, 0.5),
)
"""The curve that is made where one is asked for without saying which."""


class JudgeConfig(ServerConfig):
    """An OpenAI-compatible server that extracts answers for the metrics `...@judge`."""


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
    rung_samples: float | tuple[float, ...] | None = None
    """Score the rungs before the last on this share of `select`: one share for all of them, or one
    for each, none smaller than the one before. The shares are nested and go by the seed and the
    sample's id, so that samples that are added later change nothing for the others. Trials are only
    compared on equal shares; whoever has not been scored on all of `select` cannot win as long as
    one has."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Level of the intervals."""
    num_bootstrap: int = Field(default=2000, ge=100)
    """Bootstrap resamples (of groups) behind intervals and tests."""
    controls: tuple[Control, ...] = CONTROLS
    """What a score is compared with: the same prompts with grey images, with images of other
    samples, without images, and the reference given as the answer."""
    controls_on: tuple[Literal["select", "report"], ...] = Field(default=("report",), min_length=1)
    """Splits whose evaluations make the controls; on `select` they cost as much at every rung."""
    controls_samples: int | None = Field(default=256, ge=1)
    """Most samples that each control, and each point of the robustness curve, is made on; null:
    all."""
    robustness: RobustnessConfig = RobustnessConfig()
    """Alterations of the images of `report`, each scored beside the unaltered ones."""
    judge: JudgeConfig | None = None
    """Who extracts the answers for `mathvista@judge`."""

    @field_validator("rung_samples")
    @classmethod
    def _nested_shares(cls, value: float | tuple[float, ...] | None) -> Any:
        shares = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(0 < share <= 1 for share in shares) or list(shares) != sorted(shares):
            raise ValueError(
                f"rung_samples must be shares above 0 and at most 1, none smaller than the one "
                f"before, got {list(shares)}"
            )
        return value

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

    @field_validator("controls", "controls_on")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"entries must be distinct, got {list(value)}")
        return value

    @model_validator(mode="after")
    def _judge_is_used(self) -> "EvaluationConfig":
        judged = [name for name in self.metrics if name in JUDGED_METRICS]
        if judged and self.judge is None:
            raise ValueError(f"metrics: {judged[0]!r} needs evaluation.judge: who extracts answers")
        if self.judge is not None and not judged:
            raise ValueError(
                f"judge has no effect: none of {list(JUDGED_METRICS)} is among evaluation.metrics"
            )
        return self

    @model_validator(mode="after")
    def _controls_are_made(self) -> "EvaluationConfig":
        fields = type(self).model_fields
        if self.controls:
            return self
        if self.controls_on != fields["controls_on"].default:
            raise ValueError(
                f"controls_on={list(self.controls_on)} has no effect: evaluation.controls is empty"
            )
        limit = self.controls_samples
        if limit != fields["controls_samples"].default and not self.robustness.strengths():
            raise ValueError(
                f"controls_samples={limit} has no effect: evaluation.controls and "
                "evaluation.robustness are empty"
            )
        return self
