"""Conformance of the backends: two workers of each give what one worker gives.

The two are started once for all tests (`backend_worker.py`), on data in which some samples, and
with them some batches of a rank, have no image.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from backend_worker import carry_out
from made import cli_environment, experiment, picture, turn
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from raytune_vlm.collate.batch import PixelTable, collate
from raytune_vlm.collate.encode import Encoder
from raytune_vlm.collate.encoded import SampleRefused
from raytune_vlm.collate.pixels import PIXEL_NAMES
from raytune_vlm.config.evaluation import EvaluationConfig
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.errors import ConfigError
from raytune_vlm.evaluate.generate import generate
from raytune_vlm.images import encode_png
from raytune_vlm.models.loading import load_base
from raytune_vlm.models.lora import scope_of
from raytune_vlm.models.tiny import BUILDERS
from raytune_vlm.prepare.store import RowWriter, encoded_to_row, write_index
from raytune_vlm.train.backends import BACKENDS
from raytune_vlm.train.packages import check_packages
from raytune_vlm.train.run import Run, TrainingData
from raytune_vlm.train.world import World

STEPS, HALF = 10, 5
TRAIN = {
    "max_steps": STEPS,
    "warmup_steps": 2,
    "batch_size": 4,
    "micro_batch_size": 1,
    "learning_rate": 3e-3,
    "max_grad_norm": 0.05,
    "weight_decay": 0.01,
}
RECIPES = {
    "text": {"rank": 4},
    "towers": {"rank": 2, "scope": "text+vision"},
    "full": {"rank": 2, "modules_to_save": "projector"},
    "pissa": {"rank": 2, "init": "pissa"},
    "dora": {"rank": 2, "dora": True},
}
REFUSED = {"deepspeed": ("full", "dora")}
"""Recipes that a backend cannot train, and says so (`test_what_a_backend_cannot_do_is_refused`)."""


PRESENT = [name for name in BACKENDS if name != "deepspeed" or find_spec("deepspeed")]


def recipes(backend):
    return [name for name in RECIPES if name not in REFUSED.get(backend, ())]


def skip_if_absent(backend):
    if backend not in PRESENT:
        pytest.skip(f"{backend} is not installed")


def write_split(base, folder, name):
    """Samples of which two in three have no image."""
    encoder = Encoder(base.processor, base.family)
    (folder / "shard").mkdir(parents=True, exist_ok=True)
    index = []
    with RowWriter(folder / "shard" / f"{name}.arrow") as writer:
        for number in range(12 if name == "train" else 7):
            images = [picture(number)] if number % 3 == 0 else []
            question = turn("user", "q" * (number % 5 + 1), images=len(images))
            answer = turn("assistant", "answer"[: number % 6 + 1])
            if name == "train":
                encoded = encoder.training([question, answer], images)
            else:
                encoded = encoder.prompt([question], images)
            for pixels in PIXEL_NAMES:
                encoded.tensors.pop(pixels, None)
            counts = {"num_media": 0, "num_bytes": 100, "num_pixel_bytes": 0}
            index.append(
                {
                    **{"split": name, "shard": "shard", "row": number, "source": 0},
                    **{"images_id": "", "truncated": False, "origin": "", **counts},
                    **{"sample_id": f"s{number}", "group_id": f"g{number}"},
                    "length": len(encoded.input_ids),
                    "num_labelled": encoded.num_labelled,
                    "num_images": len(images),
                }
            )
            texts = {"sample_id": f"s{number}", "group_id": "", "prompt": "", "reference": ""}
            pictures = [encode_png(image) for image in images]
            writer.add({**texts, "images": pictures, **encoded_to_row(encoded)})
    return index


class Runs:
    """Runs of one worker in this process and of two others, on the same data."""

    def __init__(self, model, folder):
        self.folder = folder
        self.jobs = {"model": str(model), "store": str(folder / "store")}

    def named(self, backend, name, until=STEPS, start=None, **lora):
        """A run whose checkpoint is `BACKEND/NAME`."""
        train = dict(TRAIN)
        if backend in BACKENDS:
            train |= {"backend": backend, "num_workers": 2}
        run = {"name": name, "lora": lora, "train": train, "until": until}
        if start is not None:
            run["start"] = str(self.folder / start / "step")
        return {**run, "save": str(self.folder / backend / name / "step")}

    def alone(self, runs):
        """One worker's."""
        return carry_out(self.jobs, runs, World())

    def together(self, runs):
        """Two workers', by backend; they are started once."""
        file = self.folder / "jobs.json"
        file.write_text(json.dumps({**self.jobs, "runs": runs}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node=2", str(Path(__file__).parent / "backend_worker.py")]
        environment = {**cli_environment(), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, str(file)], capture_output=True, text=True, timeout=300, env=environment
        )
        found = {}
        for name in runs:
            out = self.folder / f"{name}.json"
            found[name] = json.loads(out.read_text()) if out.exists() else done.stderr
        return found


@pytest.fixture(scope="module")
def runs(tiny_model, tiny_base, tmp_path_factory):
    base, folder = tiny_base("idefics3"), tmp_path_factory.mktemp("backends")
    index = [
        row for name in ("train", "report") for row in write_split(base, folder / "store", name)
    ]
    write_index(folder / "store" / "index.arrow", index)
    return Runs(tiny_model("idefics3"), folder)


@pytest.fixture(scope="module")
def one(runs):
    """What one worker finds; and its checkpoint half-way."""
    jobs = [runs.named("one", name, **lora) for name, lora in RECIPES.items()]
    return runs.alone([*jobs, runs.named("one", "half", HALF, **RECIPES["towers"])])


@pytest.fixture(scope="module")
def two(runs, one):
    """What two workers of each backend find; each goes on from one worker's checkpoint too."""
    return runs.together(
        {
            backend: [
                *(runs.named(backend, name, **RECIPES[name]) for name in recipes(backend)),
                runs.named(backend, "resumed", start="one/half", **RECIPES["towers"]),
                runs.named(backend, "half", HALF, **RECIPES["towers"]),
            ]
            for backend in PRESENT
        }
    )


@pytest.mark.parametrize(
    ("backend", "recipe"),
    [(backend, recipe) for backend in BACKENDS for recipe in recipes(backend)],
)
def test_two_workers_train_and_answer_as_one(backend, recipe, runs, one, two):
    skip_if_absent(backend)
    assert isinstance(two[backend], dict), two[backend]
    expected, found = one[recipe], two[backend][recipe]
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-3)
    assert max(expected["norms"]) > TRAIN["max_grad_norm"]
    assert found["answers"] == expected["answers"]
    skipped = {"merge"} if backend == "deepspeed" else set()
    assert found["audit"].keys() == expected["audit"].keys() - skipped
    assert all(found["audit"].values())
    compare(runs.folder / "one" / recipe / "step", runs.folder / backend / recipe / "step")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_goes_on_with_another_backend_and_number_of_workers(backend, runs, one, two):
    skip_if_absent(backend)
    assert isinstance(two[backend], dict), two[backend]
    rest = pytest.approx(one["towers"]["losses"][HALF:], abs=1e-5)
    assert two[backend]["resumed"]["losses"] == rest
    back = runs.named("one", f"after {backend}", start=f"{backend}/half", **RECIPES["towers"])
    assert runs.alone([back])[back["name"]]["losses"] == rest
    compare(runs.folder / "one" / "towers" / "step", runs.folder / backend / "resumed" / "step")


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """This process as a group of one."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("model_type", sorted(BUILDERS))
def test_every_family_answers_the_same_when_it_is_cut_up(
    model_type, group, tiny_model, tiny_base, tiny_split, tiny_prompts
):
    prompts, settings = tiny_prompts(model_type), EvaluationConfig(max_new_tokens=2, batch_size=2)
    train = {"max_steps": 3, "warmup_steps": 1, "batch_size": 2}
    config = experiment(lora={"rank": 2}, train=train)
    found = []
    for backend in ("ddp", "fsdp2"):
        base = load_base(ModelConfig(name=str(tiny_model(model_type))))
        BACKENDS[backend].place(base, World(), config.train)
        run = Run(base, tiny_split(model_type), config, World(), TrainingData("d"))
        losses = [run.step().loss for _ in range(2)]
        answers = generate(run.model, base, prompts, [0, 1], settings)
        run.close()
        found.append((losses, [answer.text for answer in answers]))
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-5)
    assert found[1][1] == found[0][1]
    blocks = [name for name, p in base.model.named_parameters() if isinstance(p, DTensor)]
    assert any(scope_of(name, base.family) == "text" for name in blocks)
    assert not any(scope_of(name, base.family) == "projector" for name in blocks)


@pytest.mark.parametrize("model_type", sorted(BUILDERS))
def test_a_blank_image_changes_nothing_for_the_text_beside_it(model_type, tiny_base):
    base = tiny_base(model_type)
    encoder = Encoder(base.processor, base.family)
    try:
        sample = encoder.training([turn("user", "qq"), turn("assistant", "answer")], [])
    except SampleRefused as error:
        pytest.skip(str(error))
    found = []
    for samples in ([sample], [sample, encoder.blank()]):
        batch = collate(samples, base.family, pad_token_id=0)
        del batch["labels"]
        batch = PixelTable(base.processor.image_processor, base.family)(batch)
        with torch.no_grad():
            found.append(base.model(**batch).logits[0, : len(sample.input_ids)])
    same = torch.allclose(found[0], found[1], atol=1e-5)
    assert same == base.family.text_beside_images


@pytest.mark.parametrize(
    ("backend", "section", "message"),
    [
        ("fsdp2", {"lora": {"modules_to_save": "vision"}}, "modules_to_save=vision exclude"),
        ("deepspeed", {"lora": {"modules_to_save": "projector"}}, "modules_to_save=projector excl"),
        ("deepspeed", {"lora": {"dora": True}}, r"lora\.dora=true exclude each other"),
        ("fsdp2", {"train": {"num_workers": 1}}, "no effect with num_workers=1"),
    ],
)
def test_what_a_backend_cannot_do_is_refused(backend, section, message):
    train = {"backend": backend, "num_workers": 2, **section.get("train", {})}
    with pytest.raises(ValueError, match=message):
        experiment(**{**section, "train": train})


def test_a_missing_package_is_told_before_anything_starts():
    config = experiment(train={"backend": "deepspeed", "num_workers": 2})
    if "deepspeed" in PRESENT:
        check_packages(config.train)
    else:
        with pytest.raises(ConfigError, match=r"pip install 'raytune-vlm\[deepspeed\]'"):
            check_packages(config.train)


def compare(one, two):
    """The same files with the same tensors."""
    assert {file.name for file in one.iterdir()} == {file.name for file in two.iterdir()}
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        first, second = load_file(one / name), load_file(two / name)
        names = [key for key in first if not key.startswith("rng/")]
        assert names == [key for key in second if not key.startswith("rng/")]
        for key in names:
            assert torch.allclose(first[key], second[key], atol=1e-5), key
