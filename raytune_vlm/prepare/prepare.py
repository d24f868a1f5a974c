"""`prepare`: every source read, checked and encoded once, by Ray Data, one task a shard.

What comes out is content-addressed: run again with nothing changed, nothing is done; one changed
shard redoes one shard; interrupted, it goes on. First the tokens of all shards (the index follows),
then, where the disk budget allows it, their pixels.
"""

from __future__ import annotations

import functools
import glob
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raytune_vlm.config.experiment import ExperimentConfig, digest_of
from raytune_vlm.errors import DataError
from raytune_vlm.models.location import model_fingerprint
from raytune_vlm.prepare.overlap import count_overlaps, find_overlaps
from raytune_vlm.prepare.ray_data import quiet_ray_data
from raytune_vlm.prepare.shard import PixelStep, Preparer, ShardJob, TokenStep, remove_unfinished
from raytune_vlm.prepare.sizes import note_sizes, store_of
from raytune_vlm.prepare.statistics import (
    refuse_bad,
    split_statistics,
    without_duplicates,
)
from raytune_vlm.prepare.store import (
    PixelDecoder,
    PreparedSplit,
    open_split,
    pixel_folder,
    read_index,
    write_index_table,
)
from raytune_vlm.records import (
    SPLITS,
    DataManifest,
    Overlap,
    Quarantined,
    by_kind,
    read_json,
)
from raytune_vlm.sources import SOURCES, Shard

FORMAT = 6
"""Version of the store's format; a change of it makes every shard anew."""

VERSIONS = ("transformers", "tokenizers", "torch", "pillow", "simplejpeg")
"""Libraries whose version the prepared data depends on."""

FREE_SHARE = 0.8
"""Share of the free disk that pixels may take where `data.disk_budget_gb` does not say."""

ProgressFunction = Callable[[str, int, int], None]
"""Called with the name of the step, the number of shards done and the number of all shards."""


@dataclass(frozen=True)
class PreparedData:
    """A manifest and the files it speaks of."""

    manifest: DataManifest
    index_file: Path
    quarantine: list[Quarantined]
    overlaps: list[Overlap]

    def split(self, name: str, decode: PixelDecoder | None = None) -> PreparedSplit:
        """The samples of a split."""
        return open_split(self.manifest.store, self.index_file, name, decode)


def list_shards(experiment: ExperimentConfig) -> list[ShardJob]:
    """Every shard of every source, with the key of its prepared folder; cheap, on the driver.

    Raises
    ------
    DataError
        If a source's path is missing, leaves `data.root`, or needs the network.
    """
    data, store = experiment.data, store_of(experiment)
    shared = {
        "format": FORMAT,
        "model": model_fingerprint(experiment.model),
        "limits": data.image_limits.model_dump(),
        "max_length": data.max_length,
        "over_long": data.over_long,
        **{name: version(name) for name in VERSIONS},
    }
    jobs = []
    for number, source in enumerate(data.sources):
        own = {**shared, "source": source.model_dump(mode="json", exclude={"weight"})}
        if source.split == "auto":
            own |= {"split": data.split.model_dump(), "seed": experiment.seed}
        reader = SOURCES[source.type]
        for shard in reader.list_shards(source, Path(data.root), data.allow_network):
            base = digest_of({**own, "shard": asdict(shard), "files": _state_of(shard)})
            jobs.append(ShardJob(number, shard, key=_key_of(store, base), base=base))
    return jobs


def _state_of(shard: Shard) -> list[tuple[str, int, int]]:
    """Name, size and time of change of a shard's own files, where its digest does not tell."""
    if shard.digest:
        return []
    path = Path(shard.path)
    if path.is_file():
        files = [path]
    else:
        patterns = [f"*/{glob.escape(stem)}.*" for stem in shard.members]
        files = sorted(file for pattern in patterns for file in path.glob(pattern))
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _key_of(store: Path, base: str) -> str:
    """The key of a shard whose own files have the digest `base`.

    Rows name image files, and which ones is known only after reading: `<base>.images.json` says
    which were read for which key. If one of them changed, the key does.
    """
    file = store / f"{base}.images.json"
    if not file.exists():
        return base
    known = read_json(file)
    now = {name: _stamp(name) for name in known["images"]}
    return known["key"] if now == known["images"] else digest_of({"base": base, "images": now})


def _stamp(name: str) -> list[int]:
    try:
        state = Path(name).stat()
    except OSError:
        return []  # as `noted_images` notes a file that is not there
    return [state.st_size, state.st_mtime_ns]


def prepare(
    experiment: ExperimentConfig,
    jobs: list[ShardJob],
    progress: ProgressFunction,
    *,
    for_training: bool = True,
) -> PreparedData:
    """Prepare the shards that are not there and judge the whole.

    Ray must be initialised. Without `for_training` there need not be any training samples.

    Raises
    ------
    DataError
        If more than `data.max_bad_fraction` of the samples are bad, there is nothing to train on,
        or the pixels do not fit where `data.tier` wants them. The prepared shards stay; no
        manifest is written.
    """
    began = time.monotonic()
    store = store_of(experiment)
    store.mkdir(parents=True, exist_ok=True)
    remove_unfinished(store)
    _run("tokens", experiment, store, jobs, progress)
    digest = digest_of(
        {"shards": [job.key for job in jobs], "deduplicate": experiment.data.deduplicate}
    )
    index, quarantine, over_long = _gather(store, jobs)
    index, copies, removed = without_duplicates(index, in_training=experiment.data.deduplicate)
    quarantine += copies
    refuse_bad(experiment, len(index) + sum(over_long.values()) + removed, quarantine)
    if for_training and not pc.any(pc.equal(index["split"], "train")).as_py():
        where = ", ".join(source.path for source in experiment.data.sources)
        raise DataError(f"data.sources: no training samples in {where}")
    _check_weights(experiment, index)
    tier, reason = _tier(experiment, store, jobs, index)
    if tier == "pixels":
        _run("pixels", experiment, store, jobs, progress)
    index_file = store / f"{digest}.index.arrow"
    _write_whole(index_file, index)
    overlaps = find_overlaps(index, experiment.data.near_image_distance)
    overlap, overlap_kinds = count_overlaps(overlaps)
    manifest = DataManifest(
        digest=digest,
        store=str(store),
        splits={
            name: split_statistics(
                name,
                index,
                quarantine,
                num_over_long=over_long[name],
                num_duplicates=removed if name == "train" else 0,
            )
            for name in SPLITS
        },
        quarantine_reasons={first.reason: count for first, count in by_kind(quarantine)},
        overlap=overlap,
        overlap_kinds=overlap_kinds,
        seconds=time.monotonic() - began,
        tier=tier,
        tier_reason=reason,
    )
    note_sizes(experiment, manifest.splits)
    return PreparedData(manifest, index_file, quarantine, overlaps)


def _check_weights(experiment: ExperimentConfig, index: pa.Table) -> None:
    training = index.filter(pc.equal(index["split"], "train"))["source"].unique().to_pylist()
    for number, source in enumerate(experiment.data.sources):
        if source.weight is not None and number not in training:
            raise DataError(
                f"data.sources[{number}] ({source.path}) has a weight but no training samples"
            )


def _tier(
    experiment: ExperimentConfig, store: Path, jobs: list[ShardJob], index: pa.Table
) -> tuple[Literal["pixels", "encoded"], str]:
    """What the store shall hold of the images, and why."""
    data = experiment.data
    size = int(pc.sum(index["num_pixel_bytes"]).as_py() or 0) / 1e9
    if data.augmentation is not None:
        return "encoded", "augmented pictures are made anew in every epoch"
    if data.consumption == "streaming":
        return "encoded", "Ray Data ships encoded images"
    if data.tier == "encoded":
        return "encoded", "as data.tier says"
    if data.disk_budget_gb is not None:
        room, allowed = data.disk_budget_gb, f"data.disk_budget_gb={data.disk_budget_gb:g}"
    else:
        room = shutil.disk_usage(store).free * FREE_SHARE / 1e9
        there = (store / pixel_folder(job.key) for job in jobs)
        room += sum(file.stat().st_size for folder in there for file in folder.glob("*")) / 1e9
        allowed = f"{room:.3g} GB of free disk"
    fits = size <= room
    need = f"{size:.3g} GB of pixels, {'within' if fits else 'more than'} {allowed}"
    if fits:
        return "pixels", need
    if data.tier == "pixels":
        raise DataError(
            f"data.tier=pixels needs {need}; take data.tier=encoded, which decodes the images "
            "while training"
        )
    return "encoded", need


def _run(
    step: Literal["tokens", "pixels"],
    experiment: ExperimentConfig,
    store: Path,
    jobs: list[ShardJob],
    progress: ProgressFunction,
) -> None:
    """One step for all shards that lack it, a Ray Data task each."""
    folder = STEPS[step].folder
    # By key: two sources may have a shard in common.
    missing = list({job.key: job for job in jobs if not folder(store, job).exists()}.values())
    done = len(jobs) - len(missing)
    progress(step, done, len(jobs))
    if not missing:
        return
    import ray

    workers = max(1, min(len(missing), int(ray.cluster_resources().get("CPU", 1)) - 1))
    plain, trusted = experiment.model_dump_json(), experiment.model.trusted_revision
    references = ray.put(missing)

    def prepare_shards(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        carry_out, shards = _step(step, plain, trusted, str(store)), ray.get(references)
        for number in batch["id"]:
            carry_out(shards[int(number)])
        return batch

    with quiet_ray_data(in_order=False):
        dataset = ray.data.range(len(missing), override_num_blocks=len(missing)).map_batches(
            prepare_shards, batch_size=1, compute=ray.data.TaskPoolStrategy(size=workers)
        )
        for _ in dataset.iter_batches(batch_size=1, prefetch_batches=0):
            done += 1
            progress(step, done, len(jobs))


STEPS: dict[str, type[TokenStep] | type[PixelStep]] = {"tokens": TokenStep, "pixels": PixelStep}


@functools.lru_cache(maxsize=2)
def _step(name: str, plain: str, trusted: str | None, store: str) -> TokenStep | PixelStep:
    """One a worker process, so that the processor is loaded once, not once a shard."""
    experiment = ExperimentConfig.model_validate_json(plain).trusting(trusted)
    return STEPS[name](Preparer(experiment, Path(store)))


def _gather(
    store: Path, jobs: list[ShardJob]
) -> tuple[pa.Table, list[Quarantined], dict[str, int]]:
    """The index in the order of the sources, refused samples, and over-long ones by split."""
    tables: list[pa.Table] = []
    quarantine: list[Quarantined] = []
    over_long: dict[str, int] = dict.fromkeys(SPLITS, 0)
    for job in jobs:
        folder = store / job.key
        summary = read_json(folder / "summary.json")
        quarantine += [Quarantined(**entry) for entry in summary["quarantined"]]
        for split, count in summary["over_long"].items():
            over_long[split] += count
        table = read_index(folder / "index.arrow")
        # The number of a source may change where its shards do not.
        place = table.schema.get_field_index("source")
        numbers = pa.array(np.full(len(table), job.source), type=pa.int32())
        tables.append(table.set_column(place, "source", numbers))
    return pa.concat_tables(tables), quarantine, over_long


def _write_whole(file: Path, index: pa.Table) -> None:
    temporary = file.with_name(f".{file.name}.{time.time_ns()}")
    write_index_table(temporary, index)
    temporary.replace(file)


def write_quarantine(file: Path, quarantine: list[Quarantined]) -> None:
    """`quarantine.jsonl`: every refused sample, one JSON object a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(entry), ensure_ascii=False) for entry in quarantine]
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
