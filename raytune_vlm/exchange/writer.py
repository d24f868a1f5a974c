"""Samples to a folder in the format of another trainer, by split, images as files beside the rows.

The samples are those that `prepare` would keep before it asks the model: bad rows, pictures that do
not decode and copies within `select` and `report` are left out, `split: auto` is divided by group.
What depends on the model (`data.max_length`) and what draws anew in training (augmentation, the
weights of a mixture) is not applied.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from raytune_vlm.config import ExperimentConfig
from raytune_vlm.errors import DataError
from raytune_vlm.exchange.formats import FORMATS, Format, joins
from raytune_vlm.images import file_suffix
from raytune_vlm.inspection.rows import Row
from raytune_vlm.models.export import new_folder
from raytune_vlm.prepare.shard import split_of
from raytune_vlm.prepare.statistics import refuse_bad
from raytune_vlm.records import SPLITS, Quarantined, Sample


@dataclass
class Written:
    """What an export holds, and what it does not."""

    rows: Counter[str] = field(default_factory=Counter)
    """Split -> rows."""
    num_images: int = 0
    """Image files; those that are the same in a split are one."""
    num_joined: int = 0
    """Samples with neighbouring texts in a turn, which are one text now."""
    num_copies: int = 0
    """Exact copies left out of `train` (`data.deduplicate`)."""
    quarantine: list[Quarantined] = field(default_factory=list)


def write_samples(
    experiment: ExperimentConfig, rows: Iterable[Row], name: str, output: Path
) -> Written:
    """Write the rows of an experiment (`inspection.rows.read_rows`) to a new folder.

    Raises
    ------
    ConfigError
        If there is something at `output` already.
    DataError
        If the format `name` cannot say what a sample holds, or more samples are bad than
        `data.max_bad_fraction` allows. Then nothing is left behind.
    """
    output = output.resolve()
    with new_folder(output) as folder:
        writer = _Writer(experiment, FORMATS[name], folder)
        with writer.files:
            for row in rows:
                writer.add(row)
        written = writer.written
        refuse_bad(experiment, written.rows.total() + written.num_copies, written.quarantine)
        if writer.format.index is not None:
            writer.format.index(folder, output, [name for name in SPLITS if written.rows[name]])
    return written


class _Writer:
    """The open files of an export and its account."""

    def __init__(self, experiment: ExperimentConfig, form: Format, folder: Path) -> None:
        self.experiment, self.format, self.folder = experiment, form, folder
        self.written, self.files = Written(), ExitStack()
        self._streams: dict[str, TextIO] = {}
        self._seen: dict[tuple[str, str], str] = {}

    def add(self, row: Row) -> None:
        if isinstance(row, Quarantined):
            self.written.quarantine.append(row)
            return
        data, sample = self.experiment.data, row.sample
        split = row.split
        if split == "auto":
            split = split_of(sample.group_id, data.split, self.experiment.seed)
        first = self._seen.setdefault((split, sample.sample_id), sample.origin)
        if first != sample.origin and split != "train":
            reason = f"exact duplicate of {first}"
            self.written.quarantine.append(Quarantined(sample.origin, reason, split))
        elif first != sample.origin and data.deduplicate:
            self.written.num_copies += 1
        else:
            self._write(sample, split)

    def _write(self, sample: Sample, split: str) -> None:
        file = self.folder / self.format.rows_file.format(split=split)
        stream = self._streams.get(split)
        if stream is None:
            (file.parent / "images").mkdir(parents=True, exist_ok=True)
            stream = self.files.enter_context(file.open("w", encoding="utf-8"))
            self._streams[split] = stream
        names = [self._image(image, file.parent) for image in sample.images]
        try:
            row = self.format.row(sample, names)
        except DataError as error:
            raise DataError(f"{sample.origin}: {error.message}") from error
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.written.rows[split] += 1
        self.written.num_joined += self.format.joins_texts and joins(sample)

    def _image(self, data: bytes, folder: Path) -> str:
        """The name of an image file with these very bytes, written unless it is there."""
        name = f"images/{hashlib.sha256(data).hexdigest()[:32]}{file_suffix(data)}"
        file = folder / name
        if not file.exists():
            file.write_bytes(data)
            self.written.num_images += 1
        return name
