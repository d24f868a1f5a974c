"""Files of answers in the form that an authority's server takes, from stored predictions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from raytune_vlm.evaluate.metrics.letters import mmmu_letter
from raytune_vlm.records import write_text
from raytune_vlm.references import Reference, read_reference

SUBMISSION_FILE = "submission.json"

Answers = Sequence[tuple[Reference, str]]


def mmmu(answers: Answers) -> dict[str, str]:
    """`{"test_Art_1": "B", "test_Math_2": "1.5"}`: a letter where there are choices, else the text.

    MMMU-Benchmark/MMMU, `mmmu/README.md`, "Evaluation Only". Where an answer names no letter, the
    official script draws one; here it is empty, and so wrong.
    """
    return {
        reference.id: (mmmu_letter(text, reference.choices) or "")
        if reference.choices
        else text.strip()
        for reference, text in answers
    }


def docvqa(answers: Answers) -> list[dict[str, Any]]:
    """`[{"questionId": 49153, "answer": "1958"}]`, as the Robust Reading Competition takes it.

    EvolvingLMMs-Lab/lmms-eval, `lmms_eval/tasks/docvqa/utils.py`.
    """
    return [
        {"questionId": int(reference.id), "answer": text.strip()} for reference, text in answers
    ]


SUBMISSIONS: dict[str, Callable[[Answers], Any]] = {"mmmu": mmmu, "docvqa": docvqa}


def write_submission(form: str, predictions: Path) -> Path:
    """Write `submission.json` beside a file of predictions; its path."""
    table = pq.read_table(predictions, columns=["reference", "prediction"])
    rows = table.to_pylist()
    answers = [(read_reference(row["reference"]), row["prediction"]) for row in rows]
    file = predictions.with_name(SUBMISSION_FILE)
    write_text(file, json.dumps(SUBMISSIONS[form](answers), ensure_ascii=False, indent=1) + "\n")
    return file
