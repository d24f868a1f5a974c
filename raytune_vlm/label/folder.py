"""The folder that labelling leaves behind; the one place that knows its layout.

labels.json       the labelling file, resolved
answers.jsonl     every reply, as it came (`answers.py`); everything else is made from it
images/           the labelled images, each once, named by content
results.jsonl     every usable answer: page, task, teacher, sampling, value
labels.jsonl      one row a page and task, as the source `messages` reads it
quarantine.jsonl  what has no label, and why
cost.json         tokens and money, by teacher and task
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raytune_vlm.config.label import LabelConfig, Task
from raytune_vlm.errors import ConfigError, DataError
from raytune_vlm.images import file_suffix
from raytune_vlm.label.check import as_text
from raytune_vlm.label.pages import Page
from raytune_vlm.records import read_json, read_json_lines, write_json, write_text


@dataclass(frozen=True)
class Result:
    """One usable answer."""

    page: str
    origin: str
    group_id: str
    images: tuple[str, ...]
    """Names of files, relative to the folder."""
    task: str
    teacher: str
    sampling: int
    value: Any
    """What the JSON of the answer holds, or its text."""
    repaired: bool
    """Whether the teacher had to be told what was wrong with its first answer."""


@dataclass(frozen=True)
class Rejected:
    """A page, or an answer to a task about it, that gives no label."""

    origin: str
    reason: str
    task: str = ""
    """Empty: the page itself cannot be read."""
    teacher: str = ""
    sampling: int = 0


class LabelFolder:
    """Paths in the folder, and what is written there."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def config_file(self) -> Path:
        """The labelling file, resolved."""
        return self.root / "labels.json"

    @property
    def answers_file(self) -> Path:
        """Every reply."""
        return self.root / "answers.jsonl"

    @property
    def results_file(self) -> Path:
        """Every usable answer."""
        return self.root / "results.jsonl"

    def keep_images(self, page: Page) -> tuple[str, ...]:
        """Write the images of a page, unless they are there; their names."""
        names = []
        for data, digest in zip(page.images, page.digests, strict=True):
            name = f"images/{digest[:32]}{file_suffix(data)}"
            file = self.root / name
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
                temporary.write_bytes(data)
                temporary.replace(file)
            names.append(name)
        return tuple(names)

    def write_results(
        self, config: LabelConfig, results: Sequence[Result], rejected: Sequence[Rejected]
    ) -> int:
        """Write `results.jsonl`, `labels.jsonl` and `quarantine.jsonl`; the number of labels.

        The label of a page and task is the first of its results.
        """
        write_rows(self.results_file, map(asdict, results))
        tasks = {task.name: task for task in config.tasks}
        first: dict[tuple[str, str], Result] = {}
        for result in results:
            first.setdefault((result.page, result.task), result)
        rows = [label_row(result, tasks[result.task], result.value) for result in first.values()]
        write_rows(self.root / "labels.jsonl", rows)
        write_rows(self.root / "quarantine.jsonl", map(asdict, rejected))
        return len(rows)

    def read_config(self) -> LabelConfig:
        """The labelling file that made the folder; raises ConfigError where there is none."""
        if not self.config_file.is_file():
            raise ConfigError(f"{self.root}: is no folder of labels: it has no labels.json")
        try:
            return LabelConfig.model_validate(read_json(self.config_file))
        except ValueError as error:
            raise DataError(f"{self.config_file}: {str(error).splitlines()[0]}") from None

    def answers_by_labeller(self, other: LabelFolder | None = None) -> dict[str, list[Result]]:
        """The usable answers of each teacher and sampling; of two folders, those of both.

        Of the other folder only the pages and tasks of this one count. Raises ConfigError and
        DataError where a folder cannot be read.
        """
        found: dict[str, list[Result]] = {}
        own = self.read_results()
        known = {(result.page, result.task) for result in own}
        self._add(found, own, "" if other is None else f"{self.root.as_posix()}: ")
        if other is not None:
            shared = [entry for entry in other.read_results() if (entry.page, entry.task) in known]
            other._add(found, shared, f"{other.root.as_posix()}: ")
        return found

    def _add(self, found: dict[str, list[Result]], results: list[Result], prefix: str) -> None:
        samples = {teacher.name: teacher.samples for teacher in self.read_config().teachers}
        for result in results:
            number = f" #{result.sampling + 1}" if samples[result.teacher] > 1 else ""
            found.setdefault(f"{prefix}{result.teacher}{number}", []).append(result)

    def read_results(self) -> list[Result]:
        """Every usable answer; raises DataError where the file is damaged."""
        try:
            rows = read_json_lines(self.results_file)
            return [Result(**{**row, "images": tuple(row["images"])}) for row in rows]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{self.results_file}: is damaged: {error}") from None


def label_row(result: Result, task: Task, value: Any) -> dict[str, Any]:
    """A row of the source `messages`; columns that it does not read say where it comes from."""
    parts: list[dict[str, Any]] = [{"type": "image"} for _ in result.images]
    asked = [*parts, {"type": "text", "text": task.asked}]
    answer = [{"type": "text", "text": as_text(value)}]
    return {
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}],
        "images": list(result.images),
        "group_id": result.group_id,
        "task": task.name,
        "page": result.page,
        "origin": result.origin,
    }


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON lines, whole or not at all."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(file, text)


def write_config(folder: LabelFolder, config: LabelConfig) -> None:
    """Write `labels.json`: what was given, so that it can be read as it was."""
    write_json(folder.config_file, config.model_dump(mode="json", exclude_unset=True))
