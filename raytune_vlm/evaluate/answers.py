"""The answers of an evaluation as they come, so that a killed one goes on where it was.

    evaluations/<split>/step_000200/
      made_with.json             what the answers depend on: checkpoint, settings, samples
      answers/<rank>-<id>.jsonl  one line an answer; a file for every life of every worker

`made_with.json` stays; the folder `answers` goes when `predictions.parquet` is there. What was made
with anything else is thrown away. No file is ever appended to after its writer died, so a torn last
line loses one answer and spoils none.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from raytune_vlm.errors import EvaluationError
from raytune_vlm.evaluate.scoring import PREDICTIONS_FILE, SCORES_FILE, Prediction, read_predictions
from raytune_vlm.records import read_json, read_json_lines, write_json

MADE_WITH_FILE = "made_with.json"


class AnswerStore:
    """The answers of one evaluation folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._answers = folder / "answers"

    def open(self, made_with: dict[str, Any]) -> dict[str, Prediction]:
        """The answers that are there, by sample; those made with anything else are removed.

        To be called by one process, before any of them adds answers.
        """
        file = self.folder / MADE_WITH_FILE
        try:
            before = read_json(file) if file.exists() else None
        except ValueError:
            before = None
        if before != json.loads(json.dumps(made_with)):
            self.clear()
            for stale in (SCORES_FILE, PREDICTIONS_FILE):
                (self.folder / stale).unlink(missing_ok=True)
            write_json(file, made_with)
            return {}
        found = [Prediction(**row) for part in self._parts() for row in read_json_lines(part)]
        if (self.folder / PREDICTIONS_FILE).exists():
            try:
                found += read_predictions(self.folder)
            except EvaluationError:
                (self.folder / PREDICTIONS_FILE).unlink()
        return {entry.sample_id: entry for entry in found}

    def writer(self, rank: int) -> AnswerWriter:
        """Where one worker puts its answers."""
        return AnswerWriter(self._answers / f"{rank}-{uuid.uuid4().hex[:8]}.jsonl")

    def clear(self) -> None:
        """Remove the answers: they are in `predictions.parquet` now, or of no use."""
        shutil.rmtree(self._answers, ignore_errors=True)

    def _parts(self) -> list[Path]:
        return sorted(self._answers.glob("*.jsonl"))


class AnswerWriter:
    """A file of answers that only grows; made with the first of them."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def add(self, answers: Sequence[Prediction]) -> None:
        """Append answers; they outlive the process when this returns."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="ascii") as stream:
            stream.write("".join(json.dumps(asdict(entry)) + "\n" for entry in answers))
