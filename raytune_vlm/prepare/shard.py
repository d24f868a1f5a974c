"""One shard of a source, read, checked, encoded and written: what a Ray Data worker does.

Two steps, each a folder named by the digest of everything that its content depends on, written
under a temporary name and renamed when it is whole; one that is there is never made again.

- `TokenStep`: every row read, its images decoded once as a check, its tokens and labels made. What
  is bad is quarantined here, so that training never meets it.
- `PixelStep`: the pixels of the rows that the first step kept; only where the disk has room.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from raytune_vlm.collate.encoded import Encoded
from raytune_vlm.config.data import DataConfig, SplitConfig
from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.sources import Source
from raytune_vlm.errors import DataError, ModelError
from raytune_vlm.images import decode
from raytune_vlm.models.families import FAMILIES, Family
from raytune_vlm.models.image_backends import image_backend
from raytune_vlm.models.loading import load_processor
from raytune_vlm.models.location import check_model
from raytune_vlm.prepare.likeness import picture_hash, words_id
from raytune_vlm.prepare.store import (
    PIXEL_SCHEMA,
    ROW_SCHEMA,
    RowWriter,
    encoded_to_row,
    pixel_folder,
    tensor_entries,
    write_index,
)
from raytune_vlm.records import SPLITS, Quarantined, Sample, Split, write_json
from raytune_vlm.sources import SOURCES
from raytune_vlm.sources.base import Shard, shorten
from raytune_vlm.sources.files import noted_images


@dataclass(frozen=True)
class ShardJob:
    """A shard to prepare: where it comes from and the key of its folder."""

    source: int
    shard: Shard
    key: str
    base: str
    """The digest of everything but the image files that rows name."""


def split_of(group_id: str, config: SplitConfig, seed: int) -> Split:
    """The split of a group: a pure function of its id, so that a group is never divided."""
    digest = hashlib.sha256(f"{seed}/{group_id}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < config.report:
        return "report"
    return "select" if share < config.report + config.select else "train"


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that becomes `final` when the block ends well, and else disappears."""
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            temporary.rename(final)
        except OSError:
            if not final.exists():  # else somebody else made it meanwhile
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


_UNFINISHED = re.compile(r"\.[0-9a-f]{16}(\.pixels)?\.[0-9a-f]{8}")
"""The names that `whole_folder` gives to the temporary folders of shards."""

UNFINISHED_S = 24 * 3600.0
"""So long after the last write to it, nobody is at work in a temporary folder any more."""


def remove_unfinished(store: Path) -> None:
    """Remove the temporary folders that killed preparations left behind."""
    for folder in store.iterdir():
        if _UNFINISHED.fullmatch(folder.name) is None or not folder.is_dir():
            continue
        try:
            newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
        except FileNotFoundError:
            continue  # somebody is at work in it
        if newest < time.time() - UNFINISHED_S:
            shutil.rmtree(folder, ignore_errors=True)  # somebody else may do so at the same time


class Preparer:
    """What both steps need, loaded once a worker process."""

    def __init__(self, experiment: ExperimentConfig, store: Path) -> None:
        import torch

        torch.set_num_threads(1)
        self.experiment, self.store = experiment, store
        self.family: Family = FAMILIES[check_model(experiment.model).model_type]
        self.processor = load_processor(experiment.model)
        self.backend = image_backend(experiment.model, self.processor.image_processor)


@dataclass
class _Outcome:
    """What a shard's rows came to, beside the rows themselves."""

    index: list[dict[str, Any]] = field(default_factory=list)
    refused: list[Quarantined] = field(default_factory=list)
    over_long: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))


@dataclass(frozen=True)
class _Cut:
    """An encoded sample of at most `data.max_length` tokens."""

    encoded: Encoded
    truncated: bool
    picture_hashes: list[int]


class TokenStep:
    """Source rows -> token ids, labels, encoded images, and an index of them."""

    def __init__(self, preparer: Preparer) -> None:
        from raytune_vlm.collate.encode import Encoder

        self._experiment, self._store = preparer.experiment, preparer.store
        self._encoder = Encoder(
            preparer.processor, preparer.family, preparer.backend, sizes_only=True
        )

    @staticmethod
    def folder(store: Path, job: ShardJob) -> Path:
        """Where the result of a job lies."""
        return store / job.key

    def __call__(self, job: ShardJob) -> None:
        """Prepare one shard unless it is there."""
        final = self.folder(self._store, job)
        if final.exists():
            return
        outcome = _Outcome()
        with whole_folder(final) as folder, ExitStack() as stack:
            images = stack.enter_context(noted_images())
            writers = {
                split: stack.enter_context(RowWriter(folder / f"{split}.arrow", ROW_SCHEMA))
                for split in SPLITS
            }
            for entry, split in self._rows(job):
                if isinstance(entry, Quarantined):
                    self._refuse(entry.origin, entry.reason, split, outcome)
                else:
                    self._add(entry, split, job, writers[split], outcome)
            write_index(folder / "index.arrow", outcome.index)
            if images:
                # Before the rename: a note without its folder only makes the folder be made.
                noted = {name: list(state) for name, state in images.items()}
                write_json(
                    self._store / f"{job.base}.images.json", {"key": job.key, "images": noted}
                )
            refused = [asdict(entry) for entry in outcome.refused]
            write_json(
                folder / "summary.json", {"quarantined": refused, "over_long": outcome.over_long}
            )

    def _rows(self, job: ShardJob) -> Iterator[tuple[Sample | Quarantined, Split]]:
        data = self._experiment.data
        source: Source = data.sources[job.source]
        for entry in SOURCES[source.type].read_shard(source, job.shard, data.image_limits):
            if source.split != "auto":
                yield entry, source.split
            elif isinstance(entry, Quarantined):
                yield entry, "train"
            else:
                yield entry, split_of(entry.group_id, data.split, self._experiment.seed)

    def _encoded(self, sample: Sample, split: Split, outcome: _Outcome) -> _Cut | None:
        """The encoded sample, cut if that is allowed; None where it was refused or dropped."""
        data = self._experiment.data
        try:
            images = [decode(image, data.image_limits) for image in sample.images]
            if split == "train":
                encoded = self._encoder.training(sample.messages, images, sample.tools)
            else:
                encoded = self._encoder.prompt(sample.messages[:-1], images, sample.tools)
        except ModelError:
            raise
        except DataError as error:
            self._refuse(sample.origin, error.message, split, outcome)
            return None
        except (MemoryError, OSError):  # the machine's fault, not the row's
            raise
        except Exception as error:  # processors raise what they like: an odd size, a bad token
            reason = f"the processor refuses it: {shorten(error, 160)}"
            self._refuse(sample.origin, reason, split, outcome)
            return None
        length = len(encoded.input_ids)
        hashes = [found for image in images if (found := picture_hash(image)) is not None]
        if length <= data.max_length:
            return _Cut(encoded, truncated=False, picture_hashes=hashes)
        shorter = self._too_long(sample, length, data) and split == "train"
        cut = self._encoder.truncated(encoded, data.max_length) if shorter else None
        if cut is None:
            outcome.over_long[split] += 1
            return None
        return _Cut(cut, truncated=True, picture_hashes=hashes)

    def _add(
        self, sample: Sample, split: Split, job: ShardJob, writer: RowWriter, outcome: _Outcome
    ) -> None:
        """Write a sample's row and its entry of the index, or count why there is none."""
        from raytune_vlm.collate.pixels import PIXEL_NAMES

        found = self._encoded(sample, split, outcome)
        if found is None:
            return
        encoded = found.encoded
        pixels = [encoded.tensors.pop(name) for name in PIXEL_NAMES if name in encoded.tensors]
        outcome.index.append(
            {
                "split": split,
                "shard": job.key,
                "row": writer.num_rows,
                "source": job.source,
                "sample_id": sample.sample_id,
                "group_id": sample.group_id,
                "images_id": _images_id(sample),
                "picture_hashes": found.picture_hashes,
                "words_id": words_id(_prompt_text(sample), sample.answer),
                "origin": sample.origin,
                "length": len(encoded.input_ids),
                "num_labelled": encoded.num_labelled,
                "num_media": self._encoder.num_media(encoded),
                "num_images": len(sample.images),
                "num_bytes": encoded.input_ids.nbytes + sum(map(len, sample.images)),
                "num_pixel_bytes": sum(array.nbytes for array in pixels),
                "truncated": found.truncated,
            }
        )
        writer.add(
            {
                "sample_id": sample.sample_id,
                "group_id": sample.group_id,
                "prompt": _prompt_text(sample),
                "reference": sample.answer,
                "conversation": None if split == "train" else _conversation(sample),
                "images": sample.images,
                **encoded_to_row(encoded),
            }
        )

    @staticmethod
    def _refuse(origin: str, reason: str, split: Split, outcome: _Outcome) -> None:
        outcome.refused.append(Quarantined(origin, reason, split))

    @staticmethod
    def _too_long(sample: Sample, length: int, data: DataConfig) -> bool:
        """Whether an over-long sample shall be cut; raises DataError where it shall not be."""
        if data.over_long == "error":
            raise DataError(
                f"{sample.origin}: {length} tokens, more than "
                f"data.max_length={data.max_length} (data.over_long=error)"
            )
        return data.over_long == "truncate"


class PixelStep:
    """The rows of a token step -> their pixels."""

    def __init__(self, preparer: Preparer) -> None:
        from raytune_vlm.collate.pixels import PixelMaker

        self._store = preparer.store
        self._maker = PixelMaker(
            preparer.processor.image_processor,
            preparer.family,
            preparer.backend,
            preparer.experiment.data.image_limits,
        )

    @staticmethod
    def folder(store: Path, job: ShardJob) -> Path:
        """Where the result of a job lies."""
        return store / pixel_folder(job.key)

    def __call__(self, job: ShardJob) -> None:
        """Make one shard's pixels unless they are there."""
        final = self.folder(self._store, job)
        if final.exists():
            return
        with whole_folder(final) as folder:
            for split in SPLITS:
                with RowWriter(folder / f"{split}.arrow", PIXEL_SCHEMA) as writer:
                    for images in self._images(self._store / job.key / f"{split}.arrow"):
                        writer.add({"tensors": tensor_entries(self._maker.decode(images))})

    @staticmethod
    def _images(file: Path) -> Iterator[list[bytes]]:
        reader = pa.ipc.open_file(pa.memory_map(str(file)))
        for number in range(reader.num_record_batches):
            column = reader.get_batch(number).column("images")
            for place in range(len(column)):
                yield column[place].as_py()


def _images_id(sample: Sample) -> str:
    """A hash of the images alone: the same pictures with another text are an overlap too."""
    if not sample.images:
        return ""
    digest = hashlib.sha256()
    for image in sample.images:
        digest.update(hashlib.sha256(image).digest())
    return digest.hexdigest()[:16]


def _conversation(sample: Sample) -> str:
    """What a prompt is encoded from, beside its images, as JSON that ASCII holds."""
    return json.dumps({"messages": sample.messages[:-1], "tools": sample.tools})


def _prompt_text(sample: Sample) -> str:
    """The last user turn's text: what the report shows as the question."""
    for message in reversed(sample.messages[:-1]):
        if message["role"] == "user":
            return "".join(part.get("text") or "" for part in message["content"])
    return ""
