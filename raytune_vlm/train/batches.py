"""A run's micro-batches, and how they become smaller where memory does not suffice for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from raytune_vlm.collate.batch import PixelTable
from raytune_vlm.collate.features import Features
from raytune_vlm.collate.packed import SEGMENTS
from raytune_vlm.collate.pixels import PixelMaker
from raytune_vlm.collate.positions import with_positions
from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.errors import TrialInfeasible
from raytune_vlm.models.loading import Base
from raytune_vlm.prepare.blank import blank_sample
from raytune_vlm.prepare.feed import Arrays, CachedFeed, Collation, Feed, MicroBatch
from raytune_vlm.prepare.plan import Plan, plan_spec
from raytune_vlm.prepare.store import PreparedSplit
from raytune_vlm.prepare.stream import (
    Augmenting,
    Decoding,
    DecodingFeed,
    StreamSource,
    stored_blocks,
    streamed_blocks,
)
from raytune_vlm.records import read_json, write_json
from raytune_vlm.train.world import World

NAMED_SAMPLES = 5
"""So many samples of a batch are named where something is wrong with it."""


@dataclass(frozen=True)
class TrainingData:
    """The prepared data as a run needs to know it."""

    digest: str
    store: str = ""
    index_file: str = ""
    tier: Literal["pixels", "encoded"] = "pixels"


@dataclass(frozen=True)
class MicroBatchLimit:
    """What stands in for `train.micro_batch_size` and `train.micro_batch_tokens`."""

    size: int
    tokens: int | None

    def __str__(self) -> str:
        return f"{self.size}" if self.tokens is None else f"{self.size} of {self.tokens} tokens"


class Batches:
    """This rank's micro-batches of every step of the plan.

    Parameters
    ----------
    sharded
        Whether a pass over text alone gets a blank image beside it (`prepare.blank`).
    limit_file
        Where a limit is kept that a life of this trial before this one found; None: nowhere.
    features
        What stands in for pixels; None: pixels.
    """

    def __init__(
        self,
        base: Base,
        split: PreparedSplit,
        experiment: ExperimentConfig,
        world: World,
        data: TrainingData,
        *,
        sharded: bool,
        limit_file: Path | None = None,
        features: Features | None = None,
    ) -> None:
        train = experiment.train
        self._base, self._split, self._experiment = base, split, experiment
        self._world, self._data, self._limit_file = world, data, limit_file
        self._features = features
        self.plan = Plan(
            split.lengths, split.sources, plan_spec(experiment), data_digest=data.digest
        )
        self.collation = Collation(
            model_type=base.family.model_type,
            pad_token_id=base.processor.tokenizer.pad_token_id,
            micro_batch_size=train.micro_batch_size,
            micro_batch_tokens=train.micro_batch_tokens,
            rank=world.rank,
            world_size=world.size,
            packed=train.pack_tokens is not None,
            pad_to=train.pad_to_tokens or 0,
            blank=blank_sample(base, split) if sharded else None,
        )
        self._pixels = PixelTable(
            base.processor.image_processor, base.family, world.device, backend=base.image_backend
        )
        self._feed = self._made()
        known = None
        if limit_file is not None and world.rank == 0 and limit_file.exists():
            known = MicroBatchLimit(**read_json(limit_file))
        known = world.broadcast(known)
        if known is not None:
            self.lower(known)

    def step(self, number: int) -> list[MicroBatch]:
        """This rank's micro-batches of optimizer step `number`; see `Feed.step`."""
        return self._feed.step(number)

    def on_device(self, arrays: Arrays, rows: Sequence[int]) -> tuple[dict[str, Any], torch.Tensor]:
        """What the model takes, pixels as floats or their features, and the labels.

        Parameters
        ----------
        rows
            The samples that the arrays were made of, in their order.
        """
        return self._inputs(arrays, rows, self._features)

    def with_pixels(self, arrays: Arrays, rows: Sequence[int]) -> dict[str, Any]:
        """What the model takes, with pixels also where features stand in for them."""
        return self._inputs(arrays, rows, None)[0]

    def for_teacher(
        self, batch: dict[str, Any], micro_batch: MicroBatch, features: Features | None
    ) -> dict[str, Any]:
        """What a teacher takes where `batch` is what the student takes; `features` are its own."""
        if features is None and self._features is None:
            return batch
        return self._inputs(micro_batch.arrays, micro_batch.rows, features)[0]

    def _inputs(
        self, arrays: Arrays, rows: Sequence[int], features: Features | None
    ) -> tuple[dict[str, Any], torch.Tensor]:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        batch = {name: tensor.to(self._world.device) for name, tensor in tensors.items()}
        labels = batch.pop("labels")
        if features is not None:
            batch = features.replace(batch, self._split, rows)
        batch = self._pixels(batch)
        if SEGMENTS in batch:
            batch = with_positions(self._base.model, batch, self._base.family)
        # A cache costs memory, and hides from transformers that a row is packed.
        return {**batch, "use_cache": False}, labels

    def named(self, rows: np.ndarray) -> str:
        """Samples by their ids, a few of them, where something is wrong with a batch."""
        ids = [self._split.sample_ids[row] for row in rows[:NAMED_SAMPLES]]
        return ", ".join(ids) + (
            f" and {len(rows) - len(ids)} more" if len(rows) > len(ids) else ""
        )

    def close(self) -> None:
        """Let go of whatever runs ahead."""
        self._feed.close()

    @property
    def limit(self) -> MicroBatchLimit:
        """The one in force."""
        return MicroBatchLimit(self.collation.micro_batch_size, self.collation.micro_batch_tokens)

    @property
    def lowered_as_json(self) -> dict[str, Any] | None:
        """The one in force, if it is not the recipe's own."""
        train = self._experiment.train
        own = MicroBatchLimit(train.micro_batch_size, train.micro_batch_tokens)
        return None if self.limit == own else asdict(self.limit)

    def lower(self, limit: MicroBatchLimit) -> None:
        """Go on with a limit, or with the own where that is lower."""
        tokens = [entry.tokens for entry in (self.limit, limit) if entry.tokens is not None]
        lowest = MicroBatchLimit(min(self.limit.size, limit.size), min(tokens, default=None))
        if lowest == self.limit:
            return
        self.collation = replace(
            self.collation, micro_batch_size=lowest.size, micro_batch_tokens=lowest.tokens
        )
        self._feed.close()
        self._feed = self._made()

    def halved(self, number: int) -> MicroBatchLimit:
        """Half of what the largest micro-batch of a step holds, on whichever rank that is.

        Raises
        ------
        TrialInfeasible
            If that is a single row.
        """
        most = self.collation.largest(self.plan, self._split.lengths, number)
        if most == 1:
            raise TrialInfeasible(
                f"out of memory at step {number + 1} with a single row in a forward pass; lower "
                "data.max_length or the image limits, or set train.activation_checkpointing"
            )
        tokens = self.limit.tokens
        return MicroBatchLimit(most // 2, None if tokens is None else max(1, tokens // 2))

    def remember(self, limit: MicroBatchLimit) -> None:
        """Keep a limit for the next life of this trial."""
        if self._limit_file is not None:
            write_json(self._limit_file, limit)

    def _made(self) -> Feed:
        if self._data.tier == "pixels":
            return CachedFeed(self._split, self.plan, self.collation)
        return self._decoding()

    def _decoding(self) -> DecodingFeed:
        """The feed of the `encoded` tier."""
        config, base, split = self._experiment.data, self._base, self._split
        train, data = self._experiment.train, self._data
        if config.consumption == "streaming":
            source = StreamSource(
                data.store, data.index_file, self.plan.spec, data.digest, self.collation
            )
            blocks = streamed_blocks(source, split, train.max_steps)
        else:
            blocks = stored_blocks(split, self.plan, self.collation, train.max_steps)
        changing = None
        if config.augmentation is not None:
            changing = Augmenting(config.augmentation, self._experiment.seed, split.sample_ids)
        maker = PixelMaker(
            base.processor.image_processor, base.family, base.image_backend, config.image_limits
        )
        return DecodingFeed(
            blocks,
            Decoding(self.collation, maker, changing),
            self.plan,
            split.lengths,
            num_threads=config.decode_threads or max(1, int(train.cpus_per_worker)),
            stall_timeout_s=config.stall_timeout_s,
        )
