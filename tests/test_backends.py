"""Conformance of the backends: two workers of each give what one worker gives.

The two are started once for all tests (`backend_worker.py`), on data in which some samples, and
with them some batches of a rank, have no image.
"""

from __future__ import annotations

import gc
import json
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from backend_worker import carry_out
from made import experiment, turn, write_split
from ranks import start_ranks
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from raytune_vlm.collate.batch import PixelTable, collate
from raytune_vlm.collate.encode import Encoder
from raytune_vlm.collate.encoded import SampleRefused
from raytune_vlm.config import ExperimentConfig
from raytune_vlm.config.evaluation import EvaluationConfig
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.config.train import DeepSpeedConfig, Fsdp2Config
from raytune_vlm.errors import ConfigError
from raytune_vlm.evaluate.generate import generate
from raytune_vlm.models.loading import load_base
from raytune_vlm.models.lora import scope_of
from raytune_vlm.models.tiny import BUILDERS
from raytune_vlm.train.backends import BACKENDS
from raytune_vlm.train.packages import check_packages
from raytune_vlm.train.run import Run, TrainingData
from raytune_vlm.train.world import World

STEPS, HALF, SHORT = 50, 25, 4
RESUMED = 30
TRAIN = {
    "max_steps": STEPS,
    "warmup_steps": 2,
    "batch_size": 6,
    "micro_batch_size": 3,
    "learning_rate": 3e-3,
    "max_grad_norm": 0.05,
    "weight_decay": 0.01,
}
SETTINGS = {
    "ddp": {},
    "fsdp2": {},
    "deepspeed-1": {"deepspeed": {"stage": 1}},
    "deepspeed-2": {"deepspeed": {"stage": 2}},
    "deepspeed-2-offload": {"deepspeed": {"stage": 2, "offload_optimizer": True}},
    "deepspeed-3": {"deepspeed": {"stage": 3}},
    "fsdp2-hybrid": {"num_workers": 4, "fsdp2": {"shard_size": 2}},
}
"""Sections of `train`; the name begins with the backend's. A run of one goes on with the next."""

SCOPES = {"learning_rate_by_scope": {"vision": 1e-3}}
TOWERS = {"rank": 2, "scope": "text+vision", "loraplus_ratio": 4}
RECIPES = {
    "full": {"rank": 2, "modules_to_save": "projector"},
    "pissa": {"rank": 2, "init": "pissa"},
    "dora": {"rank": 2, "dora": True},
}
REFUSED = {"deepspeed-3": ("full", "dora")}
"""Recipes that a setting cannot train, and says so (`test_what_a_backend_cannot_do_is_refused`)."""

BRIEF = {"ddp", "fsdp2", "deepspeed-2", "deepspeed-3"}
"""Settings whose way with the adapter differs: `RECIPES` are tried with them."""

PRESENT = [name for name in SETTINGS if name[:9] != "deepspeed" or find_spec("deepspeed")]


SHARDED = {"fsdp2", "fsdp2-hybrid", "deepspeed-3"}
"""Settings whose ranks start again when one runs out of memory (`tests/test_step.py`)."""


def faults(setting):
    """What goes wrong at which step of a short run (`backend_worker.step`)."""
    memory = {"1": "memory"} if setting in SETTINGS and setting not in SHARDED else {}
    return {**memory, "2": "weight", "3": "gradient"}


def recipes(setting):
    return [name for name in RECIPES if setting in BRIEF and name not in REFUSED.get(setting, ())]


def skip_if_absent(setting):
    if setting not in PRESENT:
        pytest.skip("deepspeed is not installed")


class Runs:
    """Runs of one worker in this process and of some others, on the same data."""

    def __init__(self, model, folder):
        self.folder = folder
        self.jobs = {"model": str(model), "store": str(folder / "store")}

    def named(self, setting, name, until=STEPS, start=None, lora=TOWERS, **train):
        """A run whose checkpoints are `SETTING/NAME/STEP`."""
        train = {**TRAIN, **train}
        if setting not in SETTINGS:
            train["micro_batch_size"] = train["batch_size"]
        else:
            backend, _, _ = setting.partition("-")
            train |= {"backend": backend, "num_workers": 2, **SETTINGS[setting]}
        wanted = {HALF, RESUMED, until}
        saves = {step: str(self.folder / setting / name / str(step)) for step in wanted}
        run = {"name": name, "lora": lora, "train": train, "until": until, "saves": saves}
        if start is not None:
            run["start"] = str(self.folder / start / "long" / str(HALF))
        return run

    def all_of(self, setting, before=None):
        """What is done with every setting; a run goes on where the one `before` has been.

        Of two workers each then does three micro-batches in a step, in place of one.
        """
        return [
            {**self.named(setting, "long", **SCOPES), "answers": True},
            *([self.accumulated(setting, before)] if before else []),
            {**self.named(setting, "faulty", SHORT), "faults": faults(setting)},
        ]

    def accumulated(self, setting, before):
        """A long run that goes on in small micro-batches."""
        more = {**SCOPES, "micro_batch_size": 1}
        return self.named(setting, "resumed", RESUMED, start=before, **more)

    def alone(self, runs):
        """One worker's."""
        return carry_out(self.jobs, runs, World())

    def together(self, runs, num_workers=2):
        """Some workers', by setting; they are started once."""
        file = self.folder / f"jobs{num_workers}.json"
        file.write_text(json.dumps({**self.jobs, "runs": runs}))
        done = start_ranks(num_workers, "backend_worker.py", file)
        found = {}
        for name in runs:
            out = self.folder / f"{name}.json"
            found[name] = json.loads(out.read_text()) if out.exists() else done.stderr
        return found


@pytest.fixture(scope="module")
def runs(tiny_model, tiny_base, tmp_path_factory):
    base, folder = tiny_base("idefics3"), tmp_path_factory.mktemp("backends")
    write_split(base, folder / "store", "train", "report")
    return Runs(tiny_model("idefics3"), folder)


def brief(runs, setting):
    names = recipes(setting) if setting in SETTINGS else RECIPES
    return [runs.named(setting, name, SHORT, lora=RECIPES[name]) for name in names]


@pytest.fixture(scope="module")
def one(runs):
    """What one worker finds."""
    return runs.alone([*runs.all_of("one"), *brief(runs, "one")])


@pytest.fixture(scope="module")
def found(runs, one):
    """What the workers of every setting find; each goes on from another one's checkpoint."""
    before = dict(zip(PRESENT, ["one", *PRESENT], strict=False))
    jobs = {name: [*runs.all_of(name, before[name]), *brief(runs, name)] for name in PRESENT}
    last = {PRESENT[-1]: jobs.pop(PRESENT[-1])}
    return {**runs.together(jobs), **runs.together(last, num_workers=4)}


def of(found, setting):
    skip_if_absent(setting)
    assert isinstance(found[setting], dict), found[setting]
    return found[setting]


def test_every_backend_is_in_the_table():
    assert {name.partition("-")[0] for name in SETTINGS} == set(BACKENDS)


@pytest.mark.parametrize("setting", SETTINGS)
def test_fifty_steps_are_those_of_one_worker(setting, runs, one, found):
    expected, ours = one["long"], of(found, setting)["long"]
    largest = largest_difference(expected["losses"], ours["losses"])
    other = largest_difference(
        expected["losses"][HALF:RESUMED], found[setting]["resumed"]["losses"]
    )
    shown = " | ".join(f"{ours['losses'][step - 1]:.7f}" for step in (1, 10, STEPS))
    # For docs/backends.md.
    sys.stdout.write(f"| `{setting}` | {shown} | {largest:.1e} | {other:.1e} |\n")
    assert largest < 1e-5
    assert ours["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert max(expected["norms"]) > TRAIN["max_grad_norm"]
    assert ours["answers"] == expected["answers"]
    all_text, some_text = ours["text_only"]
    assert all_text and some_text > all_text
    audited(setting, expected, ours)
    compare(runs, "long", STEPS, setting)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_goes_on_with_another_backend_stage_and_number_of_workers(setting, runs, one, found):
    ours = of(found, setting)["resumed"]["losses"]
    assert largest_difference(one["long"]["losses"][HALF:RESUMED], ours) < 1e-5
    compare(runs, "resumed", RESUMED, setting, expected="long")
    compare(runs, "long", HALF, setting)


def test_one_worker_goes_on_from_the_last(runs, one, found):
    of(found, PRESENT[-1])
    ours = runs.alone([runs.accumulated("one", PRESENT[-1])])["resumed"]["losses"]
    assert largest_difference(one["long"]["losses"][HALF:RESUMED], ours) < 1e-5


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_rank_that_runs_out_of_memory_or_of_numbers_costs_no_more_than_the_step(
    setting, runs, one, found
):
    expected, ours = one["faulty"], of(found, setting)["faulty"]
    assert ours["skipped"] == expected["skipped"] == [2, 3]
    assert ours["losses"] == pytest.approx(expected["losses"], rel=1e-4, nan_ok=True)
    assert [loss == loss for loss in ours["losses"]] == [True, False, True, True]
    assert (ours["micro_batch"] < 3) == ("memory" in faults(setting).values())
    compare(runs, "faulty", SHORT, setting)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_trial_leaves_the_base_as_it_was(setting, found):
    left = of(found, setting)["left"]
    assert left[0] == left[1]
    assert left[0]["engines"] == (setting == "deepspeed-3")
    assert left[0]["optimizers"] == left[0]["adapters"] == 0


@pytest.mark.parametrize(
    ("setting", "recipe"), [(setting, name) for setting in SETTINGS for name in recipes(setting)]
)
def test_every_recipe_trains_as_with_one_worker(setting, recipe, runs, one, found):
    expected, ours = one[recipe], of(found, setting)[recipe]
    assert ours["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    audited(setting, expected, ours)
    compare(runs, recipe, SHORT, setting)


def largest_difference(first, second):
    """Of two runs' losses, relative."""
    return max(abs(theirs / ours - 1) for ours, theirs in zip(first, second, strict=True))


def audited(setting, expected, ours):
    skipped = {"merge"} if setting == "deepspeed-3" else set()
    assert ours["audit"].keys() == expected["audit"].keys() - skipped
    assert all(ours["audit"].values())


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


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("setting", ["deepspeed-1", "deepspeed-2-offload"])
def test_an_engine_that_is_gone_takes_nothing_with_it(
    setting, group, tiny_base, tiny_split, tmp_path, monkeypatch
):
    monkeypatch.setenv("LOCAL_RANK", "0")  # which Ray sets
    base, split = tiny_base("idefics3"), tiny_split("idefics3")
    plain = experiment(
        lora={"rank": 2, "loraplus_ratio": 2}, train={"max_steps": 5, "warmup_steps": 1}
    )
    for name in ("one", setting):
        chosen = {"backend": "ddp"}
        if name == setting:
            chosen = {"backend": "deepspeed"}
            chosen["deepspeed"] = DeepSpeedConfig(**SETTINGS[setting]["deepspeed"])
        config = plain.model_copy(update={"train": plain.train.model_copy(update=chosen)})
        run = Run(base, split, config, World(), TrainingData("d"))
        for step in range(1, 6):
            run.step()
            if step in (2, 5):
                gc.collect()
                run.save(tmp_path / name / "engine" / str(step))
        run.close()
    runs = SimpleNamespace(folder=tmp_path)
    for step in (2, 5):
        compare(runs, "engine", step, setting)


@pytest.mark.parametrize(
    ("model_type", "other"),
    [
        ("idefics3", "bfloat16"),
        ("idefics3", "float16"),
        ("qwen2_5_vl", "bfloat16"),
        ("gemma3", "bfloat16"),
    ],
)
def test_the_base_computes_in_another_dtype_than_it_is_stored_in(
    model_type, other, group, tiny_model, tiny_split, tmp_path
):
    config = experiment(lora={"rank": 2}, train={"max_steps": 3, "warmup_steps": 1})
    found = []
    for dtype in (None, other):
        train = config.train.model_copy(update={"fsdp2": Fsdp2Config(compute_dtype=dtype)})
        base = load_base(ModelConfig(name=str(tiny_model(model_type))))
        BACKENDS["fsdp2"].place(base, World(), train)
        changed = config.model_copy(update={"train": train})
        run = Run(base, tiny_split(model_type), changed, World(), TrainingData("d"))
        found.append([run.step().loss for _ in range(2)])
        run.save(tmp_path / str(dtype))
        run.audit_end(tmp_path / str(dtype))
        run.close()
    adapters = [
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("None", other)
    ]
    assert all(tensor.dtype == torch.float32 for tensor in adapters[1].values())
    assert found[1] != found[0]
    assert found[1] == pytest.approx(found[0], rel=0.02)


@pytest.mark.parametrize("setting", ["stage", "compute_dtype"])
def test_a_run_goes_on_with_what_results_do_not_depend_on(setting):
    sections = {
        "stage": {"backend": "deepspeed", "deepspeed": {"stage": 1, "offload_optimizer": True}},
        "compute_dtype": {"backend": "fsdp2", "fsdp2": {"compute_dtype": "bfloat16"}},
    }
    plain = experiment(train={"num_workers": 2})
    other = experiment(train={"num_workers": 2, **sections[setting]})
    assert (plain.fingerprint() == other.fingerprint()) == (setting == "stage")


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
        (
            "deepspeed",
            {"model": {"name": "demo", "dtype": "float16"}},
            r"model\.dtype=float16 exclude each other",
        ),
        ("fsdp2", {"train": {"num_workers": 1}}, "no effect with num_workers=1"),
        (
            "fsdp2",
            {"train": {"fsdp2": {"shard_size": 3}}},
            "shard_size=3 must divide num_workers=2",
        ),
        (
            "ddp",
            {"train": {"fsdp2": {"shard_size": 2}}},
            "shard_size=2 has no effect with backend=",
        ),
        (
            "fsdp2",
            {"train": {"deepspeed": {"stage": 1}}},
            "stage=1 has no effect with backend=fsdp2",
        ),
    ],
)
def test_what_a_backend_cannot_do_is_refused(backend, section, message):
    plain = experiment().model_dump(exclude_unset=True)
    train = {"backend": backend, "num_workers": 2, **section.get("train", {})}
    with pytest.raises(ValueError, match=message):
        ExperimentConfig.model_validate({**plain, **section, "train": train})


def test_a_missing_package_is_told_before_anything_starts():
    config = experiment(train={"backend": "deepspeed", "num_workers": 2})
    if find_spec("deepspeed"):
        check_packages(config.train)
    else:
        with pytest.raises(ConfigError, match=r"pip install 'raytune-vlm\[deepspeed\]'"):
            check_packages(config.train)


def compare(runs, name, step, setting, expected=None):
    """The same files with the same tensors as one worker's."""
    one = runs.folder / "one" / (expected or name) / str(step)
    two = runs.folder / setting / name / str(step)
    assert {file.name for file in one.iterdir()} == {file.name for file in two.iterdir()}
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        first, second = load_file(one / file), load_file(two / file)
        names = {key for key in first if not key.startswith("rng/")}
        assert names == {key for key in second if not key.startswith("rng/")}
        for key in names:
            # AdamW's first steps divide a gradient by its size: what rounding does to a small one
            # is not small beside the update.
            atol = 1e-4 * max(1e-7, float(first[key].abs().max()))
            assert torch.allclose(first[key], second[key], rtol=1e-3, atol=atol), key
