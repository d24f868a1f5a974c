"""What dropout draws from: torch's generators of the CPU and of the device."""

from __future__ import annotations

import torch


def random_state(device: str) -> list[torch.Tensor]:
    """The state of this process's generators."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.startswith("cuda") else states


def restore_random_state(states: list[torch.Tensor], device: str) -> None:
    """Draw again what was drawn after `random_state`."""
    torch.set_rng_state(states[0])
    if device.startswith("cuda"):
        torch.cuda.set_rng_state(states[1], device)
