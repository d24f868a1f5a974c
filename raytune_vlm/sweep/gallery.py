"""Thumbnails of evaluation samples beside a sweep, for what shows answers: `data/gallery/`."""

from __future__ import annotations

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.images import thumbnail
from raytune_vlm.prepare.prepare import PreparedData
from raytune_vlm.records import SweepFolder

THUMBNAIL_SIDE = 320
"""Longest side, in pixels."""


def write_gallery(
    folder: SweepFolder, experiment: ExperimentConfig, data: PreparedData, split: str, most: int
) -> None:
    """Write the first image of at most so many samples, which every rung scores."""
    limits = {
        "select": experiment.data.max_select_samples,
        "report": experiment.data.max_report_samples,
    }
    samples = data.split(split)
    folder.gallery.mkdir(parents=True, exist_ok=True)
    for row in samples.fixed_choice(min(most, limits[split] or most)):
        images = samples.images(row)
        if images:
            picture = thumbnail(images[0], experiment.data.image_limits, THUMBNAIL_SIDE)
            (folder.gallery / f"{samples.sample_ids[row]}.jpg").write_bytes(picture)
