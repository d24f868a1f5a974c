"""A benchmark as data: where its rows are, what is asked, how the answers are scored.

The package's own are `raytune_vlm.evaluate.benchmarks.BENCHMARKS`; one of yours is a YAML file of
the same keys, named in the place of a benchmark's name. See `docs/benchmarks.md`.
"""

from __future__ import annotations

import string
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from raytune_vlm.config.evaluation import METRIC_MODES
from raytune_vlm.config.section import Section
from raytune_vlm.errors import did_you_mean

ROWS = "raytune_vlm.evaluate.benchmarks.rows"
"""The module of the functions that read rows; it is imported where they are read."""


class Columns(Section):
    """Which column of the data holds what; a dot leads into a struct (`metadata.task`)."""

    images: tuple[str, ...] = ("image",)
    """The images, in the order in which they are shown; those that are null are left out."""
    question: str | None = None
    """The question; None where the prompt asks the same of every image."""
    answers: str | None = "answer"
    """The answer: a text, a list of texts, or of objects with a text `answer`."""
    choices: str | None = None
    """The texts of the choices, in their order."""
    id: str | None = None
    """The authority's name of the question; None: its row."""
    group: str | None = None
    """What must not be divided when intervals are drawn; None: questions on the same images."""
    category: str | None = None
    """What scores are broken down by."""
    type: str | None = None
    """The kind of answer, for metrics that need it."""
    precision: str | None = None
    """Decimals of the answer, for metrics that need them."""

    def names(self) -> tuple[str, ...]:
        """Every column that is read, without what stands after a dot."""
        given = [*self.images, *(v for k, v in self if k != "images" and v is not None)]
        return tuple(dict.fromkeys(name.split(".")[0] for name in given))


class Benchmark(Section):
    """A data set's split, the prompt, the generation and the metrics."""

    about: str = ""
    """One line for people."""
    path: str
    """`hf://datasets/<owner>/<name>`, or a file, a folder or a glob. In place of a hub's name,
    `--data DIR` takes the files of `DIR/<folder>`."""
    folder: str = ""
    """Folder under `--data`; empty: the benchmark's name."""
    dataset_split: str | None = None
    """Which split of the data set; files in a folder are told by their names
    (`test-00000-of-00002.parquet`)."""
    revision: str | None = None
    """Commit of the hub's data set; None: the newest, and the commit is noted with the score."""
    unreadable: str | None = None
    """Why the hub's files cannot be read as they are, and what to do; None: they can."""
    num_samples: int | None = Field(default=None, ge=1)
    """How many questions the whole split has, by its authors."""
    columns: Columns = Columns()
    function: Literal["question", "mmmu", "mathvista", "cord", "yes_no"] = "question"
    """How a row is read: see `raytune_vlm/evaluate/benchmarks/rows.py`."""
    keep: dict[str, str] = Field(default_factory=dict)
    """Column -> value: rows with another value are no part of the benchmark."""
    image_folder: str = ""
    """Put before the paths of images, where rows hold paths."""
    capitalize: bool = False
    """Write questions as `str.capitalize` does: the first letter large, all others small."""
    prompt: str
    """What is asked: a text with `{question}` and `{choices}`."""
    prompt_source: str = "its own"
    """Who asks so: paper, or repository and file."""
    choice_form: str = "{letter}. {text}"
    """How each choice is written; they are joined by line breaks."""
    answer_is: Literal["text", "index"] = "text"
    """`index`: the answer is the number of a choice, from 0, and is scored by its letter."""
    categories: dict[str, str] = Field(default_factory=dict)
    """Category as the data has it -> as it is called here; `name@category` asks only for these."""
    metrics: tuple[str, ...] = ()
    """Metric variants; empty where the answers are secret."""
    answer: Literal["text", "json_tags", "choice"] = "text"
    """What an answer must be to count as parsed."""
    max_new_tokens: int = Field(default=32, ge=1)
    """Longest generation."""
    submission: Literal["mmmu", "docvqa"] | None = None
    """Whose form a file of answers for the authority's server has."""

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in METRIC_MODES:
                raise ValueError(f"unknown metric {name!r}{did_you_mean(name, METRIC_MODES)}")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Benchmark:
        for name, template, known in (
            ("prompt", self.prompt, ("question", "choices")),
            ("choice_form", self.choice_form, ("letter", "text")),
        ):
            for _, field, form, conversion in string.Formatter().parse(template):
                if field is not None and (field not in known or form or conversion):
                    raise ValueError(
                        f"{name}: {{{field}}} is not known{did_you_mean(field, known)}"
                    )
        for place in ("question", "choices"):
            column = getattr(self.columns, place)
            if place == "choices" and self.function == "mathvista":
                continue  # its questions hold them
            if (f"{{{place}}}" in self.prompt) != (column is not None):
                has = "has" if column is None else "lacks"
                raise ValueError(f"prompt {has} {{{place}}}, but columns.{place} is {column!r}")
        if not self.metrics and self.submission is None:
            raise ValueError("metrics: at least one, or a submission")
        if not self.metrics and self.columns.id is None:
            raise ValueError("columns.id is needed for a submission")
        if self.answer_is == "index" and self.columns.choices is None:
            raise ValueError("answer_is: index needs columns.choices")
        return self

    def row_options(self, category: str | None) -> dict[str, Any]:
        """What the row function is given: all that decides what a sample is."""
        names = ("columns", "keep", "image_folder", "capitalize", "prompt", "choice_form")
        plain = self.model_dump(mode="json", include={*names, "answer_is", "categories"})
        return plain | {"category": category, "has_answers": bool(self.metrics)}

    def row_columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        return tuple(dict.fromkeys([*self.columns.names(), *self.keep]))

    @property
    def row_function(self) -> str:
        """`package.module:name` of the row function."""
        return f"{ROWS}:{self.function}"
