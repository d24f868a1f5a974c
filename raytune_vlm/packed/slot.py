"""A slot: a run whose adapter is on the shared base only while it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from raytune_vlm.models.lora import lora_layers, wrapped
from raytune_vlm.packed.random import RandomState
from raytune_vlm.packed.update import Flat
from raytune_vlm.train.run import Run


class Slot:
    """Parks a run: its adapter is off the base, ready to be packed with others.

    Parameters
    ----------
    run
        Its adapter is on the base, and the process's random state is its own.
    """

    def __init__(self, run: Run, device: str) -> None:
        self.run = run
        self.random = RandomState(device)
        self.layers = lora_layers(run.model)
        """Full name in the base -> PEFT's layer."""
        self.flat = Flat(run.optimizer)
        self.trained = [p for p in run.model.parameters() if p.requires_grad]
        """In the same order on every rank."""
        self._wrapped = wrapped(run.model)
        self._base = run.model.get_base_model()
        self._park()

    @contextmanager
    def mounted(self) -> Iterator[Run]:
        """The run with its adapter on the base and its own random state: as if it were alone.

        It may be closed inside.
        """
        self._mount()
        try:
            with self.random.drawing():
                yield self.run
        finally:
            if self.run.is_attached:
                self._park()

    def close(self) -> None:
        """Take the adapter off for good."""
        self._mount()
        self.run.close()

    def _mount(self) -> None:
        for name, (module, _) in self._wrapped.items():
            self._base.set_submodule(name, module)
        self._base.peft_config = self._config
        self.run.layers.change()

    def _park(self) -> None:
        self.run.layers.restore()
        for name, (_, own) in self._wrapped.items():
            self._base.set_submodule(name, own)
        # PEFT would take the base for one that has an adapter.
        self._config: Any = self._base.peft_config
        del self._base.peft_config
