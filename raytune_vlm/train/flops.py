"""Model FLOPs of a training step and the peak of the device: what `StepMetrics.mfu` is made of.

Model FLOPs utilisation (PaLM, Chowdhery et al. 2022, appendix B) counts what the model needs, not
what is done: neither padding nor passes that are repeated to save memory. There a token costs 2
FLOPs a weight in the forward pass, 2 for the gradients of its inputs, 2 for the weight's own, and
12 * layers * width * length for attention. Here the base is frozen, so:

- a weight that a gradient has to pass on its way to something trained: 2 + 2;
- a frozen weight with nothing trained before it (a vision tower without an adapter): 2;
- a trained weight (adapters, modules trained in full): 2 + 2 + 2;
- attention of the language model as in the paper, over each sample's own length;
- the output layer, which is frozen, for labelled tokens alone: no other has to pass it.

Counted are linear layers. Not counted, all small beside them: convolutions, the attention of vision
towers (mostly within windows or short sequences).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from raytune_vlm.models.families import Family
from raytune_vlm.models.lora import output_layer, scope_of

PEAKS = {
    r"A100.*": 312e12,
    r"H100 PCIe": 756e12,
    r"H100 NVL": 835e12,
    r"H100.*": 989e12,
    r"H200 NVL": 835e12,
    r"H200": 989e12,
    r"L4": 121e12,
    r"L40S": 362e12,
    r"RTX 4090": 165.2e12,
    r"B200": 2250e12,
}
"""Name of a device, without "NVIDIA" and "GeForce" -> dense bfloat16 FLOP/s.

NVIDIA's data sheets of each (figures with sparsity halved), for RTX 4090 the Ada architecture white
paper (bfloat16 with float32 accumulation). The first name that fits decides.
"""


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by its name in CUDA, or None if it is not known."""
    name = re.sub(r"^(NVIDIA )?(GeForce )?", "", device_name)
    return next((peak for known, peak in PEAKS.items() if re.fullmatch(known, name)), None)


@dataclass
class Weights:
    """Weights of the linear layers of a scope."""

    frozen: int = 0
    trained: int = 0


class FlopCounter:
    """Counts the model FLOPs of a step, and sees how many rows the towers before the text take.

    Parameters
    ----------
    model
        The base with its adapter on. A hook on the first linear layer of vision tower and of
        projector is there until `close`.
    """

    def __init__(self, model: Any, family: Family) -> None:
        self._rows = dict.fromkeys(("vision", "projector"), 0)
        self._hooks: list[Any] = []
        self._weights = {scope: Weights() for scope in ("text", "projector", "vision")}
        self._head = 0
        """Weights of the output layer."""
        has_experts, head = False, output_layer(model)
        for name, module in model.named_modules():
            scope = scope_of(name, family) or "text"
            has_experts |= any(p.dim() == 3 for p in module.parameters(recurse=False)) and (
                scope == "text"
            )
            if not isinstance(module, torch.nn.Linear) or ".original_module." in f"{name}.":
                continue
            size = module.in_features * module.out_features
            if module is head:
                self._head = size
                continue
            weights = self._weights[scope]
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                weights.trained += size
            else:
                weights.frozen += size
            if scope in self._rows and not any(scope == seen for seen, _ in self._hooks):
                self._hooks.append((scope, module.register_forward_pre_hook(self._seeing(scope))))
        text: Any = model.config.get_text_config()
        depth, width = getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None)
        self._attention = None
        """FLOPs by length squared; None where nothing can be said (of a token that goes to some
        experts of many, or of layers that are not one stack)."""
        if isinstance(depth, int) and isinstance(width, int) and not has_experts:
            self._attention = 12 * depth * width

    def take(self) -> tuple[int, int]:
        """The rows that vision tower and projector took since the last call."""
        rows = self._rows["vision"], self._rows["projector"]
        self._rows = dict.fromkeys(self._rows, 0)
        return rows

    def flops(
        self,
        tokens: float,
        squares: float,
        vision_rows: float,
        projector_rows: float,
        labelled: float,
    ) -> float | None:
        """Model FLOPs of a step.

        Parameters
        ----------
        tokens
            Of the samples, padding not counted.
        squares
            Sum of the squared lengths of the samples.
        vision_rows, projector_rows
            See `take`.
        labelled
            Tokens that carry loss.
        """
        if self._attention is None:
            return None
        rows = {"vision": vision_rows, "projector": projector_rows, "text": tokens}
        total, behind = self._attention * squares + 4 * self._head * labelled, False
        for scope, count in rows.items():
            weights = self._weights[scope]
            behind |= weights.trained > 0
            total += count * ((4 if behind else 2) * weights.frozen + 6 * weights.trained)
        return total

    def close(self) -> None:
        """Take the hooks off."""
        for _, hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _seeing(self, scope: str) -> Any:
        def see(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            self._rows[scope] += inputs[0].numel() // max(1, inputs[0].shape[-1])

        return see
