"""Fixtures: tiny models of real classes, real images, prepared samples."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

# Where transformers copies the code that comes with a model; read when it is imported.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="raytune_vlm-test-modules-")

import pytest
import torch
import yaml
from clusters import JOINED, SETTINGS, start_head
from made import picture, turn, write_data
from remote_code import CLASSES, write_remote_model

from raytune_vlm.collate.encode import Encoder
from raytune_vlm.collate.pixels import PIXEL_NAMES, PixelMaker
from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.loader import load_experiment
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.images import encode_png
from raytune_vlm.models.families import FAMILIES
from raytune_vlm.models.loading import Base, load_base
from raytune_vlm.models.tiny import write_tiny_model
from raytune_vlm.models.trust import code_digest
from raytune_vlm.prepare.prepare import list_shards
from raytune_vlm.prepare.shard import PixelStep, Preparer, TokenStep
from raytune_vlm.prepare.store import (
    PreparedSplit,
    RowWriter,
    encoded_to_row,
    open_split,
    write_index,
)
from raytune_vlm.records import Split

torch.set_num_threads(1)

Writer = Callable[[Path], object]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Writer], Path]:
    """Name and what writes it -> a folder that all processes of a session share."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(name: str, write: Writer) -> Path:
        path = root / name
        path.parent.mkdir(exist_ok=True)
        with path.with_name(f"{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():  # then it is whole: also where a writer failed or was killed
                half = path.with_name(f"{path.name}.half")
                shutil.rmtree(half, ignore_errors=True)
                write(half)
                half.rename(path)
        return path

    return folder


@pytest.fixture(scope="session")
def tiny_model(made_once: Callable[[str, Writer], Path]) -> Callable[[str], Path]:
    """Family -> the folder of its tiny model, to be left as it is.

    Skips the test where a package that the family needs is not installed.
    """

    def folder(model_type: str) -> Path:
        missing = [name for name in FAMILIES[model_type].needs if find_spec(name) is None]
        if missing:
            pytest.skip(f"{model_type} needs {' and '.join(missing)} (tests/with_torchvision.py)")
        write = write_remote_model if model_type in CLASSES else write_tiny_model
        return made_once(f"tiny/{model_type}", partial(write, model_type))

    return folder


@pytest.fixture(scope="session")
def tiny_base(tiny_model: Callable[[str], Path]) -> Callable[[str], Base]:
    """Family -> its loaded tiny model; shared, so tests must leave it as it was."""
    loaded: dict[str, Base] = {}

    def base(model_type: str) -> Base:
        if model_type not in loaded:
            folder = tiny_model(model_type)
            trusted = code_digest(folder) if model_type in CLASSES else None
            loaded[model_type] = load_base(ModelConfig(name=str(folder)).trusting(trusted))
        return loaded[model_type]

    return base


@pytest.fixture(scope="session")
def tiny_split(
    tiny_base: Callable[[str], Base], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], PreparedSplit]:
    """Family -> 40 prepared training samples of different lengths and image sizes."""
    return _cached_splits(tiny_base, tmp_path_factory, "train")


@pytest.fixture(scope="session")
def tiny_prompts(
    tiny_base: Callable[[str], Base], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], PreparedSplit]:
    """Family -> the prompts of the same samples."""
    return _cached_splits(tiny_base, tmp_path_factory, "report")


def _cached_splits(
    tiny_base: Callable[[str], Base], tmp_path_factory: pytest.TempPathFactory, name: Split
) -> Callable[[str], PreparedSplit]:
    def split(model_type: str) -> PreparedSplit:
        base = tiny_base(model_type)
        encoder = Encoder(base.processor, base.family)
        maker = PixelMaker(base.processor.image_processor, base.family, None, ImageLimits())
        folder = tmp_path_factory.mktemp("store")
        (folder / "shard").mkdir()
        index = []
        with RowWriter(folder / "shard" / f"{name}.arrow") as writer:
            for number in range(40):
                conversation = [
                    turn("user", "q" * (number % 5 + 1), images=1),
                    turn("assistant", "answer"[: number % 6 + 1]),
                ]
                image = picture(number, height=40 + number)
                if name == "train":
                    encoded = encoder.training(conversation, [image])
                else:
                    encoded = encoder.prompt(conversation[:1], [image])
                for pixels in PIXEL_NAMES:
                    encoded.tensors.pop(pixels, None)
                index.append(
                    {
                        "split": name,
                        "shard": "shard",
                        "row": number,
                        "source": 0,
                        "images_id": "",
                        "num_media": 0,
                        "num_bytes": 100,
                        "num_pixel_bytes": 0,
                        "truncated": False,
                        "sample_id": f"s{number}",
                        "group_id": f"g{number}",
                        "origin": f"made:{number}",
                        "length": len(encoded.input_ids),
                        "num_labelled": encoded.num_labelled,
                        "num_images": 1,
                    }
                )
                writer.add(
                    {
                        "sample_id": f"s{number}",
                        "group_id": f"g{number}",
                        "prompt": "",
                        "reference": "",
                        "conversation": json.dumps({"messages": conversation[:1], "tools": []}),
                        "images": [encode_png(image)],
                        **encoded_to_row(encoded),
                    }
                )
        write_index(folder / "index.arrow", index)
        return open_split(folder, folder / "index.arrow", name, maker.decode)

    made: dict[str, PreparedSplit] = {}

    def cached(model_type: str) -> PreparedSplit:
        if model_type not in made:
            made[model_type] = split(model_type)
        return made[model_type]

    return cached


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """Two CPUs of Ray that the commands of a module's tests join: each is spared its start.

    A command without it starts a Ray of its own, as it does for a user.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        cluster = start_head(num_cpus=2)
        patch.setenv(JOINED, cluster.address)
        yield
        cluster.shutdown()
        # What it leaves behind is collected while the marks `OF_A_CLUSTER` hold.
        del cluster
        gc.collect()


@pytest.fixture(scope="session")
def shared_data(
    made_once: Callable[[str, Writer], Path], tiny_model: Callable[[str], Path]
) -> Path:
    """A folder with `data`, to be left as it is, and `prepared`, what runs on it have prepared.

    What most of them need is there: a run that lacks it starts processes that load a processor.
    """

    data = made_once("shared/data", write_data)

    def prepare(store: Path) -> None:
        # Not in `store`, whose name is another one later: the data's place is part of its keys.
        plain = {
            "name": "small",
            "storage_path": str(store),
            "model": {"name": str(tiny_model("idefics3"))},
            "data": data_section(data),
        }
        store.mkdir()
        file = store / "small.yaml"
        file.write_text(yaml.safe_dump(plain))
        experiment = load_experiment(file)
        file.unlink()
        preparer, jobs = Preparer(experiment, store), list_shards(experiment)
        for step in (TokenStep(preparer), PixelStep(preparer)):
            for job in jobs:
                step(job)

    return made_once("shared/prepared", prepare).parent


def data_section(data: Path) -> dict[str, object]:
    """`data` of an experiment on what `write_data` writes."""
    sources = [
        {"type": "messages", "path": f"{split}.jsonl", "split": split}
        for split in ("train", "select", "report")
    ]
    return {"root": str(data), "sources": sources}


@pytest.fixture
def write_experiment(
    tmp_path: Path, shared_data: Path, tiny_model: Callable[[str], Path]
) -> Callable[..., tuple[Path, Path]]:
    """Write a sweep of three short trials, without controls; returns the file and the sweep folder.

    Its data, which is prepared only once a session, is to be left as it is; with `own_data` it
    stands in `data` beside the file.
    """

    def write(
        name: str = "small",
        data_extra: dict[str, object] | None = None,
        own_data: bool = False,
        **sections: object,
    ) -> tuple[Path, Path]:
        data, prepared = shared_data / "data", tmp_path / "runs" / "prepared"
        if own_data:
            data = tmp_path / "data"
            if not data.exists():
                write_data(data)
        elif not prepared.exists():
            prepared.parent.mkdir()
            prepared.symlink_to(shared_data / "prepared")
        plain: dict[str, object] = {
            "name": name,
            "storage_path": str(tmp_path / "runs"),
            "model": {"name": str(tiny_model("idefics3"))},
            "data": {**data_section(data), **(data_extra or {})},
            "train": {"max_steps": 12, "warmup_steps": 2, "batch_size": 6, "micro_batch_size": 4},
            "evaluation": {
                "metrics": ["cer@micro", "exact_match@strip"],
                "max_new_tokens": 6,
                "num_bootstrap": 200,
                "controls": [],
            },
            "sweep": {
                "num_trials": 3,
                "num_replicates": 1,
                "scheduler": {"type": "asha", "grace_period": 4, "reduction_factor": 3},
                "search_space": {
                    "lora.rank": {"type": "choice", "values": [2, 4]},
                    "train.learning_rate": {"type": "loguniform", "lower": 1e-3, "upper": 1e-1},
                },
            },
            **sections,
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(plain, sort_keys=False))
        return file, tmp_path / "runs" / name

    return write
