"""How many samples and groups the last preparation found: known without reading the data again."""

from __future__ import annotations

from pathlib import Path

from raytune_vlm.config.experiment import ExperimentConfig, digest_of
from raytune_vlm.records import SplitStatistics, read_json, write_json


def store_of(experiment: ExperimentConfig) -> Path:
    """The folder of the prepared shards."""
    return (Path(experiment.storage_path) / "prepared").resolve()


def note_sizes(experiment: ExperimentConfig, splits: dict[str, SplitStatistics]) -> None:
    """Write down how large the splits of an experiment are."""
    sizes = {name: [entry.num_used, entry.num_groups] for name, entry in splits.items()}
    write_json(_file(experiment), sizes)


def noted_sizes(experiment: ExperimentConfig) -> dict[str, tuple[int, int]]:
    """Split -> samples and groups at the last preparation; empty if there was none.

    The data may have changed since: this is for what is said beforehand, not for what is done.
    """
    file = _file(experiment)
    if not file.exists():
        return {}
    return {name: (int(entry[0]), int(entry[1])) for name, entry in read_json(file).items()}


def _file(experiment: ExperimentConfig) -> Path:
    data = experiment.data.model_dump(mode="json")
    data["root"] = str(Path(experiment.data.root).resolve())
    model = experiment.model.name
    model = str(Path(model).resolve()) if Path(model).is_dir() else model
    digest = digest_of({"data": data, "model": model, "seed": experiment.seed})
    return store_of(experiment) / f"{digest}.sizes.json"
