"""Prompts to several slots side by side in a batch, each row through its own slot's adapter.

As in training (`routing`) the adapters are beside the base, and hooks add what they would add. An
answer takes a pass for every token, so there a layer must not do more for many slots than for one:
their A lie one below the other in one matrix, their B side by side in another, and between the two
products a row's numbers of other slots' ranks are set to zero. Nothing of a neighbour is added, as
all weights are finite: no update is made of gradients that are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from raytune_vlm.collate.features import Features
from raytune_vlm.config.evaluation import EvaluationConfig
from raytune_vlm.evaluate.adapters import Asking
from raytune_vlm.evaluate.generate import Prompts
from raytune_vlm.evaluate.scoring import Prediction
from raytune_vlm.models.loading import Base
from raytune_vlm.monitor import Say
from raytune_vlm.packed.routing import check_rows

Layers = Mapping[str, Any]
"""Full name in the base -> a slot's LoRA layer (PEFT's); see `Slot.layers`."""


def answer_side_by_side(
    base: Base,
    slots: Mapping[str, Layers],
    split: Prompts,
    rows: Mapping[str, Sequence[int]],
    config: EvaluationConfig,
    *,
    device: str = "cpu",
    keep_going: Callable[[int], bool] = lambda done: True,
    keep: Callable[[str, Sequence[Prediction]], None] = lambda name, answers: None,
    features: Features | None = None,
    say: Say = lambda message: None,
) -> dict[str, list[Prediction]] | None:
    """The answers of parked slots to prompts of one split; None if `keep_going` said no.

    The texts are those of `generate` with each slot mounted. Only slots for which
    `models.lora.unmixable` knows nothing can be asked; arguments as for `generate_many`.

    Raises
    ------
    ModelError
        If a layer is not given the rows of a batch. What was answered before is right.
    """
    asking = Asking(base, split, rows, config, device, keep_going, keep, say)
    base.model.eval()
    together = _SideBySide(base.model, slots, device)
    if not asking.ask(together, slots, {name: name for name in slots}, features):
        return None
    return asking.answers()


class _SideBySide:
    """The bare base and several slots, as far as a model is asked for answers.

    What else is asked of the base in between (`Features`) does not go through the slots.
    """

    def __init__(self, model: Any, slots: Mapping[str, Layers], device: str) -> None:
        self._model, self._device = model, device
        names = dict.fromkeys(name for own in slots.values() for name in own)
        self._hooks = {name: _Adding(name, slots) for name in names}
        self.generation_config = model.generation_config

    def generate(self, *, adapter_names: Sequence[str], **options: Any) -> torch.Tensor:
        """The base's `generate`; `adapter_names`: the slot of each row."""
        places = {
            slot: torch.tensor(
                [row for row, own in enumerate(adapter_names) if own == slot], device=self._device
            )
            for slot in dict.fromkeys(adapter_names)
        }
        with ExitStack() as stack:
            for name, hook in self._hooks.items():
                hook.begin(len(adapter_names), places)
                layer = self._model.get_submodule(name)
                stack.callback(layer.register_forward_hook(hook).remove)
            output: torch.Tensor = self._model.generate(**options)
        return output


class _Adding:
    """The forward hook of one linear layer."""

    def __init__(self, name: str, slots: Mapping[str, Layers]) -> None:
        self._name = name
        found = {slot: _matrices(own[name]) for slot, own in slots.items() if name in own}
        self._down = torch.cat([down for down, _ in found.values()]).T
        self._up = torch.cat([up for _, up in found.values()], dim=1).T
        self._ranks: dict[str, slice] = {}
        begin = 0
        for slot, (down, _) in found.items():
            self._ranks[slot] = slice(begin, begin + len(down))
            begin += len(down)
        self._places: dict[str, torch.Tensor] = {}
        self._others = torch.empty(0)

    def begin(self, count: int, places: Mapping[str, torch.Tensor]) -> None:
        """The next batch has so many rows; `places`: those of each slot."""
        self._places = {slot: rows for slot, rows in places.items() if slot in self._ranks}
        self._others = torch.ones(
            count, self._down.shape[1], dtype=torch.bool, device=self._down.device
        )
        for slot, rows in self._places.items():
            self._others[rows, self._ranks[slot]] = False

    def __call__(
        self, module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor:
        """The output `[rows, ..., out]` with what the slots' adapters add, in their dtype as PEFT.

        Raises
        ------
        ModelError
            As `check_rows`.
        """
        (inputs,) = args
        check_rows(self._name, inputs, len(self._others))
        given = inputs.to(self._down.dtype)
        if inputs.shape[1:-1].numel() == 1:
            others = self._others.view(len(inputs), *inputs.shape[1:-1], -1)
            low = (given @ self._down).masked_fill(others, 0.0)
            return (output + low @ self._up).to(output.dtype)
        # Whole prompts: arithmetic counts, not calls.
        for slot, rows in self._places.items():
            ranks = self._ranks[slot]
            added = given[rows] @ self._down[:, ranks] @ self._up[ranks]
            output[rows] = (output[rows] + added).to(output.dtype)
        return output


def _matrices(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A `[rank, in]` and scaled B `[out, rank]` of all that is active in a layer."""
    names = layer.active_adapters
    down = torch.cat([layer.lora_A[name].weight.detach() for name in names])
    up = [layer.lora_B[name].weight.detach() * layer.scaling[name] for name in names]
    return down, torch.cat(up, dim=1)
