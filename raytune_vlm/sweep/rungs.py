"""Which samples a rung is scored on, and which scores may be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.errors import DataError
from raytune_vlm.evaluate.subset import within_share

if TYPE_CHECKING:
    from raytune_vlm.prepare.store import PreparedSplit


def rows_to_score(
    experiment: ExperimentConfig, split: PreparedSplit, rows: Sequence[int], step: int
) -> list[int]:
    """Those of `rows` that a step is scored on; all but for `evaluation.rung_samples`."""
    share = experiment.select_share(step) if split.split == "select" else 1.0
    ids = [split.sample_ids[row] for row in rows]
    return [rows[place] for place in within_share(ids, share, experiment.seed)]


def check_rungs(experiment: ExperimentConfig, split: PreparedSplit) -> dict[int, int]:
    """How many samples of `select` each rung is scored on.

    Raises
    ------
    DataError
        If a rung would be scored on none.
    """
    rows = split.fixed_choice(experiment.data.max_select_samples)
    sizes = {}
    for step in experiment.rungs:
        sizes[step] = len(rows_to_score(experiment, split, rows, step))
        if sizes[step] == 0:
            raise DataError(
                f"evaluation.rung_samples: a share of {experiment.select_share(step):g} of the "
                f"{len(rows)} samples of select holds none at step {step}; raise it"
            )
    return sizes
