"""Training with a teacher: its loss, what a run makes of it, and what is refused."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import asdict

import pytest
import torch
from made import experiment
from pydantic import ValidationError
from torch.nn.functional import cross_entropy, softmax

from raytune_vlm.collate.features import Features
from raytune_vlm.config.distillation import DistillationConfig
from raytune_vlm.config.search_space import search_space_problems
from raytune_vlm.errors import ModelError
from raytune_vlm.models.adapter_file import save_adapter
from raytune_vlm.models.lora import attach, detach
from raytune_vlm.models.teacher import check_teacher, load_teacher
from raytune_vlm.packed.host import Host
from raytune_vlm.sweep.export import own_experiment
from raytune_vlm.train.objective import Teacher, distilled
from raytune_vlm.train.prediction import predict
from raytune_vlm.train.run import Run, TrainingData
from raytune_vlm.train.world import World

TRAIN = {"max_steps": 30, "warmup_steps": 1, "batch_size": 8, "micro_batch_size": 8}
LORA = {"rank": 4, "dropout": 0.0}


@pytest.fixture(scope="module")
def taught(tiny_base, tiny_model, tmp_path_factory):
    """Family -> the folder of an adapter that changes what its tiny model answers."""
    made = {}

    def folder(model_type):
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp("adapter")
            base = tiny_base(model_type)
            model = attach(base.model, base.family, experiment(lora=LORA).lora, seed=1)
            torch.manual_seed(2)
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    torch.nn.init.normal_(parameter, std=0.3)
            save_adapter(model, made[model_type])
            base.model = detach(model)
        return made[model_type]

    return folder


@pytest.fixture
def with_teacher(tiny_model, taught):
    """An experiment on a tiny model whose teacher is that model with an adapter."""

    def make(model_type="idefics3", *, name=None, train=None, **distillation):
        model = str(name or tiny_model(model_type))
        own = {"teacher": model, "adapter": str(taught(model_type)), **distillation}
        plain = {**TRAIN, **(train or {}), "distillation": own}
        return experiment(model, lora=LORA, train=plain)

    return make


@pytest.fixture
def opened(tiny_base, tiny_split):
    """A run as a context manager."""

    @contextmanager
    def begin(config, teacher=None, model_type="idefics3"):
        base, split = tiny_base(model_type), tiny_split(model_type)
        run = Run(base, split, config, World(), TrainingData("d"), teacher=teacher)
        try:
            yield run
        finally:
            run.close()

    return begin


def batch_of(run):
    """A micro-batch of the first step, as the model takes it, and its labels."""
    found = run.batches.step(0)[0]
    return run.batches.on_device(found.arrays, found.rows)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_chunks_give_what_whole_tables_give(with_teacher, opened, cap):
    config = with_teacher("gemma4", weight=0.3, temperature=2.0)
    teacher = load_teacher(config, "cpu").model
    with opened(config, Teacher(load_teacher(config, "cpu")), "gemma4") as run:
        for model in (teacher, run.model):
            model.config.get_text_config().final_logit_softcapping = cap
        batch, labels = batch_of(run)
        trained = [p for p in run.model.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter in trained:  # B is zero, and so would be the gradients of A
                parameter.add_(0.01)
        chosen, targets = labels[:, 1:] != -100, labels[:, 1:][labels[:, 1:] != -100]
        with torch.no_grad():
            p = softmax(teacher(**batch).logits[:, :-1][chosen] / 2, dim=1)
        logits = run.model(**batch).logits[:, :-1][chosen]
        entropy = cross_entropy(logits, targets, reduction="sum")
        divergence = (p * (p.log() - softmax(logits / 2, dim=1).log())).sum()
        whole = 0.7 * entropy + 0.3 * 4 * divergence
        expected = torch.autograd.grad(whole, trained)
        for size in (1, 7, 10_000):
            sized = config.train.distillation.model_copy(update={"chunk_tokens": size})
            found = distilled(run.model, teacher, batch, batch, labels, sized)
            torch.testing.assert_close(
                found, torch.stack([whole, entropy, divergence]), rtol=1e-5, atol=1e-5
            )
            gradients = torch.autograd.grad(found[0], trained)
            difference = torch.cat(
                [(a - b).flatten() for a, b in zip(gradients, expected, strict=True)]
            )
            norm = torch.cat([a.flatten() for a in expected]).norm()
            assert difference.norm() < 1e-5 * norm
        run.model.config.get_text_config().final_logit_softcapping = None


def test_a_padded_vocabulary_is_left_out_of_the_divergence():
    from raytune_vlm.train.objective import divergences

    torch.manual_seed(0)
    longer, shorter = torch.randn(5, 12), torch.randn(5, 9)
    targets = torch.arange(5)
    found = divergences(longer, shorter, targets, 1.0)
    assert torch.equal(found[:, 0], cross_entropy(shorter, targets, reduction="none"))
    assert torch.equal(found, divergences(longer[:, :9], shorter, targets, 1.0))
    padded = divergences(longer[:, :9], torch.cat([shorter, longer[:, 9:]], 1), targets, 1)
    assert torch.equal(found[:, 1], padded[:, 1])


def test_a_student_comes_nearer_to_its_teacher(with_teacher, opened):
    config = with_teacher(train={"learning_rate": 1e-2}, weight=1.0)
    base = load_teacher(config, "cpu")
    with opened(config, Teacher(base, Features(base, "cpu", 1 << 30))) as run:
        steps = [run.step() for _ in range(30)]
        assert Host(base, "fast").obstacle(run).startswith("train.distillation")
    first, last = (sum(s.kl_divergence for s in part) for part in (steps[:4], steps[-4:]))
    assert last < 0.5 * first
    for step in steps:
        assert step.loss == pytest.approx(step.kl_divergence)
    assert steps[0].cross_entropy > 1


def test_the_loss_does_not_depend_on_micro_batches_or_features(with_teacher, opened):
    losses = []
    for train, kept in (({}, False), ({"micro_batch_size": 3}, False), ({}, True)):
        config = with_teacher(train=train, temperature=3.0)
        base = load_teacher(config, "cpu")
        features = Features(base, "cpu", 1 << 30) if kept else None
        with opened(config, Teacher(base, features)) as run:
            losses.append([run.step().loss for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_packed_rows_are_taught_as_single_ones(with_teacher, opened):
    steps = []
    whole = {"batch_size": 40, "micro_batch_size": 40}
    for train in (whole, {"batch_size": 1, "micro_batch_size": 1, "pack_tokens": 2048}):
        config = with_teacher("qwen2_5_vl", train=train)
        with opened(config, Teacher(load_teacher(config, "cpu")), "qwen2_5_vl") as run:
            steps.append(run.step())
    assert [step.samples for step in steps] == [40, 40]
    assert steps[0].kl_divergence > 0
    assert steps[1].kl_divergence == pytest.approx(steps[0].kl_divergence, rel=1e-3)


def test_the_own_base_is_no_distance_away_and_weight_0_is_no_teacher(
    with_teacher, tiny_model, opened
):
    config = with_teacher(adapter=None)
    with opened(config, Teacher(load_teacher(config, "cpu"))) as run:
        step = run.step()
        assert step.kl_divergence == pytest.approx(0, abs=1e-6)
        assert step.loss == pytest.approx(step.cross_entropy / 2)
    space = {"train.distillation.weight": {"type": "choice", "values": [0, 0.5]}}
    plain = with_teacher().model_dump()
    plain["sweep"] = {"scheduler": {"type": "fifo"}, "search_space": space}
    searched = type(config).model_validate(plain)
    without = experiment(str(tiny_model("idefics3")), lora=LORA, train=TRAIN)
    steps = []
    for used in (searched.with_recipe({"train.distillation.weight": 0}), without):
        with opened(used) as run:
            steps.append([asdict(run.step()) for _ in range(2)])
    for one, other in zip(*steps, strict=True):
        assert (one["loss"], one["grad_norm"]) == (other["loss"], other["grad_norm"])
        assert one["cross_entropy"] is None and one["kl_divergence"] is None
    alone = own_experiment(searched, {"train.distillation.weight": 0}, "best")
    assert alone.train.distillation == DistillationConfig()
    type(config).model_validate(alone.model_dump())


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            {"distillation": {"weight": 0.3}},
            "weight=0.3 has no effect without distillation.teacher",
        ),
        ({"distillation": {"teacher": "demo", "weight": 0}}, "teacher=demo has no effect"),
        (
            {"distillation": {"teacher": "demo"}, "backend": "fsdp2", "num_workers": 2},
            "teacher=demo and backend=fsdp2 exclude each other",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(train, message):
    with pytest.raises(ValidationError, match=message):
        experiment(train={**TRAIN, **train})


def test_weight_and_temperature_are_searched_and_the_teacher_is_shared():
    plain = experiment(train={**TRAIN, "distillation": {"teacher": "demo"}}).model_dump()

    def problems(**space):
        plain["sweep"] = {"scheduler": {"type": "fifo"}}
        plain["sweep"]["search_space"] = {
            f"train.distillation.{key}": value for key, value in space.items()
        }
        return list(search_space_problems(type(experiment()).model_validate(plain)))

    assert not problems(
        weight={"type": "uniform", "lower": 0, "upper": 1},
        temperature={"type": "loguniform", "lower": 0.5, "upper": 8},
    )
    assert "is not valid" in problems(weight={"type": "uniform", "lower": 0, "upper": 2})[0][1]
    shared = problems(teacher={"type": "choice", "values": ["demo", "other"]})
    assert "all trials of the sweep share it" in shared[0][1]


def test_a_teacher_that_cannot_be_shown_the_same_batches_is_refused(
    with_teacher, tiny_model, tmp_path
):
    check_teacher(with_teacher())
    check_teacher(experiment())
    own = tiny_model("idefics3")

    def refused(message, **distillation):
        with pytest.raises(ModelError, match=message):
            check_teacher(with_teacher(**distillation))

    refused("'qwen2_5_vl', that of model.name=", teacher=str(tiny_model("qwen2_5_vl")))
    refused(
        "^train.distillation.teacher='no/where/at/all': no such folder", teacher="no/where/at/all"
    )
    refused(r"it holds no adapter_config.json", adapter=str(tmp_path))
    for number, (name, change, message) in enumerate(
        [
            ("tokenizer.json", ("<image>", "<picture>"), "its tokenizer's id of '<"),
            ("processor_config.json", ('"longest_edge": 64', '"longest_edge": 32'), "longest_edge"),
        ]
    ):
        folder = tmp_path / str(number)
        shutil.copytree(own, folder)
        changed = [file for file in folder.glob("*.json") if change[0] in file.read_text()]
        assert folder / name in changed
        for file in changed:
            file.write_text(file.read_text().replace(*change))
        refused(message, teacher=str(folder))


def test_an_adapter_that_does_not_fit_the_teacher_is_refused(with_teacher, taught, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(taught("idefics3"), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = config["target_modules"][:1]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not fit the teacher at base_model"):
        load_teacher(with_teacher(adapter=str(folder)), "cpu")


def test_the_prediction_counts_the_teacher(with_teacher, tiny_base, taught, tiny_split):
    config = with_teacher()
    samples = [tiny_split("idefics3").encoded(row) for row in range(4)]
    with_one = predict(config, samples)
    train = config.train.model_copy(update={"distillation": DistillationConfig()})
    without = predict(config.model_copy(update={"train": train}), samples)
    model = tiny_base("idefics3").model
    held = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    adapter = (taught("idefics3") / "adapter_model.safetensors").stat().st_size
    assert with_one.weights - without.weights == sum(held.values()) + adapter
    assert with_one.activations and not with_one.obstacle
