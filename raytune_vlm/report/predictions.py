"""The answers that a trial gave to the untouched split, as they are stored."""

from __future__ import annotations

from typing import Any

import pyarrow.parquet

from raytune_vlm.report.loading import SweepView


def predictions(view: SweepView, trial_id: str, step: int | None) -> dict[str, dict[str, Any]]:
    """The rows of a trial's predictions on `report` by sample, at a step or else the last one."""
    folder = view.folder.trial(trial_id).root / "evaluations" / "report"
    found = folder.glob("step_*/predictions.parquet")
    files = sorted(file for file in found if file.is_file())  # to open a FIFO would wait for ever
    wanted = [file for file in files if file.parent.name == f"step_{step or 0:06d}"]
    if not files:
        return {}
    file = (wanted or files)[-1]
    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (OSError, ValueError):
        return {}
    return {str(row["sample_id"]): row for row in rows if "sample_id" in row}
