"""A slot: a run whose adapter is on the shared base only while it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raytune_vlm.models.lora import lora_layers
from raytune_vlm.packed.random import RandomState
from raytune_vlm.train.run import Run


class Slot:
    """Parks a fresh run: its adapter is off the base, ready to be packed with others.

    Parameters
    ----------
    run
        Just made, so that its adapter is on the base.
    """

    def __init__(self, run: Run, device: str) -> None:
        self.run = run
        self.random = RandomState(device)
        self.layers = lora_layers(run.model)
        """Full name in the base -> PEFT's layer."""
        self._base = run.model.get_base_model()
        self._park()

    @contextmanager
    def mounted(self) -> Iterator[Run]:
        """The run with its adapter on the base and its own random state: as if it were alone."""
        for name, layer in self.layers.items():
            self._base.set_submodule(name, layer)
        self._base.peft_config = self._config
        try:
            with self.random.drawing():
                yield self.run
        finally:
            self._park()

    def close(self) -> None:
        """Take the adapter off for good."""
        for name, layer in self.layers.items():
            self._base.set_submodule(name, layer)
        self._base.peft_config = self._config
        self.run.close()

    def _park(self) -> None:
        for name, layer in self.layers.items():
            self._base.set_submodule(name, layer.base_layer)
        # PEFT would take the base for one that has an adapter.
        self._config: Any = self._base.peft_config
        del self._base.peft_config
