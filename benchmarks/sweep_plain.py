"""A trial as a script without the sweep engine trains and scores it, and the demo's data for it.

For `driver_kills.py`, `makespan.py` and `sweep_start.py`: step, checkpoint and score are the
package's own, so that what differs is who starts a trial, and what is loaded for it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from raytune_vlm.cli import DEMO_EXPERIMENT
from raytune_vlm.config import ExperimentConfig
from raytune_vlm.config.loader import load_experiment
from raytune_vlm.demo.data import write_demo_data
from raytune_vlm.prepare.prepare import PreparedData
from raytune_vlm.sweep.preparing import located

DATA_SIZES = {"num_train": 96, "num_select": 8, "num_report": 8}


@dataclass(frozen=True)
class Inputs:
    """What a trial reads; plain data, which a process takes from a file."""

    experiment: dict[str, Any]
    store: str
    index_file: str
    digest: str
    tier: Literal["pixels", "encoded"]

    @classmethod
    def of(cls, experiment: ExperimentConfig, data: PreparedData) -> Inputs:
        """Of prepared data."""
        manifest = data.manifest
        plain = experiment.model_dump(mode="json")
        return cls(plain, manifest.store, str(data.index_file), manifest.digest, manifest.tier)

    def write(self, file: Path) -> None:
        """Write it for `read`."""
        file.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, file: Path | str) -> Inputs:
        """What `write` has written."""
        return cls(**json.loads(Path(file).read_text()))


def demo_experiment(work: Path, overrides: Sequence[str]) -> ExperimentConfig:
    """The demo on a small data set in `work`, which is written if it is not there."""
    write_demo_data(work / "data", **DATA_SIZES)
    return located(load_experiment(DEMO_EXPERIMENT, [*places(work), *overrides]))


def places(work: Path) -> tuple[str, ...]:
    """Overrides of the demo's experiment: where its data is, and that 3 of 115 rows are broken."""
    return f"data.root={work / 'data'}", f"storage_path={work}", "data.max_bad_fraction=0.05"


class Plain:
    """Base model and prepared data, loaded once for one trial or for several."""

    def __init__(self, inputs: Inputs) -> None:
        import torch
        import transformers

        from raytune_vlm.collate.pixels import PixelMaker
        from raytune_vlm.models.loading import load_base
        from raytune_vlm.prepare.store import open_split

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(1)
        self._inputs = inputs
        self._experiment = ExperimentConfig.model_validate(inputs.experiment)
        self.base = load_base(self._experiment.model)
        maker = PixelMaker(
            self.base.processor.image_processor,
            self.base.family,
            self.base.image_backend,
            self._experiment.data.image_limits,
        )
        self.train, self.select = (
            open_split(inputs.store, inputs.index_file, name, maker.decode)
            for name in ("train", "select")
        )

    def begin(self, recipe: dict[str, Any]) -> Any:
        """A `Run` of one recipe."""
        from raytune_vlm.train.run import Run, TrainingData
        from raytune_vlm.train.world import World

        inputs = self._inputs
        data = TrainingData(inputs.digest, inputs.store, inputs.index_file, inputs.tier)
        return Run(self.base, self.train, self._experiment.with_recipe(recipe), World(), data)

    def score(self, model: Any) -> float:
        """The experiment's metric on the answers to all of `select`."""
        from raytune_vlm.evaluate.generate import generate
        from raytune_vlm.evaluate.metrics import METRICS
        from raytune_vlm.references import read_reference

        config = self._experiment.evaluation
        found = generate(model, self.base, self.select, range(len(self.select)), config)
        assert found is not None
        references = [read_reference(entry.reference) for entry in found]
        parts = METRICS[self._experiment.metric].score_all([e.text for e in found], references)
        return sum(part.value * part.weight for part in parts) / sum(part.weight for part in parts)
