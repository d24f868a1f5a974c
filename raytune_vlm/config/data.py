"""`data`: where samples come from, how they are checked, split and prepared."""

from typing import Literal

from pydantic import Field, model_validator

from raytune_vlm.config.section import Section
from raytune_vlm.config.sources import Source


class SplitConfig(Section):
    """How samples of `split: auto` sources are divided, by hash of their group."""

    select: float = Field(default=0.1, ge=0, lt=1)
    """Share for `select`: scores that the search sees."""
    report: float = Field(default=0.1, ge=0, lt=1)
    """Share for `report`: scored once, for the base model and the chosen trials only."""

    @model_validator(mode="after")
    def _leaves_something_to_train(self) -> "SplitConfig":
        if self.select + self.report >= 1:
            raise ValueError(f"select + report must be below 1, got {self.select + self.report}")
        return self


class ImageLimits(Section):
    """What an image may be; one beyond these limits is quarantined."""

    max_bytes: int = Field(default=20_000_000, ge=1)
    """Size of the encoded file."""
    max_pixels: int = Field(default=50_000_000, ge=1)
    """Width x height, known from the header before anything is decoded."""


class DataConfig(Section):
    """The data of an experiment."""

    root: str = "."
    """Folder that relative paths start from; paths cannot leave it."""
    sources: tuple[Source, ...] = Field(min_length=1)
    """Where samples come from, in order."""
    split: SplitConfig = SplitConfig()
    max_bad_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of samples that may be quarantined; above it the run refuses to start."""
    image_limits: ImageLimits = ImageLimits()
    max_length: int = Field(default=2048, ge=8)
    """Longest sample in tokens, image tokens included."""
    over_long: Literal["drop", "error"] = "drop"
    """What happens to a longer sample; it is counted either way."""
    max_select_samples: int | None = Field(default=None, ge=1)
    """Score at most so many samples of `select` (a fixed choice by hash)."""
    max_report_samples: int | None = Field(default=None, ge=1)
    """Score at most so many samples of `report`."""
    consumption: Literal["cached", "streaming"] = "cached"
    """How batches reach the training workers: `cached` reads the memory-mapped store, `streaming`
    lets Ray Data tasks collate ahead. The batches are the same."""
    allow_network: bool = False
    """Let sources read `hf://` and object stores."""
