"""Source and image size of each sample of `report`: what the report cuts the scores by."""

from __future__ import annotations

import json
from pathlib import Path

from raytune_vlm.config.data import DataConfig
from raytune_vlm.images import num_pixels
from raytune_vlm.prepare.store import PreparedSplit


def write_facts(file: Path, split: PreparedSplit, config: DataConfig) -> None:
    """A JSON line for each sample that is scored: id, its source, the pixels of all its images."""
    names = [f"{source.path} ({source.type})" for source in config.sources]
    with file.open("w", encoding="utf-8") as stream:
        for row in split.fixed_choice(config.max_report_samples):
            pixels = sum(num_pixels(data, config.image_limits) for data in split.images(row))
            facts = {"sample_id": split.sample_ids[row], "pixels": pixels}
            facts["source"] = names[int(split.sources[row])]
            stream.write(json.dumps(facts, ensure_ascii=False) + "\n")
