"""The rows of an experiment, one at a time: read, decoded, encoded, or quarantined with a reason.

As `prepare` does it, but in this process, without Ray and without writing anything: one row is held
at a time. Samples of a source whose split is `select` or `report` are encoded as the prompt that is
to be answered; all others, those of `split: auto` too, as training samples with labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from raytune_vlm.config import ExperimentConfig
from raytune_vlm.config.data import DataConfig
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.errors import DataError, RaytuneVlmError
from raytune_vlm.images import decode
from raytune_vlm.inspection.text import line
from raytune_vlm.models.image_backends import image_backend
from raytune_vlm.models.loading import load_processor
from raytune_vlm.models.location import check_model
from raytune_vlm.records import Quarantined, Sample
from raytune_vlm.sources import SOURCES, Shard

if TYPE_CHECKING:
    from raytune_vlm.collate.encode import Encoder
    from raytune_vlm.collate.encoded import Encoded

PROMPT_SPLITS = ("select", "report")
"""Splits whose samples the model answers; on the others it is trained."""


@dataclass(frozen=True)
class Checked:
    """A sample that can be used."""

    sample: Sample
    split: str
    """`auto`, or the split that the source names."""
    sizes: tuple[tuple[int, int], ...]
    """Width and height of each upright image."""
    encoded: Encoded | None
    """None where tokens are not asked for."""

    @property
    def is_prompt(self) -> bool:
        """Whether the model answers this sample rather than trains on it."""
        return self.split in PROMPT_SPLITS


Row = Checked | Quarantined
Progress = Callable[[int, int], None]
"""Called with the number of shards that are done, and of all."""


def open_encoder(config: ModelConfig, *, sizes_only: bool = False) -> Encoder:
    """The encoder of a model, as `prepare` and training have it; imports torch.

    `sizes_only`: token ids, labels and sizes are right, pixels blank; much faster.
    """
    family = check_model(config)
    from raytune_vlm.collate.encode import Encoder

    processor = load_processor(config)
    backend = image_backend(config, processor.image_processor)
    return Encoder(processor, family, backend, sizes_only=sizes_only)


def list_shards(experiment: ExperimentConfig) -> list[list[Shard]]:
    """The shards of each source, in order; raises DataError where a path is wrong."""
    data = experiment.data
    root = Path(data.root)
    return [
        SOURCES[source.type].list_shards(source, root, data.allow_network)
        for source in data.sources
    ]


def read_rows(
    experiment: ExperimentConfig, encoder: Encoder | None, progress: Progress
) -> Iterator[Row]:
    """Every row of the experiment's sources, in order. Raises DataError where a path is wrong."""
    data = experiment.data
    shards = list_shards(experiment)
    total, done = sum(map(len, shards)), 0
    for source, parts in zip(data.sources, shards, strict=True):
        for shard in parts:
            for entry in SOURCES[source.type].read_shard(source, shard, data.image_limits):
                yield (
                    entry
                    if isinstance(entry, Quarantined)
                    else _checked(entry, source.split, data, encoder)
                )
                progress(done, total)
            done += 1
            progress(done, total)


def _checked(sample: Sample, split: str, data: DataConfig, encoder: Encoder | None) -> Row:
    try:
        images = [decode(image, data.image_limits) for image in sample.images]
        encoded = None
        if encoder is not None and split in PROMPT_SPLITS:
            encoded = encoder.prompt(sample.messages[:-1], images, sample.tools)
        elif encoder is not None:
            encoded = encoder.training(sample.messages, images, sample.tools)
    except DataError as error:
        return Quarantined(sample.origin, error.message, split)
    except RaytuneVlmError:
        raise
    except Exception as error:  # processors refuse odd pictures with whatever they like
        reason = f"the processor refuses it: {line(error, 160)}"
        return Quarantined(sample.origin, reason, split)
    if encoded is not None and data.over_long == "error":
        length = len(encoded.input_ids)
        if length > data.max_length:
            reason = f"{length} tokens, more than data.max_length={data.max_length}"
            return Quarantined(sample.origin, f"{reason} (data.over_long=error)", split)
    return Checked(sample, split, tuple(image.size for image in images), encoded)
