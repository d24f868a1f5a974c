"""One update for all slots does to each what torch's clipping and AdamW would do to it alone."""

from __future__ import annotations

import math

import pytest
import torch
from made import experiment
from torch.utils._python_dispatch import TorchDispatchMode

from raytune_vlm.packed.host import Host
from raytune_vlm.packed.slot import Slot
from raytune_vlm.packed.update import Flat, Gradients
from raytune_vlm.train.batches import TrainingData
from raytune_vlm.train.run import Run
from raytune_vlm.train.world import World

LIMITS = (1.0, 100.0, 0.3, 1e-3)
RATES = (1e-3, 3e-2, 2e-4, 1e-2)
DECAYS = (0.0, 0.1, 0.01, 1.0)


def optimizer(number):
    """AdamW over odd shapes; two groups, as with LoRA+, in every second slot."""
    generator = torch.Generator().manual_seed(number)
    weights = [
        torch.nn.Parameter(torch.randn(shape, generator=generator))
        for shape in ((4 + number, 17), (23, 4 + number), (5,), (3, 7))
    ]
    groups = [{"params": weights, "lr": RATES[number]}]
    if number % 2:
        groups = [
            {"params": weights[:1], "lr": RATES[number]},
            {"params": weights[1:], "lr": RATES[number] * 4},
        ]
    return torch.optim.AdamW(groups, weight_decay=DECAYS[number], foreach=True)


def weights(made):
    return [weight for group in made.param_groups for weight in group["params"]]


def give(made, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for weight in weights(made):
        weight.grad = torch.randn(weight.shape, generator=generator) * scale


def step_alone(made, limit):
    norm = float(torch.nn.utils.clip_grad_norm_(weights(made), limit))
    made.step()
    return norm


def state(made):
    kept = [made.state[weight] for weight in weights(made)]
    return [weight.detach().clone() for weight in weights(made)] + [
        entry[key].clone() for entry in kept for key in ("exp_avg", "exp_avg_sq", "step")
    ]


def test_every_slot_gets_torchs_clipping_and_adamw():
    ours, torchs = ([optimizer(number) for number in range(4)] for _ in range(2))
    flats = [Flat(made) for made in ours]
    for number in range(4):  # slots that joined earlier have done more steps
        for turn in range(number):
            for made in (ours[number], torchs[number]):
                give(made, turn)
                step_alone(made, LIMITS[number])
    for turn in range(4):
        for made in (*ours, *torchs):
            number = (*ours, *torchs).index(made) % 4
            give(made, 10 * turn + number)
            for group in made.param_groups:
                group["lr"] *= 0.9
            if turn == 2:
                made.param_groups[-1]["params"][-1].grad = None
        if turn == 3:  # a slot steps by itself, and goes on with the others after
            step_alone(ours[0], LIMITS[0])
            give(ours[0], 99)
            step_alone(torchs[0], LIMITS[0])
            give(torchs[0], 99)
        gradients = Gradients(flats)
        gradients.use([True] * 4, LIMITS)
        for number, made in enumerate(torchs):
            for weight in weights(made):
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            norm = step_alone(made, LIMITS[number])
            assert gradients.norms[number] == pytest.approx(norm, rel=1e-6)
    for mine, theirs in zip(ours, torchs, strict=True):
        for found, expected in zip(state(mine), state(theirs), strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7)


def test_what_is_not_finite_is_left_and_its_neighbours_do_not_notice():
    made, without = [optimizer(number) for number in range(3)], [optimizer(n) for n in (0, 2)]
    flats, flats_without = [Flat(own) for own in made], [Flat(own) for own in without]
    for turn in range(3):
        for number, own in enumerate(made):
            give(own, 10 * turn + number)
        for number, own in zip((0, 2), without, strict=True):
            give(own, 10 * turn + number)
        if turn == 1:
            weights(made[1])[2].grad[3] = math.nan
        before = state(made[1]) if turn else None
        gradients = Gradients(flats)
        usable = [math.isfinite(norm) for norm in gradients.norms]
        assert usable == [True, turn != 1, True]
        gradients.use(usable, LIMITS[:3])
        Gradients(flats_without).use([True, True], (LIMITS[0], LIMITS[2]))
        if turn == 1:
            assert all(map(torch.equal, state(made[1]), before))
    for own, alone in zip((made[0], made[2]), without, strict=True):
        assert all(map(torch.equal, state(own), state(alone)))


class _Calls(TorchDispatchMode):
    """Counts what works on numbers: views do not."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_sixteen_slots_take_no_more_calls_than_one():
    counts = []
    for slots in (1, 4, 16):
        made = [optimizer(number % 4) for number in range(slots)]
        flats = [Flat(own) for own in made]
        for turn in range(2):
            for own in made:
                give(own, turn)
            with _Calls() as calls:
                Gradients(flats).use([True] * slots, [1.0] * slots)
        counts.append(calls.names)
    assert counts[0] == counts[1] == counts[2]
    assert len(counts[0]) < 20


@pytest.fixture
def slots(tiny_base, tiny_split):
    """Slots on a tiny base, three times the same; closed at the end."""
    recipes = (
        {"train.learning_rate": 3e-3, "lora.loraplus_ratio": 4.0},
        {"lora.rank": 8, "train.weight_decay": 0.1, "train.max_grad_norm": 0.01},
    )
    opened = []

    def made():
        for recipe in recipes:
            config = experiment(
                lora={"rank": 4}, train={"max_steps": 12, "batch_size": 4, "micro_batch_size": 4}
            ).with_recipe(recipe)
            run = Run(
                tiny_base("idefics3"), tiny_split("idefics3"), config, World(), TrainingData("d")
            )
            opened.append(Slot(run, "cpu"))
        return opened[-len(recipes) :]

    yield made
    for slot in opened:
        slot.close()


def stepped(host, slots, count):
    for _ in range(count):
        outcomes = host.step(slots)
    return outcomes


def test_a_restored_slot_goes_on_with_the_others(slots, tiny_base, tmp_path):
    host = Host(tiny_base("idefics3"), "fast")
    whole, begun, restored = slots(), slots(), slots()
    stepped(host, whole, 4)
    stepped(host, begun, 2)
    stepped(host, restored, 1)  # end to end already when the checkpoint replaces its state
    for number, (slot, other) in enumerate(zip(begun, restored, strict=True)):
        folder = tmp_path / str(number) / "step_000002"
        with slot.mounted() as run:
            run.save(folder)
        with other.mounted() as run:
            run.restore(folder)
    stepped(host, restored, 2)
    for slot, other in zip(whole, restored, strict=True):
        assert all(map(torch.equal, state(slot.run.optimizer), state(other.run.optimizer)))


def test_one_slots_gradient_of_nan_is_counted_and_skipped(slots, tiny_base):
    host = Host(tiny_base("idefics3"), "fast")
    struck, other = slots()
    stepped(host, [struck, other], 1)
    before, steps = state(struck.run.optimizer), state(other.run.optimizer)
    hook = weights(struck.run.optimizer)[0].register_hook(lambda gradient: gradient * math.nan)
    first, second = stepped(host, [struck, other], 1)
    hook.remove()
    assert (first.skipped, first.skipped_steps, second.skipped) == (True, 1, False)
    assert math.isfinite(first.loss) and "no update at step 2" in struck.run.auditor.notes[0]
    assert all(map(torch.equal, state(struck.run.optimizer), before))
    assert not any(map(torch.equal, state(other.run.optimizer), steps))
    first, second = stepped(host, [struck, other], 1)
    assert (first.step, first.skipped, first.skipped_steps) == (3, False, 1)
    assert struck.run.optimizer.state[weights(struck.run.optimizer)[0]]["step"] == 2


def test_another_kind_of_adamw_is_updated_by_itself_and_told(slots, tiny_base):
    host = Host(tiny_base("idefics3"), "fast")
    made = slots()
    made[1].run.optimizer.param_groups[0]["amsgrad"] = True
    assert not any(isinstance(outcome, Exception) for outcome in stepped(host, made, 1))
    assert "amsgrad" in host.notes[0] and "1 from here on" in host.notes[0]
    assert "max_exp_avg_sq" in next(iter(made[1].run.optimizer.state.values()))
