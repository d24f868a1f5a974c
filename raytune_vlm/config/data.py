"""`data`: where samples come from, how they are checked, split and prepared."""

from typing import Literal

from pydantic import Field, model_validator

from raytune_vlm.config.augmentation import AugmentationConfig
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
    over_long: Literal["drop", "truncate", "error"] = "drop"
    """What happens to a longer sample; it is counted either way. `truncate` cuts the text at the
    end of a training sample; one whose images would be cut, or that would have nothing left to
    learn, is dropped, and so is a longer prompt of `select` and `report`."""
    deduplicate: bool = False
    """Train on one copy of samples that are exactly the same (in `select` and `report` later
    copies are always quarantined)."""
    near_image_distance: int | None = Field(default=2, ge=0, le=16)
    """Pictures of two splits whose 64-bit perceptual hashes differ in at most so many bits count as
    the same (`data/overlap.jsonl`). 2 finds most recompressed copies and kept receipts of one
    layout apart; 4 to 6 suit photographs. None: only equal files count."""
    max_select_samples: int | None = Field(default=None, ge=1)
    """Score at most so many samples of `select` (a fixed choice by hash)."""
    max_report_samples: int | None = Field(default=None, ge=1)
    """Score at most so many samples of `report`."""
    tier: Literal["auto", "pixels", "encoded"] = "auto"
    """What the prepared store holds of the images: `pixels` as the model takes them, read without
    any work, or the `encoded` files, decoded by threads of the worker while training. The batches
    are the same. `auto` takes `pixels` where they fit on the disk."""
    disk_budget_gb: float | None = Field(default=None, gt=0)
    """Disk that the prepared pixels may take, in GB; None: four fifths of what is free."""
    consumption: Literal["cached", "streaming"] = "cached"
    """How samples reach the training workers: `cached` reads the memory-mapped store, `streaming`
    lets Ray Data ship the encoded images from where the store is."""
    decode_threads: int | None = Field(default=None, ge=1)
    """Threads of a worker that decode and collate ahead; None: `train.cpus_per_worker`."""
    stall_timeout_s: float = Field(default=120.0, gt=0)
    """Without a batch for so long, a worker says who holds the cluster's resources; after
    five times as long it gives up."""
    augmentation: AugmentationConfig | None = None
    """Random changes of training images, anew in every epoch (from the `encoded` tier)."""
    allow_network: bool = False
    """Let sources read `hf://` and object stores."""

    @model_validator(mode="after")
    def _agrees(self) -> "DataConfig":
        trains = [source for source in self.sources if source.split in ("auto", "train")]
        weighted = [source for source in trains if source.weight is not None]
        if weighted and len(weighted) < len(trains):
            lacking = next(source for source in trains if source.weight is None)
            raise ValueError(
                f"either all training sources have a weight or none has: {lacking.path} has none"
            )
        for source in self.sources:
            if source.weight is not None and source not in trains:
                raise ValueError(
                    f"weight only concerns training: {source.path} has split={source.split}"
                )
        for setting, wanted in (
            ("augmentation", self.augmentation is not None),
            ("consumption: streaming", self.consumption == "streaming"),
        ):
            if wanted and self.tier == "pixels":
                raise ValueError(f"{setting} works on encoded images: tier cannot be pixels")
        return self
