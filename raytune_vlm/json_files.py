"""JSON and text files, read whole and written whole: readers see the old file or the new one."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; raises ValueError if it holds something else."""
    return _object(json.loads(file.read_text(encoding="utf-8")))


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """All objects of a JSON-lines file; a torn last line (a writer that was killed) is left out.

    Raises ValueError where another line holds something else.
    """
    if not file.exists():
        return []
    rows: list[dict[str, Any]] = []
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            rows.append(_object(json.loads(line)))
        except ValueError:
            if number < len(lines) - 1:
                raise
    return rows


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"an object is expected, not {type(value).__name__}")
    return value


def write_json(file: Path, value: Any) -> None:
    """Write JSON (a dataclass or plain data) so that readers see the old or the new file, whole."""
    plain = asdict(value) if hasattr(value, "__dataclass_fields__") else value
    write_text(file, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically: temporary name, fsync, rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("x", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
