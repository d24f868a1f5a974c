"""Benchmarks on the executors: their data is found and prepared, then asked and scored.

All benchmarks of a run are prepared together, and share executors that load the base model once.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raytune_vlm.config.data import DataConfig
from raytune_vlm.config.experiment import ExperimentConfig, digest_of
from raytune_vlm.config.sources import TableFunctionSource
from raytune_vlm.errors import ConfigError, DataError, did_you_mean
from raytune_vlm.evaluate.benchmarks import Chosen
from raytune_vlm.evaluate.benchmarks.card import DRAWN
from raytune_vlm.evaluate.benchmarks.fixtures import FOLDER as FIXTURES_FOLDER
from raytune_vlm.models.location import model_fingerprint, model_path
from raytune_vlm.monitor import Monitor
from raytune_vlm.prepare.prepare import PreparedData, list_shards, prepare
from raytune_vlm.records import SweepFolder, by_kind, read_json, write_json
from raytune_vlm.sources.containers import CONTAINERS
from raytune_vlm.sources.hugging_face import HUB, split_of_file
from raytune_vlm.sources.remote import is_remote
from raytune_vlm.sweep import preparing, runner
from raytune_vlm.sweep.jobs import PreparedBenchmark

FIXTURES = "fixtures"
"""`--data fixtures`: the drawn rows that the package ships, for dry runs."""

MAX_LENGTH = 16_384
"""Longest prompt in tokens; what is longer is left out and counted."""

FACTS_FILE = "benchmark.json"

_SPLIT_NAMES = frozenset(
    ("train", "validation", "val", "dev", "test", "testmini", "testdev", "restval")
)


@dataclass(frozen=True)
class Suite:
    """Benchmarks, the sources of each, and an experiment whose data they are."""

    experiment: ExperimentConfig
    members: tuple[tuple[Chosen, tuple[TableFunctionSource, ...]], ...]
    data: str | None
    limit: int | None

    def alone(self, sources: tuple[TableFunctionSource, ...]) -> ExperimentConfig:
        """The experiment with the sources of one benchmark."""
        data = self.experiment.data.model_copy(update={"sources": sources})
        return self.experiment.model_copy(update={"data": data})


def suite_of(
    experiment: ExperimentConfig,
    chosen: Sequence[Chosen],
    *,
    data: str | None,
    limit: int | None,
) -> Suite:
    """The benchmarks in the place of the experiment's data, each file a source of `report`.

    Parameters
    ----------
    data
        A folder, `FIXTURES`, or None: the hub.
    limit
        At most so many questions of each.

    Raises
    ------
    ConfigError, DataError
        Files are not there, or their benchmark cannot be read from where it is.
    """
    members = tuple((each, tuple(sources_of(each, data))) for each in chosen)
    sources = tuple(source for _, own in members for source in own)
    own = experiment.data
    config = DataConfig(
        root="/" if data is None else str(data_folder(data)),
        sources=sources,
        max_bad_fraction=1.0,
        max_length=MAX_LENGTH,
        image_limits=own.image_limits,
        tier="auto" if own.tier == "pixels" else own.tier,
        disk_budget_gb=own.disk_budget_gb,
        decode_threads=own.decode_threads,
        stall_timeout_s=own.stall_timeout_s,
        allow_network=any(is_remote(source.path) for source in sources),
    )
    # Packs have nothing to do with scoring, and those shorter than a prompt are refused.
    train = experiment.train.model_copy(update={"pack_tokens": None})
    changed = experiment.model_copy(update={"data": config, "train": train})
    return Suite(changed, members, data, limit)


def data_folder(data: str) -> Path:
    """The folder that `--data` names; raises DataError where there is none."""
    folder = FIXTURES_FOLDER if data == FIXTURES else Path(data).expanduser().resolve()
    if not folder.is_dir():
        raise DataError(f"--data {data}: no such folder (or {FIXTURES!r}: the drawn ones)")
    return folder


def sources_of(chosen: Chosen, data: str | None) -> list[TableFunctionSource]:
    """Where the rows of a benchmark are: the hub, or files of a folder, each a source."""
    entry = chosen.entry
    shared = {
        "type": "table",
        "split": "report",
        "function": entry.row_function,
        "columns": entry.row_columns(),
        "options": entry.row_options(chosen.category),
    }
    if not is_remote(entry.path):
        path = Path(entry.path).expanduser()
        paths = _files(chosen, path if path.is_absolute() else chosen.base / path)
    elif data is not None:
        paths = _files(chosen, data_folder(data) / chosen.folder)
    elif entry.unreadable is not None:
        raise DataError(f"benchmark {chosen.name}: {entry.unreadable}")
    else:
        pattern = entry.path.endswith(".parquet")
        return [
            TableFunctionSource.model_validate(
                shared
                | {"path": entry.path, "revision": _commit(chosen)}
                | ({} if pattern else {"dataset_split": entry.dataset_split})
            )
        ]
    return [TableFunctionSource.model_validate(shared | {"path": str(file)}) for file in paths]


def _files(chosen: Chosen, target: Path) -> list[Path]:
    """The benchmark's files: of its split where their names tell splits, else all there are.

    Raises DataError where there are none.
    """
    entry = chosen.entry
    if target.is_file():
        return [target]
    if not target.is_dir():
        there = [path.name for path in target.parent.glob("*")] if target.parent.is_dir() else []
        near = did_you_mean(target.name, there)
        raise DataError(f"benchmark {chosen.name}: no folder {target}{near}")
    found = sorted(
        path
        for path in target.rglob("*")
        if path.name.endswith(tuple(CONTAINERS)) and not path.name.startswith((".", "_"))
    )
    names = {path: _split_of(path) for path in found}
    told = {name for name in names.values() if name in _SPLIT_NAMES}
    if told and entry.dataset_split is not None:
        found = [path for path in found if names[path] == entry.dataset_split]
        if not found:
            has = ", ".join(sorted(told))
            raise DataError(
                f"benchmark {chosen.name}: {target} holds no file of the split "
                f"'{entry.dataset_split}', only of {has}"
            )
    if not found:
        raise DataError(f"benchmark {chosen.name}: {target} holds no data files")
    return found


def _split_of(path: Path) -> str:
    if path.suffix == ".parquet":
        return split_of_file(path.as_posix())
    return path.name.split(".")[0]


def _commit(chosen: Chosen) -> str:
    """The commit of the hub's data set that is read now, so that it can be noted."""
    from huggingface_hub import HfApi

    name = "/".join(chosen.entry.path.removeprefix(HUB).split("/")[:2])
    try:
        found = HfApi().dataset_info(name, revision=chosen.entry.revision, timeout=30).sha
    except Exception as error:  # the hub client raises a dozen unrelated classes
        reason = " ".join(str(error).split())[:160]
        raise DataError(
            f"benchmark {chosen.name}: {name} is not to be had from the hub "
            f"({type(error).__name__}: {reason}); give its files with --data DIR"
        ) from None
    if found is None:
        raise DataError(f"benchmark {chosen.name}: the hub names no commit of {name}")
    return str(found)


def prepare_suite(suite: Suite, monitor: Monitor) -> tuple[list[PreparedBenchmark], PreparedData]:
    """Every benchmark prepared: one Ray Data job for the shards of all of them.

    Returns
    -------
    The benchmarks, and the data of all of them together.

    Raises
    ------
    DataError
        If a benchmark has no row that can be asked, with the reason of the first.
    """
    experiment = suite.experiment
    whole = preparing.prepare_data(experiment, list_shards(experiment), monitor, for_training=False)
    model = model_state(experiment)
    prepared = []
    for chosen, sources in suite.members:
        alone = suite.alone(sources)
        found = prepare(alone, list_shards(alone), lambda *_: None, for_training=False)
        prepared.append(_prepared(suite, chosen, sources, found, model))
    return prepared, whole


def _prepared(
    suite: Suite,
    chosen: Chosen,
    sources: Sequence[TableFunctionSource],
    data: PreparedData,
    model: dict[str, Any],
) -> PreparedBenchmark:
    limit = suite.limit
    entry, statistics = chosen.entry, data.manifest.splits["report"]
    if statistics.num_used == 0:
        reasons = list(data.manifest.quarantine_reasons) or ["every prompt is too long"]
        raise DataError(f"benchmark {chosen.name}: no row can be asked: {reasons[0]}")
    drawn = suite.data == FIXTURES and is_remote(entry.path)
    name = chosen.key + ("-fixtures" if drawn else "") + (f"-limit-{limit}" if limit else "")
    evaluation = suite.experiment.evaluation.model_copy(
        update={
            "metrics": entry.metrics,
            "answer": entry.answer,
            "max_new_tokens": entry.max_new_tokens,
        }
    )
    facts = {
        "benchmark": chosen.name,
        "data": DRAWN if drawn else "files" if sources[0].revision is None else "hub",
        "commit": sources[0].revision,
        "num_rows": statistics.num_seen,
        "num_whole": None if drawn or chosen.category else entry.num_samples,
        "limit": limit,
        "quarantined": statistics.num_quarantined,
        "over_long": statistics.num_dropped_over_long,
        "reasons": {
            f"{first.origin}: {first.reason}": count for first, count in by_kind(data.quarantine)
        },
        "prompt": entry.prompt,
        "submission": entry.submission,
    }
    facts["digest"] = digest_of([facts, data.manifest.digest, evaluation.model_dump(), model])
    return PreparedBenchmark(
        name=name,
        store=data.manifest.store,
        index_file=str(data.index_file),
        limit=limit,
        evaluation=evaluation,
        metrics=entry.metrics,
        facts=facts,
    )


def model_state(experiment: ExperimentConfig) -> dict[str, Any]:
    """What the answers depend on beside the data: model files, number format, adapters' seed."""
    model = experiment.model
    folder = Path(model_path(model))
    weights = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return {
        **model_fingerprint(model),
        "config": model.model_dump(exclude={"gradient_checkpointing"}),
        "weights": [(file.name, file.stat().st_size, _hash(file)) for file in weights],
    }


def _hash(file: Path) -> str:
    """A digest of a file's ends: enough to tell other weights of the same size."""
    with file.open("rb") as stream:
        digest = hashlib.sha256(stream.read(1 << 20))
        stream.seek(max(0, file.stat().st_size - (1 << 20)))
        digest.update(stream.read())
    return digest.hexdigest()[:16]


def scorings_of(
    scoring: runner.Scoring, prepared: Sequence[PreparedBenchmark]
) -> list[runner.Scoring]:
    """The same checkpoint on every benchmark."""
    return [replace(scoring, split=entry.name, benchmark=entry) for entry in prepared]


def score_benchmarks(running: runner.Session, scorings: Sequence[runner.Scoring]) -> None:
    """Ask and score; what was scored with the same data, model and settings is left as it is.

    Raises
    ------
    EvaluationError
        If one could not be scored.
    """
    for scoring in scorings:
        forget_stale(running.folder, scoring)
    runner.evaluate(running, list(scorings))


def forget_stale(folder: SweepFolder, scoring: runner.Scoring) -> None:
    """Remove what stands where the scores belong if it is of other data or settings."""
    assert scoring.benchmark is not None
    place = scoring.scores_file(folder).parent
    facts = scoring.benchmark.facts | {"adapter": _adapter_digest(scoring.adapter)}
    file = place / FACTS_FILE
    if place.exists() and (not file.exists() or read_json(file) != facts):
        shutil.rmtree(place)
    write_json(file, facts)


def _adapter_digest(adapter: Path | None) -> str | None:
    if adapter is None:
        return None
    files = sorted(path for path in adapter.glob("adapter_*") if path.is_file())
    return digest_of([(path.name, _hash(path)) for path in files])


def check_adapter(adapter: Path, experiment: ExperimentConfig) -> Path:
    """The folder of an adapter in PEFT's format; raises ConfigError where it is none."""
    missing = [
        name
        for name in ("adapter_config.json", "adapter_model.safetensors")
        if not (adapter / name).is_file()
    ]
    if missing:
        raise ConfigError(f"--adapter {adapter}: no {missing[0]}: not an adapter in PEFT's format")
    if experiment.train.backend != "ddp":
        raise ConfigError(
            f"--adapter and train.backend={experiment.train.backend} exclude each other: the base "
            "is cut up; use train.backend=ddp"
        )
    return adapter.resolve()
