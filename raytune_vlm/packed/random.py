"""A random state of a slot's own, so that what it draws does not depend on its neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from raytune_vlm.train import random_state


class RandomState:
    """What torch draws inside `drawing` comes from this state and moves it on, and no other.

    It begins as the process's own at the time.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self.state = random_state.of_torch(device)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw from this state, and leave it where that ends."""
        with self._set(self.state):
            yield
            self.state = random_state.of_torch(self._device)

    @contextmanager
    def repeating(self, state: dict[str, torch.Tensor]) -> Iterator[None]:
        """Draw again what was drawn from a state, and leave this one as it is."""
        with self._set(state):
            yield

    @contextmanager
    def _set(self, state: dict[str, torch.Tensor]) -> Iterator[None]:
        outer = random_state.of_torch(self._device)
        random_state.restore(state, self._device)
        try:
            yield
        finally:
            random_state.restore(outer, self._device)
