"""Rows of one pass, each through its own adapter: what PEFT's layers give one after another."""

from __future__ import annotations

import copy
from collections import Counter

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from raytune_vlm.models.lora import ADAPTER
from raytune_vlm.packed.random import RandomState
from raytune_vlm.packed.routing import Share, routed

IN, OUT, TOKENS = 12, 20, 5


def adapted(base, rank, number, second=None):
    """PEFT's layer on a copy of the base; `second`: the rank of another adapter of it."""
    config = peft.LoraConfig(r=rank, lora_alpha=3 + number, target_modules=["0"])
    config.init_lora_weights = False
    torch.manual_seed(number)
    model = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=ADAPTER)
    if second is not None:
        model.add_adapter("start", peft.LoraConfig(r=second, target_modules=["0"]))
        model.base_model.set_adapter([ADAPTER, "start"])
        torch.nn.init.normal_(model.get_submodule("base_model.model.0").lora_B["start"].weight)
    return model.get_submodule("base_model.model.0")


def shares(layers, rows):
    ends = [sum(rows[: number + 1]) for number in range(len(rows))]
    return [
        Share({"0": layer}, slice(end - own, end), TOKENS, RandomState("cpu"))
        for layer, end, own in zip(layers, ends, rows, strict=True)
    ]


def factors(layers):
    return [
        part[name].weight
        for layer in layers
        for part in (layer.lora_A, layer.lora_B)
        for name in layer.active_adapters
    ]


def gradients(layers, inputs, output):
    (output * torch.linspace(-1, 1, OUT)).sum().backward()
    found = [inputs.grad, *(weight.grad for weight in factors(layers))]
    for tensor in (inputs, *factors(layers)):
        tensor.grad = None
    return found


def both_ways(base, layers, rows):
    """Output and gradients of all, one after another and in one pass."""
    inputs = torch.randn(sum(rows), TOKENS, IN, requires_grad=True)
    own = shares(layers, rows)
    apart = torch.cat([layer(inputs[share.rows]) for layer, share in zip(layers, own, strict=True)])
    expected = [apart.detach(), *gradients(layers, inputs, apart)]
    with routed(base, own):
        together = base(inputs)
        found = [together.detach(), *gradients(layers, inputs, together)]
    return expected, found


@pytest.mark.parametrize(
    "ranks, rows, seconds",
    [
        ((4, 4, 4), (2, 2, 2), (None, None, None)),
        ((8, 1, 4), (2, 2, 2), (None, None, None)),
        ((4, 2, 4), (2, 2, 2), (4, None, None)),
        ((4, 4, 4), (2, 2, 2), (4, 4, 4)),
        ((8, 1, 4), (1, 3, 2), (None, 2, None)),
    ],
)
def test_each_row_goes_through_its_own_adapter(ranks, rows, seconds):
    base = torch.nn.Sequential(torch.nn.Linear(IN, OUT))
    base.requires_grad_(False)
    layers = [
        adapted(base, rank, number, second)
        for number, (rank, second) in enumerate(zip(ranks, seconds, strict=True))
    ]
    expected, found = both_ways(base, layers, rows)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_rows_of_a_slot_without_an_adapter_here_are_the_bases():
    base = torch.nn.Sequential(torch.nn.Linear(IN, OUT)).requires_grad_(False)
    layers = [adapted(base, 4, number) for number in range(2)]
    first, last = shares(layers, (2, 1))
    own = [first, Share({}, slice(2, 4), TOKENS, RandomState("cpu")), last]
    own[2] = Share(last.layers, slice(4, 5), TOKENS, last.random)
    inputs = torch.randn(5, TOKENS, IN)
    with routed(base, own):
        found = base(inputs)
    expected = torch.cat([layers[0](inputs[:2]), base(inputs[2:4]), layers[1](inputs[4:])])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_not_a_number_stays_with_its_rows():
    base = torch.nn.Sequential(torch.nn.Linear(IN, OUT)).requires_grad_(False)
    layers = [adapted(base, rank, number) for number, rank in enumerate((4, 2, 8))]
    with torch.no_grad():
        layers[1].lora_B[ADAPTER].weight.fill_(float("nan"))
    expected, found = both_ways(base, layers, (2, 2, 2))
    assert not found[0][2:4].isfinite().any()
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5, equal_nan=True)


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view:
            self.names[str(function)] += 1
        return function(*args, **(kwargs or {}))


def test_sixteen_adapters_of_one_rank_take_no_more_calls_than_two():
    base = torch.nn.Sequential(torch.nn.Linear(IN, OUT)).requires_grad_(False)
    counts = []
    for slots in (2, 16):
        layers = [adapted(base, 4, number) for number in range(slots)]
        inputs = torch.randn(slots, TOKENS, IN, requires_grad=True)
        with _Calls() as calls, routed(base, shares(layers, [1] * slots)):
            base(inputs).sum().backward()
        counts.append(calls.names)
    assert counts[0] == counts[1]
