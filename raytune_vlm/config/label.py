"""The file of `raytune-vlm data label`: pages, what is asked, who is asked, what it may cost.

Not a part of an experiment: labels are made once, and experiments then read them as data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from pydantic import Field, field_validator, model_validator
from referencing import Registry
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.loader import read_plain, validated
from raytune_vlm.config.overrides import apply_overrides
from raytune_vlm.config.section import Section
from raytune_vlm.config.server import ServerConfig
from raytune_vlm.config.sources import DocumentPages, Source
from raytune_vlm.errors import ConfigError

NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
_OWN_FIELDS = ("model", "messages", "stream", "n", "response_format", "seed", "temperature")


class Task(Section):
    """One thing that is asked of every page."""

    name: str = Field(pattern=NAME)
    """Name in files and reports."""
    scope: Literal["page", "document"] = "page"
    """What is shown together: each page, or the first `document_pages` of each document. Images and
    samples are pages and documents at once."""
    prompt: str = Field(min_length=1)
    """What the teacher is asked, after the images. The schema, if any, is added to it."""
    instruction: str | None = None
    """What the user's turn of the label asks: a short text, since the trained model needs no
    explanations. None: the prompt."""
    answer_schema: dict[str, Any] | None = None
    """JSON schema (2020-12) that the answer has to fit, or the name of a file with one, relative to
    this file. None: the answer is any text."""
    max_tokens: int = Field(default=1024, ge=1)
    """The longest answer. One that is cut here is no label."""

    @field_validator("answer_schema")
    @classmethod
    def _is_a_schema(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema is None:
            return None
        try:
            Draft202012Validator.check_schema(schema)
        except SchemaError as error:
            raise ValueError(f"is no JSON schema: {error.json_path}: {error.message}") from None
        resolver = Registry().resolver_with_root(DRAFT202012.create_resource(schema))
        for reference in _references(schema):
            try:  # an empty registry: nothing is fetched
                resolver.lookup(reference)
            except Unresolvable:
                raise ValueError(f"$ref {reference!r} leads nowhere within the schema") from None
        return schema

    @property
    def asked(self) -> str:
        """The user's turn of a label."""
        return self.instruction or self.prompt


class Teacher(ServerConfig):
    """A model that labels."""

    name: str = Field(pattern=NAME)
    """Name in files and reports."""
    timeout_s: float = Field(default=300.0, gt=0)
    """The longest that one request may take."""
    temperature: float | None = Field(default=0.0, ge=0, le=2)
    """0: the likeliest answer. None: not sent, the server's own."""
    samples: int = Field(default=1, ge=1, le=16)
    """So many answers to each page and task, drawn with seeds of their own, to compare them."""
    structured_output: bool = False
    """Ask the server to hold the answer to the schema while it is written (`response_format`)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further fields of each request, as the server takes them; null leaves one out:
    `{max_tokens: null, max_completion_tokens: 2000}`."""
    input_price: float | None = Field(default=None, ge=0)
    """Price of a million tokens that are read (prompts, images)."""
    output_price: float | None = Field(default=None, ge=0)
    """Price of a million tokens that are written."""

    @model_validator(mode="after")
    def _agrees(self) -> Teacher:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples above 1 need a temperature above 0: all would be the same")
        if (self.input_price is None) != (self.output_price is None):
            raise ValueError("input_price and output_price are given together")
        for key in self.options:
            if key in _OWN_FIELDS:
                raise ValueError(f"options.{key}: this field is not one of the options")
        return self

    def cost(self, input_tokens: int, output_tokens: int) -> float | None:
        """What tokens cost; None without prices."""
        if self.input_price is None or self.output_price is None:
            return None
        return (input_tokens * self.input_price + output_tokens * self.output_price) / 1e6


class Budget(Section):
    """What the whole output folder may cost, earlier runs included."""

    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens read and written, together."""
    max_cost: float | None = Field(default=None, gt=0)
    """Money, in the currency of the prices."""


class LabelConfig(Section):
    """A labelling file."""

    output: str
    """Folder of the answers and labels."""
    root: str = "."
    """Folder that relative paths of `files` and `sources` start from; they cannot leave it."""
    files: tuple[str, ...] = ()
    """Images, PDFs and TIFFs: files, folders or globs. Each image and each page is asked about."""
    documents: DocumentPages = DocumentPages()
    document_pages: int = Field(default=4, ge=1, le=64)
    """Of a document, so many pages are shown to tasks with `scope: document`."""
    sources: tuple[Source, ...] = ()
    """Data that is read already, as in `data.sources`: its images are asked about, its texts are
    left out."""
    allow_network: bool = False
    """Let sources read `hf://` and object stores."""
    image_limits: ImageLimits = ImageLimits()
    max_pixels: int = Field(default=4_000_000, ge=10_000)
    """An image with more pixels is sent smaller; the label keeps the image as it is."""
    tasks: tuple[Task, ...] = Field(min_length=1)
    """What is asked of every page."""
    teachers: tuple[Teacher, ...] = Field(min_length=1)
    """Who is asked; each is asked everything. The label is the first one's answer."""
    budget: Budget = Budget()

    @model_validator(mode="after")
    def _agrees(self) -> LabelConfig:
        if not self.files and not self.sources:
            raise ValueError("there is nothing to label: give files or sources")
        if not self.files and "documents" in self.model_fields_set:
            raise ValueError("documents has no effect without files; a pdf source has its own dpi")
        scopes = {task.scope for task in self.tasks}
        if "document_pages" in self.model_fields_set and "document" not in scopes:
            raise ValueError("document_pages has no effect: no task has scope: document")
        for source in self.sources:
            for key in ("split", "weight"):
                if key in source.model_fields_set:
                    raise ValueError(
                        f"{source.path}: {key} has no effect here, but where the labels are used"
                    )
        for what, entries in (("tasks", self.tasks), ("teachers", self.teachers)):
            names = [entry.name for entry in entries]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"{what}: the name {name!r} is given twice")
        for teacher in self.teachers:
            if self.budget.max_cost is not None and teacher.input_price is None:
                raise ValueError(f"budget.max_cost needs the prices of teacher {teacher.name!r}")
        return self


def load_labels(
    file: Path, overrides: Sequence[str] = (), allowed_hosts: Sequence[str] = ()
) -> LabelConfig:
    """The validated labelling file, its schema files read.

    Raises
    ------
    ConfigError
        If anything is wrong with the file or an override, or a teacher is on another machine that
        `allowed_hosts` does not name; one line a problem.
    """
    plain, origins = read_plain(file, "a labelling file needs output, files, tasks and teachers")
    apply_overrides(plain, overrides, origins, LabelConfig)
    origins[""] = str(file)
    tasks = plain.get("tasks")
    for number, task in enumerate(tasks if isinstance(tasks, list) else ()):
        if isinstance(task, dict) and isinstance(task.get("answer_schema"), str):
            place = origins.get(f"tasks.{number}.answer_schema", str(file))
            task["answer_schema"] = _read_schema(file.parent / task["answer_schema"], place)
    config = validated(LabelConfig, plain, origins)
    _check_hosts(config, allowed_hosts)
    return config


def _check_hosts(config: LabelConfig, allowed_hosts: Sequence[str]) -> None:
    """Pages stay on this machine unless the command line names the other one."""
    allowed = {host.lower() for host in allowed_hosts}
    remote = {teacher.host for teacher in config.teachers if not teacher.is_local}
    problems = [
        f"teachers: {host} is another machine, and pages would be sent there; "
        f"--allow-host {host} allows it"
        for host in sorted(remote - allowed)
    ]
    problems += [
        f"--allow-host {host} has no effect: no teacher is there"
        for host in sorted(allowed - remote)
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _read_schema(file: Path, place: str) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{place}: answer_schema: {file}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{place}: answer_schema: {file} is no JSON: {error}") from None


def _references(schema: Any) -> Iterator[str]:
    """Every `$ref` of a schema."""
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"]
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)
