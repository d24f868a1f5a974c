"""The loss at labelled positions only: that of all logits, without making them."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from made import experiment
from plain_loss import plain_loss
from remote_code import CLASSES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from raytune_vlm.models.lora import output_layer
from raytune_vlm.models.tiny import BUILDERS
from raytune_vlm.packed.host import Host
from raytune_vlm.packed.slot import Slot
from raytune_vlm.train import output_layer as chunks
from raytune_vlm.train.output_layer import TokenLosses
from raytune_vlm.train.run import Run, TrainingData
from raytune_vlm.train.world import World

FAMILY = pytest.mark.parametrize("model_type", [*sorted(BUILDERS), *sorted(CLASSES)])


class Rows(TorchDispatchMode):
    """The most rows that a tensor as wide as a model's vocabulary has, its weights left out."""

    def __init__(self, model):
        super().__init__()
        self.most = 0
        self._width = output_layer(model).out_features
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            wide = isinstance(value, torch.Tensor) and value.shape[-1:] == (self._width,)
            if wide and value.untyped_storage().data_ptr() not in self._weights:
                self.most = max(self.most, value.numel() // self._width)
        return out


@pytest.fixture
def make(tiny_base, tiny_split):
    def run(model_type, **lora):
        train = {"max_steps": 12, "warmup_steps": 2, "batch_size": 8, "micro_batch_size": 8}
        config = experiment(lora={"rank": 4, **lora}, train=train)
        return Run(
            tiny_base(model_type), tiny_split(model_type), config, World(), TrainingData("d")
        )

    return run


@pytest.fixture
def opened(make):
    """A run whose adapter has an effect, the parameters in training, a batch and its labels."""

    @contextmanager
    def begin(model_type, **lora):
        run = make(model_type, **lora)
        try:
            trained = [p for p in run.model.parameters() if p.requires_grad]
            with torch.no_grad():
                for parameter in trained:  # B is zero, and so would be the gradients of A
                    parameter.add_(0.01)
            found = run.batches.step(0)[0]
            yield run.model, trained, *run.batches.on_device(found.arrays, found.rows)
        finally:
            run.close()

    return begin


def gradients(loss, trained):
    found = torch.autograd.grad(loss, trained, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


def wanted(model, trained, batch, labels):
    """Loss and gradients by all logits."""
    loss = plain_loss(model(**batch).logits, labels)
    return loss.detach(), gradients(loss, trained)


def close(found, expected):
    loss, gradient = found
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    assert (gradient - expected[1]).norm() < 1e-5 * expected[1].norm()


@FAMILY
def test_loss_and_gradients_are_those_of_all_logits(model_type, opened, monkeypatch):
    with opened(model_type) as (model, trained, batch, labels):
        expected = wanted(model, trained, batch, labels)
        losses, said = TokenLosses(model), []
        for size in (chunks.CHUNK_TOKENS, 7):
            monkeypatch.setattr(chunks, "CHUNK_TOKENS", size)
            with Rows(model) as rows:
                found = losses(batch, labels, said.append)
                gradient = gradients(found.sum(), trained)
            close((found.sum(), gradient), expected)
            assert len(found) == (labels[:, 1:] != -100).sum()
            assert 0 < rows.most <= min(size, len(found)) < labels.numel()
        assert said == []


def test_gemmas_cap_is_put_on(opened):
    with opened("gemma4") as (model, trained, batch, labels):
        text = model.config.get_text_config()
        text.final_logit_softcapping = 2.0
        try:
            expected = wanted(model, trained, batch, labels)
            said = []
            loss = TokenLosses(model)(batch, labels, said.append).sum()
            close((loss, gradients(loss, trained)), expected)
            assert said == []
        finally:
            text.final_logit_softcapping = None


def test_without_a_label_the_backward_pass_gives_zeros(opened):
    with opened("idefics3") as (model, trained, batch, labels):
        found = TokenLosses(model)(batch, torch.full_like(labels, -100), print)
        assert found.shape == (0,)
        parts = torch.autograd.grad(found.sum(), trained)
        assert all(torch.equal(part, torch.zeros_like(part)) for part in parts)


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("scaled", "idefics3 changes logits behind its output layer"),
        ("shaped", "idefics3 fails behind its output layer (shape"),
        ("twice", "idefics3 uses its output layer 2 times"),
        ("trained", "idefics3 trains its output layer"),
    ],
)
def test_a_model_that_is_not_followed_makes_all_logits_and_it_is_said_once(
    case, why, opened, monkeypatch
):
    with opened("idefics3", dropout=0.3) as (model, trained, batch, labels):
        base, layer = model.get_base_model(), output_layer(model)
        forward = base.forward

        def changed(**inputs):
            found = forward(**inputs)
            if case == "scaled":
                found.logits = found.logits * 2
            elif case == "shaped":
                found.logits = found.logits.view(*inputs["input_ids"].shape, -1)
            elif case == "twice":
                layer(torch.zeros(1, 1, layer.in_features))
            return found

        monkeypatch.setattr(base, "forward", changed)
        layer.weight.requires_grad_(case == "trained")
        model.train()
        losses, said = TokenLosses(model), []
        try:
            for seed in (1, 2):
                torch.manual_seed(seed)
                expected = wanted(model, trained, batch, labels)
                torch.manual_seed(seed)
                loss = losses(batch, labels, said.append).sum()
                close((loss, gradients(loss, trained)), expected)
        finally:
            layer.weight.requires_grad_(False)
            model.eval()
        (told,) = said
        assert told.startswith("all positions go through the output layer") and why in told


@pytest.mark.parametrize("slots", [1, 2])
def test_a_step_makes_logits_of_labelled_tokens_only(slots, make, tiny_base):
    base = tiny_base("idefics3")
    parked = [Slot(make("idefics3"), "cpu") for _ in range(slots)]
    try:
        host = Host(base, "fast")
        host.step(parked)  # with the audit
        with Rows(base.model) as rows:
            outcomes = host.step(parked)
    finally:
        for slot in parked:
            slot.close()
    assert rows.most == sum(outcome.labelled_tokens for outcome in outcomes)
    assert rows.most < min(outcome.tokens for outcome in outcomes)
