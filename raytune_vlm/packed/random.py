"""A random state of a slot's own, so that what it draws does not depend on its neighbours."""

from __future__ import annotations

from raytune_vlm.train.random_state import random_state, restore_random_state


class RandomState:
    """What torch draws inside `with` comes from this state and moves it on, and no other.

    It begins as the process's own at the time.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self.state = random_state(device)

    def __enter__(self) -> RandomState:
        self._outer = random_state(self._device)
        restore_random_state(self.state, self._device)
        return self

    def __exit__(self, *_: object) -> None:
        self.state = random_state(self._device)
        restore_random_state(self._outer, self._device)
