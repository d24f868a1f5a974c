"""One shard of a source, read, checked, encoded and written: what a Ray Data worker does.

A shard becomes a folder named by the digest of everything that its content depends on, written
under a temporary name and renamed when it is whole; one that is there is never made again.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raytune_vlm.collate.encode import Encoded, Encoder
from raytune_vlm.config.data import DataConfig, SplitConfig
from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.sources import Source
from raytune_vlm.errors import DataError
from raytune_vlm.images import decode, thumbnail
from raytune_vlm.models.families import FAMILIES
from raytune_vlm.models.loading import check_model, load_processor
from raytune_vlm.prepare.store import RowWriter, encoded_to_row, write_index
from raytune_vlm.records import SPLITS, Quarantined, Sample, Split, write_json
from raytune_vlm.sources import SOURCES
from raytune_vlm.sources.base import Shard

THUMBNAIL_SIDE = 320
"""Longest side, in pixels, of the pictures that the report shows."""


@dataclass(frozen=True)
class ShardJob:
    """A shard to prepare: where it comes from and the key of its folder."""

    source: int
    shard: Shard
    key: str


def split_of(group_id: str, config: SplitConfig, seed: int) -> Split:
    """The split of a group: a pure function of its id, so that a group is never divided."""
    digest = hashlib.sha256(f"{seed}/{group_id}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < config.report:
        return "report"
    return "select" if share < config.report + config.select else "train"


class ShardPreparer:
    """Prepares shards with one loaded processor."""

    def __init__(self, experiment: ExperimentConfig, store: Path) -> None:
        import torch

        torch.set_num_threads(1)
        self._experiment = experiment
        self._store = store
        family = FAMILIES[check_model(experiment.model).model_type]
        self._encoder = Encoder(load_processor(experiment.model), family)

    def __call__(self, job: ShardJob) -> None:
        """Prepare one shard unless it is there; see the module's docstring."""
        final = self._store / job.key
        if final.exists():
            return
        temporary = self._store / f".{job.key}.{uuid.uuid4().hex[:8]}"
        temporary.mkdir(parents=True)
        try:
            self._write(job, temporary)
            try:
                temporary.rename(final)
            except OSError:
                if not final.exists():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _write(self, job: ShardJob, folder: Path) -> None:
        data = self._experiment.data
        index: list[dict[str, Any]] = []
        refused: list[Quarantined] = []
        over_long = dict.fromkeys(SPLITS, 0)
        with ExitStack() as stack:
            writers = {
                split: stack.enter_context(RowWriter(folder / f"{split}.arrow")) for split in SPLITS
            }
            for entry, split in self._rows(data.sources[job.source], job.shard):
                if isinstance(entry, Quarantined):
                    refused.append(Quarantined(entry.origin, entry.reason, split))
                    continue
                row = self._encode(entry, split, data, refused, over_long)
                if row is None:
                    continue
                columns, encoded = row
                index.append(_index_row(entry, split, job.key, writers[split].num_rows, encoded))
                writers[split].add(columns)
        write_index(folder / "index.parquet", index)
        summary = {"quarantined": [asdict(entry) for entry in refused], "over_long": over_long}
        write_json(folder / "summary.json", summary)

    def _rows(self, source: Source, shard: Shard) -> Iterator[tuple[Sample | Quarantined, Split]]:
        data = self._experiment.data
        for entry in SOURCES[source.type].read_shard(source, shard, data.image_limits):
            if source.split != "auto":
                yield entry, source.split
            elif isinstance(entry, Quarantined):
                yield entry, "train"
            else:
                yield entry, split_of(entry.group_id, data.split, self._experiment.seed)

    def _encode(
        self,
        sample: Sample,
        split: Split,
        data: DataConfig,
        refused: list[Quarantined],
        over_long: dict[Split, int],
    ) -> tuple[dict[str, Any], Encoded] | None:
        try:
            images = [decode(image, data.image_limits) for image in sample.images]
            if split == "train":
                encoded = self._encoder.training(sample.messages, images)
            else:
                encoded = self._encoder.prompt(sample.messages[:-1], images)
        except DataError as error:
            refused.append(Quarantined(sample.origin, error.message, split))
            return None
        if len(encoded.input_ids) > data.max_length:
            if data.over_long == "error":
                raise DataError(
                    f"{sample.origin}: {len(encoded.input_ids)} tokens, more than "
                    f"data.max_length={data.max_length} (data.over_long=error)"
                )
            over_long[split] += 1
            return None
        keep_picture = split == "report" and sample.images
        columns = {
            "sample_id": sample.sample_id,
            "group_id": sample.group_id,
            "prompt": _prompt_text(sample),
            "reference": sample.answer,
            "thumbnail": thumbnail(sample.images[0], data.image_limits, THUMBNAIL_SIDE)
            if keep_picture
            else None,
            **encoded_to_row(encoded),
        }
        return columns, encoded


def _index_row(
    sample: Sample, split: Split, key: str, row: int, encoded: Encoded
) -> dict[str, Any]:
    return {
        "split": split,
        "shard": key,
        "row": row,
        "sample_id": sample.sample_id,
        "group_id": sample.group_id,
        "origin": sample.origin,
        "length": len(encoded.input_ids),
        "num_labelled": encoded.num_labelled,
        "num_images": len(sample.images),
    }


def _prompt_text(sample: Sample) -> str:
    """The last user turn's text: what the report shows as the question."""
    for message in reversed(sample.messages[:-1]):
        if message["role"] == "user":
            return "".join(part.get("text") or "" for part in message["content"])
    return ""
