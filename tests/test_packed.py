"""Packed execution: every slot ends where an isolated PEFT run ends, whoever its neighbours are."""

from __future__ import annotations

import pytest
import torch
from made import experiment

from raytune_vlm.errors import InfrastructureError
from raytune_vlm.packed.host import Host
from raytune_vlm.packed.planner import Probe, chosen, measure, why_no_more
from raytune_vlm.packed.routing import _Adding
from raytune_vlm.packed.slot import Slot
from raytune_vlm.records import read_json
from raytune_vlm.train.batches import TrainingData
from raytune_vlm.train.run import Run
from raytune_vlm.train.world import World

STEPS = 3
FAMILIES = pytest.mark.parametrize("model_type", ["idefics3", "qwen2_5_vl", "gemma3", "llava"])
RECIPES = [
    {},
    {"lora.rank": 8, "lora.alpha": 4.0, "lora.dropout": 0.1, "train.learning_rate": 3e-3},
    {"lora.rank": 2, "lora.rslora": True, "train.batch_size": 4, "train.micro_batch_size": 4},
    {"train.weight_decay": 0.1, "train.schedule": "constant", "seed": 3},
    {"train.micro_batch_size": 3, "lora.loraplus_ratio": 4.0},
    {"lora.init": "gaussian", "lora.dropout": 0.3, "seed": 5},
    {"lora.init": "olora", "train.max_grad_norm": 0.01},
    {"train.batch_size": 2, "train.micro_batch_size": 1, "lora.rank": 1, "train.warmup_steps": 0},
]


@pytest.fixture
def make(tiny_base, tiny_split):
    """Makes runs and slots, and takes them off the bases at the end."""
    opened = []

    def run(model_type, recipe, **lora):
        config = experiment(
            lora={"rank": 4, **lora},
            train={"max_steps": 12, "warmup_steps": 2, "batch_size": 8, "micro_batch_size": 8},
        ).with_recipe(recipe)
        return Run(
            tiny_base(model_type), tiny_split(model_type), config, World(), TrainingData("d")
        )

    def slot(model_type, recipe):
        opened.append(Slot(run(model_type, recipe), "cpu"))
        return opened[-1]

    def close(slot):
        opened.remove(slot)
        slot.close()

    run.slot, run.close = slot, close
    yield run
    for slot in opened:
        slot.close()


def weights(layers_or_run):
    model = layers_or_run.run.model if isinstance(layers_or_run, Slot) else layers_or_run.model
    if isinstance(layers_or_run, Slot):
        with layers_or_run.mounted():
            return trained(model)
    return trained(model)


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def alone(make, model_type, recipe, steps=STEPS):
    run = make(model_type, recipe)
    losses = [run.step().loss for _ in range(steps)]
    found = weights(run)
    run.close()
    return losses, found


def distance(found, expected):
    """Largest relative difference of a matrix (Frobenius norms)."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-12))
        for name in expected
    )


@FAMILIES
def test_eight_slots_end_where_they_would_alone(model_type, make, tiny_base):
    expected = [alone(make, model_type, recipe) for recipe in RECIPES]
    for mode, tolerance in (("exact", 0.0), ("fast", 1e-4)):
        slots = [make.slot(model_type, recipe) for recipe in RECIPES]
        host = Host(tiny_base(model_type), mode)
        steps = [host.step(slots) for _ in range(STEPS)]
        for number, (slot, (losses, adapter)) in enumerate(zip(slots, expected, strict=True)):
            assert [step[number].loss for step in steps] == pytest.approx(losses, rel=tolerance)
            assert distance(weights(slot), adapter) <= tolerance, (mode, number)
            make.close(slot)


def test_neighbours_that_come_and_go_change_nothing(make, tiny_base):
    _, expected = alone(make, "idefics3", RECIPES[1], steps=5)
    host = Host(tiny_base("idefics3"), "fast")
    slot, first, second = (make.slot("idefics3", RECIPES[n]) for n in (1, 2, 4))
    for neighbours in ([first], [first, second], [second], [], [second]):
        host.step([*neighbours, slot])
    assert distance(weights(slot), expected) <= 1e-4


def test_a_dropout_gradient_without_its_mask_is_found(make, tiny_base, monkeypatch):
    """The negative control: the tolerance above is tight enough to see mLoRA's mistake."""
    _, expected = alone(make, "idefics3", RECIPES[5])
    given = _Adding._given

    def unmasked(self, number, layer, part):
        right = given(self, number, layer, part)
        plain = part.to(right.dtype)
        return plain + (right - plain).detach()

    monkeypatch.setattr(_Adding, "_given", unmasked)
    slots = [make.slot("idefics3", RECIPES[n]) for n in (5, 0)]
    host = Host(tiny_base("idefics3"), "fast")
    for _ in range(STEPS):
        host.step(slots)
    assert distance(weights(slots[0]), expected) > 1e-2


def test_a_packed_step_is_divided_by_tokens_and_one_alone_has_its_own_time(make, tiny_base):
    slots = [make.slot("idefics3", RECIPES[number]) for number in (0, 7)]
    host = Host(tiny_base("idefics3"), "fast")
    first, second = (outcome.fed_tokens for outcome in host.step(slots))
    assert first > 2 * second
    assert host.seconds[0] / host.seconds[1] == pytest.approx(first / second)
    turns = Host(tiny_base("idefics3"), "exact")
    measured = [outcome.seconds for outcome in turns.step(slots)]
    assert all(own >= part > 0 for own, part in zip(turns.seconds, measured, strict=True))


def test_a_slot_that_is_not_finite_does_not_touch_its_neighbours(make, tiny_base):
    expected = [alone(make, "idefics3", RECIPES[number])[1] for number in (0, 2)]
    slots = [make.slot("idefics3", RECIPES[number]) for number in (0, 3, 2)]
    with torch.no_grad():
        next(iter(slots[1].layers.values())).lora_B["default"].weight.fill_(float("nan"))
    host = Host(tiny_base("idefics3"), "fast")
    for _ in range(STEPS):
        outcomes = host.step(slots)
    assert [outcome.skipped for outcome in outcomes] == [False, True, False]
    for slot, adapter in zip((slots[0], slots[2]), expected, strict=True):
        assert distance(weights(slot), adapter) <= 1e-4
    assert "diverged" in type(host.step(slots)[1]).__name__.lower()


def test_out_of_memory_packs_fewer_slots_and_the_results_stay(make, tiny_base):
    expected = [alone(make, "idefics3", RECIPES[number])[1] for number in (0, 1, 3, 5)]
    base = tiny_base("idefics3")
    slots = [make.slot("idefics3", RECIPES[number]) for number in (0, 1, 3, 5)]

    def out_of_memory(module, args, kwargs):
        if len(kwargs["input_ids"]) > 16:
            raise torch.OutOfMemoryError("more than 16 rows")

    hook = base.model.register_forward_pre_hook(out_of_memory, with_kwargs=True)
    host = Host(base, "fast")
    try:
        for _ in range(STEPS):
            host.step(slots)
    finally:
        hook.remove()
    assert len(host.notes) == 1 and "2 from here on" in host.notes[0]
    for slot, adapter in zip(slots, expected, strict=True):
        assert distance(weights(slot), adapter) <= 1e-4


def test_out_of_memory_on_a_sharded_base_ends_this_life_and_the_next_packs_fewer(
    make, tiny_base, tmp_path
):
    base, file = tiny_base("idefics3"), tmp_path / "packing.json"
    # One rank of two, by itself; the base is not really cut up.
    sharded = {"train.backend": "fsdp2", "train.num_workers": 2}
    slots = [make.slot("idefics3", RECIPES[number] | sharded) for number in (0, 1, 3)]
    error = torch.OutOfMemoryError("too many rows")

    def fail(*_):
        raise error

    embedding = base.model.get_input_embeddings()
    host = Host(base, "fast", limit_file=file)
    hook = embedding.register_forward_pre_hook(fail)
    with pytest.raises(InfrastructureError, match="3 slots at once on rank 0"):
        host.step(slots)
    assert read_json(file) == {"together": 2}
    error = RuntimeError("the connection to rank 1 is closed")
    with pytest.raises(RuntimeError, match="rank 1 is closed"):
        host.step(slots)
    hook.remove()
    assert read_json(file) == {"together": 2}, "it says nothing of the slots"
    rows = []
    hook = embedding.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    Host(base, "fast", limit_file=file).step(slots)
    hook.remove()
    assert max(rows) == 16


def test_recomputed_activations_draw_the_same_dropout(make, tiny_base):
    expected = [alone(make, "qwen2_5_vl", RECIPES[number])[1] for number in (1, 5)]
    base = tiny_base("qwen2_5_vl")
    recomputing = {"train.activation_checkpointing": {"text": True}}
    slots = [make.slot("qwen2_5_vl", RECIPES[number] | recomputing) for number in (1, 5)]
    slots.append(make.slot("qwen2_5_vl", RECIPES[0]))
    for _ in range(STEPS):
        Host(base, "fast").step(slots)
    layer = base.model.get_submodule("model.language_model.layers.0")
    assert not layer.gradient_checkpointing
    for slot, adapter in zip(slots[:2], expected, strict=True):
        assert distance(weights(slot), adapter) <= 1e-4


def test_a_slot_goes_on_alone_from_its_checkpoint(make, tiny_base, tmp_path):
    _, expected = alone(make, "idefics3", RECIPES[1], steps=4)
    slots = [make.slot("idefics3", RECIPES[number]) for number in (1, 0)]
    host = Host(tiny_base("idefics3"), "fast")
    for _ in range(2):
        host.step(slots)
    with slots[0].mounted() as run:
        run.save(tmp_path / "step_000002")
    for slot in slots:
        make.close(slot)
    run = make("idefics3", RECIPES[1])
    run.restore(tmp_path / "step_000002")
    for _ in range(2):
        run.step()
    assert distance(weights(run), expected) <= 1e-4
    run.close()


def test_tiles_in_cross_attention_are_not_taken_for_samples(make, tiny_base):
    _, expected = alone(make, "mllama", RECIPES[0], steps=1)
    slots = [make.slot("mllama", RECIPES[number]) for number in (0, 2)]
    host = Host(tiny_base("mllama"), "fast")
    assert host.obstacle(slots[0].run) == (
        "rows in the cross-attention of mllama are tiles, not samples"
    )
    host.step(slots)
    assert not host.notes and distance(weights(slots[0]), expected) == 0


@pytest.mark.parametrize(
    ("model_type", "neighbour"),
    [("florence2", {}), ("vision-encoder-decoder", {"train.pad_to_tokens": 64})],
)
def test_dropout_beside_an_encoder_is_drawn_as_by_itself(model_type, neighbour, make, tiny_base):
    """An encoder's rows are as long as those of all slots, or by chance as the decoder's."""
    recipes = [{"lora.dropout": 0.3, "train.micro_batch_size": 1}, neighbour]
    expected = [alone(make, model_type, recipe, steps=2)[1] for recipe in recipes]
    slots = [make.slot(model_type, recipe) for recipe in recipes]
    host = Host(tiny_base(model_type), "fast")
    for _ in range(2):
        host.step(slots)
    assert not host.notes
    for slot, adapter in zip(slots, expected, strict=True):
        assert distance(weights(slot), adapter) <= 1e-4


def test_slots_are_added_while_they_pay():
    def probes(*speeds):
        return [Probe(2**power, speed) for power, speed in enumerate(speeds)]

    assert chosen([]) == chosen(probes(10.0)) == 1
    assert chosen(probes(10.0, 18.0, 25.0)) == 4
    assert chosen(probes(10.0, 18.0, 18.5)) == 2
    assert why_no_more([], 8, None) is None
    assert why_no_more(probes(10.0, 18.0), 8, None) is None
    assert why_no_more(probes(10.0, 18.0, 18.5), 8, None) == "4 gained +3% over 2"
    assert "more than the 7 trials" in (why_no_more(probes(10.0, 18.0, 25.0), 7, None) or "")
    assert why_no_more(probes(10.0), 8, None, together=1) == "more than 1 did not fit before"
    assert why_no_more(probes(10.0), 8, None, together=2) is None
    near = [Probe(1, 10.0, 40), Probe(2, 18.0, 50)]
    assert why_no_more(near, 8, 78) is None  # four would take 70
    assert "would take" in (why_no_more(near, 8, 77) or "")


def test_the_planner_measures_runs_and_takes_them_off(make, tiny_base):
    base = tiny_base("idefics3")
    before = {name: id(module) for name, module in base.model.named_modules()}
    beats = []
    host = Host(base, "fast")
    probes, reason = measure(
        host, lambda number: make("idefics3", {"seed": number}), World(), 2, lambda: beats.append(1)
    )
    assert [probe.slots for probe in probes] == [1, 2] and len(beats) == 8
    assert all(probe.tokens_per_second > 0 for probe in probes) and reason
    assert {name: id(module) for name, module in base.model.named_modules()} == before
