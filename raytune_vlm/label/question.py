"""What a teacher is sent, and the key under which its answer is known."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from PIL import Image

from raytune_vlm.config.label import LabelConfig, Task, Teacher
from raytune_vlm.images import decode, encode_png
from raytune_vlm.label.pages import Page

SCHEMA_NOTE = "Answer with nothing but JSON that fits this JSON schema:"
REPAIR_NOTE = "This answer cannot be used: {why}. Answer again, with nothing but the corrected one."


@dataclass(frozen=True)
class Unit:
    """One answer that is wanted: a page, a task, a teacher, the number of the sampling."""

    page: Page
    task: Task
    teacher: Teacher
    sampling: int
    key: str
    """A digest of all that the answer depends on: images, prompt, schema, model, settings. Not of
    names of tasks, nor of where the server is."""


@dataclass(frozen=True)
class Question:
    """A request for a unit: the first one, or the one that asks to mend what came."""

    unit: Unit
    before: str | None = None
    """The answer that is to be mended."""
    why: str = ""
    """What is wrong with it."""

    @property
    def attempt(self) -> int:
        """0, or 1 for the repair."""
        return int(self.before is not None)


def unit_of(config: LabelConfig, page: Page, task: Task, teacher: Teacher, sampling: int) -> Unit:
    """The unit with its key."""
    depends = {
        "images": page.digests,
        "max_pixels": config.max_pixels,
        "prompt": _prompt(task),
        "max_tokens": task.max_tokens,
        "teacher": teacher.name,
        "model": teacher.model,
        "temperature": teacher.temperature,
        "structured_output": teacher.structured_output,
        "options": teacher.options,
        "sampling": sampling,
    }
    text = json.dumps(depends, sort_keys=True)
    return Unit(page, task, teacher, sampling, hashlib.sha256(text.encode()).hexdigest()[:32])


def request_of(question: Question, config: LabelConfig) -> dict[str, Any]:
    """The body of the request; raises ImageError for an image that does not decode."""
    unit = question.unit
    task, teacher = unit.task, unit.teacher
    content = [_image(data, config) for data in unit.page.images]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [*content, {"type": "text", "text": _prompt(task)}]}
    ]
    if question.before is not None:
        messages.append({"role": "assistant", "content": question.before})
        messages.append({"role": "user", "content": REPAIR_NOTE.format(why=question.why)})
    body: dict[str, Any] = {
        "model": teacher.model,
        "messages": messages,
        "max_tokens": task.max_tokens,
    }
    if teacher.temperature is not None:
        body["temperature"] = teacher.temperature
    if teacher.samples > 1:
        body["seed"] = unit.sampling
    if teacher.structured_output and task.answer_schema is not None:
        form = {"name": task.name, "schema": task.answer_schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": form}
    return {key: value for key, value in (body | teacher.options).items() if value is not None}


def _prompt(task: Task) -> str:
    if task.answer_schema is None:
        return task.prompt
    schema = json.dumps(task.answer_schema, ensure_ascii=False)
    return f"{task.prompt}\n\n{SCHEMA_NOTE}\n{schema}"


def _image(data: bytes, config: LabelConfig) -> dict[str, Any]:
    """The pixels alone: what else a file holds (place, camera, comments) is not sent."""
    image = decode(data, config.image_limits)
    share = math.sqrt(config.max_pixels / (image.width * image.height))
    if share < 1:
        size = (max(1, int(image.width * share)), max(1, int(image.height * share)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    png = base64.b64encode(encode_png(image)).decode("ascii")
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}}
