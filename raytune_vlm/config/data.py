"""`data`: where samples come from, how they are checked, split and prepared."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raytune_vlm.config.section import Section


class SourceConfig(Section):
    """What every source has."""

    path: str
    """A file, a folder or a glob; relative to `data.root`. `hf://` names need `allow_network`."""
    split: Literal["auto", "train", "select", "report"] = "auto"
    """Purpose of the samples; `auto` divides them by group as `data.split` says."""
    max_samples: int | None = Field(default=None, ge=1)
    """Take only the first so many rows."""


class MessagesSource(SourceConfig):
    """OpenAI / transformers conversations in JSON lines, JSON or Parquet."""

    type: Literal["messages"]
    messages_column: str = "messages"
    """Column that holds the conversation."""
    images_column: str = "images"
    """Column of the images (paths, or Hugging Face `{bytes, path}`) that the parts refer to."""


class ShareGptSource(SourceConfig):
    """sharegpt rows: `conversations` of `{from, value}` with `<image>` placeholders, `images`."""

    type: Literal["sharegpt"]
    conversations_column: str = "conversations"
    """Column that holds the turns."""
    images_column: str = "images"
    """Column of the images (paths, or Hugging Face `{bytes, path}`)."""


class ImageTextSource(SourceConfig):
    """Image-text pairs: one image, one text that the model shall give for the instruction."""

    type: Literal["image_text"]
    image_column: str = "image"
    """Column of the image (path, or Hugging Face `{bytes, path}`)."""
    text_column: str = "text"
    """Column of the target text."""
    instruction: str = "Describe this image."
    """What the user's turn asks."""


class CordSource(SourceConfig):
    """CORD-v2-style documents: an image and `ground_truth` JSON with `gt_parse` or `gt_parses`."""

    type: Literal["cord"]
    image_column: str = "image"
    """Column of the image."""
    ground_truth_column: str = "ground_truth"
    """Column of the JSON text."""
    instruction: str = "Parse this document into JSON tags."
    """What the user's turn asks."""
    sort_keys: bool = False
    """Write the keys of each object in reverse alphabetical order, as Donut does."""


class SroieSource(SourceConfig):
    """A SROIE folder with `img/`, `box/`, `key/`: text lines cut out of scanned receipts."""

    type: Literal["sroie"]
    keep: Literal["amounts_and_dates", "all"] = "amounts_and_dates"
    """Which lines are taken."""
    max_characters: int = Field(default=24, ge=1)
    """Longer lines are left out."""
    margin: float = Field(default=0.15, ge=0, le=1)
    """Border added around a line's box, as a share of the box's height."""
    canvas: tuple[int, int] | None = None
    """Width and height in pixels: put each crop in the middle of a grey canvas of that size, for
    models that squeeze every picture into a square. None leaves crops as they are."""
    instruction: str = "read"
    """What the user's turn asks."""


Source = Annotated[
    MessagesSource | ShareGptSource | ImageTextSource | CordSource | SroieSource,
    Field(discriminator="type"),
]


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
