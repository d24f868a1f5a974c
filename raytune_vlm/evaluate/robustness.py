"""The robustness curve: the same prompts with images made worse step by step.

Each point is compared with the unaltered images of the same samples. The alterations themselves are
in `altered.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.evaluation import RobustnessConfig
from raytune_vlm.evaluate.altered import ALTERATIONS, AlteredPrompts, own_pictures
from raytune_vlm.evaluate.controls import ControlSkipped
from raytune_vlm.models.loading import Base
from raytune_vlm.prepare.store import PreparedSplit


def points(config: RobustnessConfig) -> dict[str, tuple[str, float]]:
    """Name of each point of the curve (`jpeg_quality=50`) -> kind and strength."""
    return {
        f"{kind}={strength:g}": (kind, strength)
        for kind, strengths in config.strengths().items()
        for strength in strengths
    }


def robustness_prompts(
    kind: str,
    strength: float,
    base: Base,
    split: PreparedSplit,
    rows: Sequence[int],
    *,
    limits: ImageLimits,
) -> tuple[AlteredPrompts, list[int]]:
    """The prompts of one point, and which of the rows it is made of: those with images.

    Raises
    ------
    ControlSkipped
        If no row has an image.
    """
    rows = [row for row in rows if split.num_images[row]]
    if not rows:
        raise ControlSkipped("no sample has an image")
    alter = ALTERATIONS[kind]
    return AlteredPrompts(
        split,
        base,
        rows,
        lambda row: [alter(x, strength, limits) for x in own_pictures(split, limits, row)],
    ), rows
