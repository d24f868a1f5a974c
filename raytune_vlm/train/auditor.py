"""When the checks of `models.audit` are made in the life of a run, and what they found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytune_vlm.config.lora import LoraConfig
from raytune_vlm.models import audit

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


class Auditor:
    """The audit of one run: first step, then end. Every failing check raises `AuditFailed`."""

    def __init__(self, model: PeftModel, trainable: dict[str, int], config: LoraConfig) -> None:
        self._model, self._trainable, self._config = model, trainable, config
        self.checks: dict[str, audit.Check] = {}
        """Check -> its result, failed ones too."""
        self.notes: list[str] = []
        """What people should read; whoever passes them on empties the list."""

    @property
    def is_due(self) -> bool:
        """Whether this run has not passed the checks of its first step yet."""
        return "gradients" not in self.checks

    @property
    def awaits_update(self) -> bool:
        """Whether the gradients passed, and the effects of their update were not looked at yet."""
        return not self.is_due and "adapter_effect" not in self.checks

    def before_update(self) -> None:
        """What is trainable and its gradients, before the optimizer uses them."""
        self.checks["trainable"] = audit.check_trainable(
            self._trainable, self._config.scopes + self._config.full_scopes
        )
        self.checks["gradients"] = audit.check_gradients(self._model)
        audit.raise_failed(self.checks)

    def after_update(self, batch: dict[str, torch.Tensor]) -> None:
        """The effects of adapter and image, once B is not zero any more."""
        effects = audit.check_effects(self._model, batch)
        self.checks |= effects
        self.notes += audit.failure_notes(effects)
        audit.raise_failed(effects)

    def end(self, checks: dict[str, audit.Check]) -> None:
        """Take over what rank 0 found at the end."""
        self.checks |= checks
        audit.raise_failed(checks)
