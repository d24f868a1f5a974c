"""`evaluation`: how checkpoints are scored by what they generate."""

from typing import Any, Literal

from pydantic import Field, field_validator

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


NO_SHARES = frozenset(
    ["cer@micro", "wer@micro", "cider@coco", *(f"bleu{n}@coco" for n in (1, 2, 3, 4))]
)
"""The variants that are no mean of values between 0 and 1."""


class EvaluationConfig(Section):
    """Greedy generation, answer parsing, metrics, intervals."""

    metrics: tuple[str, ...] = ("exact_match@strip",)
    """Metric variants to compute; every one of them is stored per sample."""
    answer: Literal["text", "json_tags"] = "text"
    """What an answer must be to count as parsed."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest generation; an answer cut here is counted as truncated."""
    batch_size: int = Field(default=64, ge=1)
    """Prompts generated at once on one worker."""
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

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in METRIC_MODES:
                raise ValueError(f"unknown metric {name!r}{did_you_mean(name, METRIC_MODES)}")
        if len(set(value)) != len(value) or not value:
            raise ValueError(f"metrics must be distinct and at least one, got {list(value)}")
        return value
