"""`data.sources`: where raw data lies and in which format; one model a format."""

import re
import string
import sys
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from raytune_vlm.config.section import Section


def _names_a_function(function: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", function):
        raise ValueError(f"must be written package.module:name, got '{function}'")
    if re.split("[.:]", function)[0] in sys.stdlib_module_names:
        raise ValueError(f"must be a function of your own, not one of Python's, got '{function}'")
    return function


class SourceConfig(Section):
    """What every source has."""

    path: str
    """A file, a folder or a glob; relative to `data.root`. URLs (`s3://`, `gs://`, `az://`,
    `hf://`) need `allow_network`."""
    split: Literal["auto", "train", "select", "report"] = "auto"
    """Purpose of the samples; `auto` divides them by group as `data.split` says."""
    max_samples: int | None = Field(default=None, ge=1)
    """Take only the first so many rows."""
    weight: float | None = Field(default=None, gt=0)
    """Share of this source in a mixture, relative to the other weights; None in all sources: every
    sample once an epoch. Weights only concern `train`."""


class TableSource(SourceConfig):
    """What every source has whose rows stand in JSON lines, JSON, Parquet or Arrow files.

    `path` may also be a folder written by `Dataset.save_to_disk`, or `hf://datasets/<name>`.
    """

    dataset_split: str | None = None
    """Which split of a Hugging Face dataset (`save_to_disk` folder or hub name); None: its only
    one."""
    revision: str | None = None
    """Branch, tag or commit of a hub name; None: `main`."""

    @model_validator(mode="after")
    def _a_revision_is_the_hubs(self) -> "TableSource":
        if self.revision is not None and not self.path.startswith("hf://datasets/"):
            raise ValueError("revision needs a path of the form hf://datasets/<name>")
        return self


class MessagesSource(TableSource):
    """OpenAI / transformers conversations: `messages` of `{role, content}`, `images`."""

    type: Literal["messages"]
    messages_column: str = "messages"
    """Column that holds the conversation."""
    images_column: str = "images"
    """Column of the images (paths, or Hugging Face `{bytes, path}`) that the parts refer to."""
    tools_column: str = "tools"
    """Column of the tools that the assistant may call, as chat templates take them."""


class ShareGptSource(TableSource):
    """sharegpt rows: `conversations` of `{from, value}` with `<image>` placeholders, `images`."""

    type: Literal["sharegpt"]
    conversations_column: str = "conversations"
    """Column that holds the turns."""
    images_column: str = "images"
    """Column of the images (paths, or Hugging Face `{bytes, path}`)."""


class PromptCompletionSource(TableSource):
    """TRL's prompt and completion columns: two texts, or two lists of messages; `images`."""

    type: Literal["prompt_completion"]
    prompt_column: str = "prompt"
    """Column of the prompt: text, where `<image>` may stand, or messages."""
    completion_column: str = "completion"
    """Column of the answer: text or messages."""
    images_column: str = "images"
    """Column of the images; without `<image>` in the prompt they stand before its first words."""


class ImageTextSource(TableSource):
    """Image-text pairs: one image, one text that the model shall give for the instruction."""

    type: Literal["image_text"]
    image_column: str = "image"
    """Column of the image (path, or Hugging Face `{bytes, path}`)."""
    text_column: str = "text"
    """Column of the target text."""
    text_template: str | None = None
    """The target text made of several columns, instead of `text_column`: `"{name}. {description}"`;
    braces that are meant as such are doubled."""
    instruction: str = "Describe this image."
    """What the user's turn asks."""

    @field_validator("text_template")
    @classmethod
    def _is_a_template(cls, template: str | None) -> str | None:
        if template is not None:
            parse_template(template)
        return template

    @model_validator(mode="after")
    def _has_one_text(self) -> "ImageTextSource":
        if self.text_template is not None and "text_column" in self.model_fields_set:
            raise ValueError("text_column and text_template exclude each other")
        return self


class CordSource(TableSource):
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
    choice: Literal["first", "seeded"] = "first"
    """Which of several `gt_parses` is the target; `seeded`: drawn by `seed` and the parses, so that
    a document keeps its target wherever it stands."""
    seed: int = 0
    """Seed of that choice."""


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


class WebDatasetSource(SourceConfig):
    """WebDataset tar shards: members of one name, an image and its `.txt` or `.json`."""

    type: Literal["webdataset"]
    target: Literal["txt", "json"] | None = None
    """Which member is the target where samples have both; None: the one that is there."""
    ignored_suffixes: tuple[str, ...] = ()
    """Other members that samples may have (`cls`, `meta.json`): these are not read."""
    instruction: str = "Describe this image."
    """What the user's turn asks where the target is a text without turns."""


class LlamaFactorySource(SourceConfig):
    """An entry of LLaMA-Factory's `dataset_info.json`; `path` is that file or its folder."""

    type: Literal["llamafactory"]
    dataset: str | None = None
    """Name of the entry; None: the only one."""


class PythonSource(SourceConfig):
    """A format of your own: a function that yields rows in the layout of `messages`."""

    type: Literal["python"]
    function: str
    """`package.module:name` of a function `(options, path)` that yields one dict a row."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Handed to the function as they are."""

    _is_a_function = field_validator("function")(_names_a_function)


class TableFunctionSource(TableSource):
    """Rows of tables through a function of your own, one row in, one sample out."""

    type: Literal["table"]
    function: str
    """`package.module:name` of a function `(row, options)` that returns a dict as `messages` rows
    are, with `id` if rows have a name of their own, or None for a row that is left out."""
    columns: tuple[str, ...] = Field(min_length=1)
    """The columns that the function reads; a row that lacks one is refused."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Handed to the function as they are."""

    _is_a_function = field_validator("function")(_names_a_function)


class DocumentPages(Section):
    """How the pages of documents are rendered, and which documents are refused."""

    dpi: int = Field(default=150, ge=36, le=600)
    """Dots per inch at which a page of a PDF is rendered."""
    max_pixels: int = Field(default=4_000_000, ge=10_000)
    """A page that would have more pixels is rendered with fewer dots per inch. A page, or a picture
    in it, beyond `data.image_limits.max_pixels` is quarantined instead."""
    max_pages: int = Field(default=500, ge=1)
    """A document with more pages is quarantined."""
    max_bytes: int = Field(default=200_000_000, ge=1)
    """A larger document is quarantined."""
    deskew: bool = False
    """Turn a page whose lines slope by up to 5 degrees, as scans do, until they are level."""
    autocontrast: bool = False
    """Stretch the contrast of a page to the full range, its outermost percents cut off."""


class PdfSource(DocumentPages, TableSource):
    """Pages of PDF and TIFF documents: rows of `file`, `page` and `text` or `messages`.

    PDFs need pypdfium2: `pip install 'raytune-vlm[documents]'`.
    """

    type: Literal["pdf"]
    file_column: str = "file"
    """Column of the document's path."""
    page_column: str = "page"
    """Column of the page that is shown, or of a list of them; the first is 1."""
    answer_column: str = "text"
    """Column of the target text, in rows without messages."""
    messages_column: str = "messages"
    """Column of the conversation, in rows without a target text."""
    instruction: str = "Read this page."
    """What the user's turn asks where the row has a target text."""


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """A template as `(literal text, name of the column after it)`; the last name may be None.

    Raises ValueError where it is malformed, or names no column.
    """
    parts: list[tuple[str, str | None]] = []
    for literal, name, form, conversion in string.Formatter().parse(template):
        if name == "" or form or conversion:
            raise ValueError("a placeholder must be the name of a column in braces, nothing else")
        parts.append((literal, name))
    if all(name is None for _, name in parts):
        raise ValueError("the template names no column: write it in braces, as {description}")
    return parts


Source = Annotated[
    MessagesSource
    | ShareGptSource
    | PromptCompletionSource
    | ImageTextSource
    | CordSource
    | SroieSource
    | WebDatasetSource
    | LlamaFactorySource
    | PythonSource
    | TableFunctionSource
    | PdfSource,
    Field(discriminator="type"),
]
