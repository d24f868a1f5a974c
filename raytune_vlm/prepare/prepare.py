"""`prepare`: every source read, checked and encoded once, by Ray Data, one task a shard.

What comes out is content-addressed: run again with nothing changed, nothing is done; one changed
shard redoes one shard; interrupted, it goes on.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from raytune_vlm.config.experiment import ExperimentConfig, digest_of
from raytune_vlm.errors import DataError
from raytune_vlm.models.loading import model_fingerprint
from raytune_vlm.prepare.shard import ShardJob, ShardPreparer
from raytune_vlm.prepare.store import PreparedSplit, open_split, read_index, write_index
from raytune_vlm.records import (
    SPLITS,
    DataManifest,
    Quarantined,
    SplitStatistics,
    read_json,
    write_json,
)
from raytune_vlm.sources import SOURCES, Shard

FORMAT = 1
"""Version of the store's format; a change of it makes every shard anew."""

ProgressFunction = Callable[[int, int], None]
"""Called with the number of shards done and the number of all shards."""


@dataclass(frozen=True)
class PreparedData:
    """A manifest and the files it speaks of."""

    manifest: DataManifest
    index_file: Path
    quarantine: list[Quarantined]

    def split(self, name: str) -> PreparedSplit:
        """The samples of a split."""
        return open_split(self.manifest.store, self.index_file, name)


def list_shards(experiment: ExperimentConfig) -> list[ShardJob]:
    """Every shard of every source, with the key of its prepared folder; cheap, on the driver.

    Raises
    ------
    DataError
        If a source's path is missing, leaves `data.root`, or needs the network.
    """
    data = experiment.data
    shared = {
        "format": FORMAT,
        "model": model_fingerprint(experiment.model),
        "limits": data.image_limits.model_dump(),
        "max_length": data.max_length,
        "over_long": data.over_long,
        "transformers": version("transformers"),
        "pillow": version("pillow"),
    }
    jobs = []
    for number, source in enumerate(data.sources):
        own = {**shared, "source": source.model_dump(mode="json")}
        if source.split == "auto":
            own |= {"split": data.split.model_dump(), "seed": experiment.seed}
        reader = SOURCES[source.type]
        for shard in reader.list_shards(source, Path(data.root), data.allow_network):
            key = digest_of({**own, "shard": asdict(shard), "files": _state_of(shard)})
            jobs.append(ShardJob(source=number, shard=shard, key=key))
    return jobs


def _state_of(shard: Shard) -> list[tuple[str, int, int]]:
    """Name, size and time of change of a shard's own files, so that a changed one is made anew.

    Image files that rows refer to are not looked at one by one: whoever replaces one under its old
    name has to touch the shard.
    """
    path = Path(shard.path)
    if path.is_file():
        files = [path]
    else:
        files = sorted(file for stem in shard.members for file in path.glob(f"*/{stem}.*"))
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def prepare(
    experiment: ExperimentConfig, jobs: list[ShardJob], progress: ProgressFunction
) -> PreparedData:
    """Prepare the shards that are not there and judge the whole.

    Ray must be initialised.

    Raises
    ------
    DataError
        If more than `data.max_bad_fraction` of the samples are bad, or there is nothing to train
        on. The prepared shards stay; no manifest is written.
    """
    began = time.monotonic()
    store = (Path(experiment.storage_path) / "prepared").resolve()
    store.mkdir(parents=True, exist_ok=True)
    missing = [job for job in jobs if not (store / job.key).exists()]
    if missing:
        _run(experiment, store, missing, progress, len(jobs))
    else:
        progress(len(jobs), len(jobs))
    digest = digest_of([job.key for job in jobs])
    index_file = store / f"{digest}.index.parquet"
    index, quarantine, over_long = _gather(store, jobs)
    _refuse_bad(experiment, len(index) + sum(over_long.values()), quarantine)
    if not any(row["split"] == "train" for row in index):
        where = ", ".join(source.path for source in experiment.data.sources)
        raise DataError(f"data.sources: no training samples in {where}")
    manifest = DataManifest(
        digest=digest,
        store=str(store),
        splits={name: _statistics(name, index, quarantine, over_long) for name in SPLITS},
        quarantine_reasons=dict(Counter(entry.reason for entry in quarantine).most_common()),
        overlap=_overlap(index),
        seconds=time.monotonic() - began,
    )
    write_index(index_file, index)
    write_json(store / f"{digest}.manifest.json", manifest)
    return PreparedData(manifest, index_file, quarantine)


def _run(
    experiment: ExperimentConfig,
    store: Path,
    missing: list[ShardJob],
    progress: ProgressFunction,
    total: int,
) -> None:
    import ray

    context = ray.data.DataContext.get_current()
    # After the first use of ray.data, which sets its own level.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    workers = max(1, min(len(missing), int(ray.cluster_resources().get("CPU", 1)) - 1))

    def prepare_shards(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        preparer = _preparer(experiment.model_dump_json(), str(store))
        for number in batch["id"]:
            preparer(missing[int(number)])
        return batch

    done = total - len(missing)
    progress(done, total)
    dataset = ray.data.range(len(missing), override_num_blocks=len(missing)).map_batches(
        prepare_shards, batch_size=1, compute=ray.data.TaskPoolStrategy(size=workers)
    )
    try:
        for _ in dataset.iter_batches(batch_size=1, prefetch_batches=0):
            done += 1
            progress(done, total)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DataError):
            raise error.cause from None
        raise


@functools.lru_cache(maxsize=2)
def _preparer(experiment: str, store: str) -> ShardPreparer:
    """One a worker process, so that the processor is loaded once, not once a shard."""
    return ShardPreparer(ExperimentConfig.model_validate_json(experiment), Path(store))


def _gather(
    store: Path, jobs: list[ShardJob]
) -> tuple[list[dict[str, Any]], list[Quarantined], dict[str, int]]:
    """Index rows in the order of the sources, refused samples, and over-long ones by split.

    A sample that stands twice in `select` or `report` would count twice in a score, so its
    second copy is quarantined; training data is left as it is.
    """
    index: list[dict[str, Any]] = []
    quarantine: list[Quarantined] = []
    over_long: dict[str, int] = dict.fromkeys(SPLITS, 0)
    first: dict[tuple[str, str], str] = {}
    for job in jobs:
        folder = store / job.key
        summary = read_json(folder / "summary.json")
        quarantine += [Quarantined(**entry) for entry in summary["quarantined"]]
        for split, count in summary["over_long"].items():
            over_long[split] += count
        for row in read_index(folder / "index.parquet"):
            name = (row["split"], row["sample_id"])
            if row["split"] != "train" and name in first:
                reason = f"exact duplicate of {first[name]}"
                quarantine.append(Quarantined(row["origin"], reason, row["split"]))
                continue
            first[name] = row["origin"]
            index.append(row)
    return index, quarantine, over_long


def _refuse_bad(experiment: ExperimentConfig, good: int, quarantine: list[Quarantined]) -> None:
    seen, bad = good + len(quarantine), len(quarantine)
    allowed = experiment.data.max_bad_fraction
    if seen == 0:
        where = ", ".join(source.path for source in experiment.data.sources)
        raise DataError(f"data.sources: no samples in {where}")
    if bad <= allowed * seen:
        return
    by_reason: dict[str, list[str]] = {}
    for entry in quarantine:
        by_reason.setdefault(entry.reason, []).append(entry.origin)
    worst = sorted(by_reason.items(), key=lambda item: -len(item[1]))[:10]
    listed = "; ".join(
        f"{origins[0]}: {reason}" + (f" (and {len(origins) - 1} more)" if len(origins) > 1 else "")
        for reason, origins in worst
    )
    raise DataError(
        f"{bad} of {seen} samples cannot be used, more than "
        f"data.max_bad_fraction={allowed:g} allows: {listed}"
    )


def _statistics(
    name: str,
    index: list[dict[str, Any]],
    quarantine: list[Quarantined],
    over_long: dict[str, int],
) -> SplitStatistics:
    rows = [row for row in index if row["split"] == name]
    refused = sum(entry.split == name for entry in quarantine)
    lengths = [row["length"] for row in rows]
    return SplitStatistics(
        num_seen=len(rows) + refused + over_long[name],
        num_used=len(rows),
        num_quarantined=refused,
        num_dropped_over_long=over_long[name],
        num_groups=len({row["group_id"] for row in rows}),
        num_images=sum(row["num_images"] for row in rows),
        max_length=max(lengths, default=0),
        mean_length=float(np.mean(lengths)) if rows else 0.0,
        mean_labelled=float(np.mean([row["num_labelled"] for row in rows])) if rows else 0.0,
    )


def _overlap(index: list[dict[str, Any]]) -> dict[str, int]:
    """Groups that stand in two splits, by pair of splits; pairs without any are left out."""
    groups = {name: {row["group_id"] for row in index if row["split"] == name} for name in SPLITS}
    shared = {
        f"{first}/{second}": len(groups[first] & groups[second])
        for place, first in enumerate(SPLITS)
        for second in SPLITS[place + 1 :]
    }
    return {pair: count for pair, count in shared.items() if count}


def write_quarantine(file: Path, quarantine: list[Quarantined]) -> None:
    """`quarantine.jsonl`: every refused sample, one JSON object a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(entry), ensure_ascii=False) for entry in quarantine]
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
