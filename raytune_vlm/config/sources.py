"""`data.sources`: where raw data lies and in which format; one model a format."""

from typing import Annotated, Literal

from pydantic import Field

from raytune_vlm.config.section import Section


class SourceConfig(Section):
    """What every source has."""

    path: str
    """A file, a folder or a glob; relative to `data.root`. `hf://` names need `allow_network`."""
    split: Literal["auto", "train", "select", "report"] = "auto"
    """Purpose of the samples; `auto` divides them by group as `data.split` says."""
    max_samples: int | None = Field(default=None, ge=1)
    """Take only the first so many rows."""
    weight: float | None = Field(default=None, gt=0)
    """Share of this source in a mixture, relative to the other weights; None in all sources: every
    sample once an epoch. Weights only concern `train`."""


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
