"""Several adapters of one base in one process, their prompts side by side in a batch.

PEFT answers each row of a batch with an adapter of its own (`adapter_names`; `_mixed_batch_forward`
in `peft/tuners/lora/layer.py`); the base's layers run once for all rows. A row has to be a sample
there, so this holds for the language model alone: the vision tower and the projector see images and
patches. PEFT refuses DoRA, and a module trained in full is one for all rows. Such adapters are
answered one by one, and named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raytune_vlm.collate.features import Features
from raytune_vlm.config.evaluation import EvaluationConfig
from raytune_vlm.config.lora import LoraConfig
from raytune_vlm.errors import RaytuneVlmError
from raytune_vlm.evaluate.generate import Answering, Prompts
from raytune_vlm.evaluate.scoring import Prediction
from raytune_vlm.models.adapter_file import load_adapter
from raytune_vlm.models.loading import Base
from raytune_vlm.models.lora import attach, detach, unmixable
from raytune_vlm.monitor import Say

ROOM_SHARE = 0.5
"""Adapters that share batches take at most this part of a GPU's free memory; the rest is for what
generating takes, which is as much as for one adapter."""


@dataclass(frozen=True)
class Adapter:
    """A trained adapter: its files and what it was made by."""

    folder: Path
    recipe: LoraConfig
    seed: int

    @property
    def num_bytes(self) -> int:
        """What its weights take on a device: they are float32 there as in the file."""
        return (self.folder / "adapter_model.safetensors").stat().st_size


@dataclass(frozen=True)
class Answers:
    """What several adapters answered."""

    by_name: dict[str, list[Prediction]]
    """Name -> answers in the order of its rows."""
    one_by_one: dict[str, str]
    """Name of each adapter that could not share its batches -> why."""


def generate_many(
    base: Base,
    adapters: Mapping[str, Adapter | None],
    split: Prompts,
    rows: Mapping[str, Sequence[int]],
    config: EvaluationConfig,
    *,
    device: str = "cpu",
    room: int | None = None,
    keep_going: Callable[[int], bool] = lambda done: True,
    keep: Callable[[str, Sequence[Prediction]], None] = lambda name, answers: None,
    features: Features | None = None,
    say: Say = lambda message: None,
) -> Answers | None:
    """The answers of several adapters to prompts of one split; None stands for the base alone.

    The texts are those of `generate` with each adapter by itself. The base is left as it was.

    Parameters
    ----------
    rows
        Name of an adapter -> what it is asked.
    room
        Bytes that the adapters loaded at once may take; by default half of what is free on a GPU,
        and no limit on a CPU. One that is larger is loaded alone.
    keep_going
        Asked between two batches, with the number of answers that are there.
    keep
        Given an adapter's name and its new answers as each batch ends.
    features
        What the base's tower and projector make of images, for adapters that leave these alone.
    say
        As for `generate`.

    Returns
    -------
    Answers, or None
        None if `keep_going` said no.
    """
    asking = Asking(base, split, rows, config, device, keep_going, keep, say)
    reasons = {name: unmixable(entry.recipe) if entry else None for name, entry in adapters.items()}
    apart = {name: reason for name, reason in reasons.items() if reason is not None}
    mixed = {name: adapter for name, adapter in adapters.items() if name not in apart}
    for group in _groups(mixed, _room(device) if room is None else room):
        try:
            with loaded(base, group, device) as (model, slots):
                if not asking.ask(model, group, slots, features):
                    return None
        except ValueError as error:
            if isinstance(error, RaytuneVlmError):
                raise
            # PEFT's own check: rows of a layer are not samples, as Mllama's, which are tiles.
            apart |= dict.fromkeys(group, f"PEFT: {error}")
    for name in apart:
        adapter = adapters[name]
        own = features if adapter is None or adapter.recipe.leaves_towers else None
        with _alone(base, adapter) as model:
            if not asking.ask(model, [name], None, own):
                return None
    return Answers(asking.answers(), apart)


class Asking:
    """Asks for what is left of each adapter's rows, and keeps the answers."""

    def __init__(
        self,
        base: Base,
        split: Prompts,
        rows: Mapping[str, Sequence[int]],
        config: EvaluationConfig,
        device: str,
        keep_going: Callable[[int], bool],
        keep: Callable[[str, Sequence[Prediction]], None],
        say: Say,
    ) -> None:
        self._base, self._split, self._config, self._device = base, split, config, device
        self._say = say
        self._rows, self._keep_going, self._keep = rows, keep_going, keep
        self._found: dict[tuple[str, int], Prediction] = {}

    def ask(
        self,
        model: Any,
        names: Iterable[str],
        slots: Mapping[str, str] | None,
        features: Features | None,
    ) -> bool:
        """Ask a model; False if stopped. `slots`: PEFT's names of adapters that share batches."""
        answering = Answering(
            model, self._base, self._split, self._config, self._device, features, self._say
        )
        left = {
            name: [row for row in self._rows[name] if (name, row) not in self._found]
            for name in names
        }
        for chunk in _pairs(self._split, left, self._base.family.left_padding, self._config):
            if not self._keep_going(len(self._found)):
                return False
            whose = [slots[name] for name, _ in chunk] if slots else None
            answers = answering.answer([row for _, row in chunk], adapter_names=whose)
            self._found |= dict(zip(chunk, answers, strict=True))
            for asked in dict.fromkeys(name for name, _ in chunk):
                pairs = zip(chunk, answers, strict=True)
                self._keep(asked, [entry for (name, _), entry in pairs if name == asked])
        return True

    def answers(self) -> dict[str, list[Prediction]]:
        """Name -> the answers to its rows, in their order."""
        return {name: [self._found[name, row] for row in own] for name, own in self._rows.items()}


@contextmanager
def _alone(base: Base, adapter: Adapter | None) -> Iterator[Any]:
    """The base with one adapter on it, as in training; taken off again at the end."""
    if adapter is None:
        yield base.model.eval()
        return
    model = attach(base.model, base.family, adapter.recipe, seed=adapter.seed)
    try:
        load_adapter(adapter.folder, model)
        yield model.eval()
    finally:
        base.model = detach(model)


def _room(device: str) -> int | None:
    """Bytes that adapters may take together; None: not measured."""
    if not device.startswith("cuda"):
        return None
    return int(ROOM_SHARE * torch.cuda.mem_get_info(device)[0])


def _groups(
    adapters: Mapping[str, Adapter | None], room: int | None
) -> Iterator[dict[str, Adapter | None]]:
    """The adapters in their order, as many together as there is room for."""
    group: dict[str, Adapter | None] = {}
    taken = 0
    for name, adapter in adapters.items():
        size = adapter.num_bytes if adapter else 0
        if group and room is not None and taken + size > room:
            yield group
            group, taken = {}, 0
        group[name] = adapter
        taken += size
    if group:
        yield group


@contextmanager
def loaded(
    base: Base, adapters: Mapping[str, Adapter | None], device: str
) -> Iterator[tuple[Any, dict[str, str] | None]]:
    """The base with all adapters on it, and PEFT's name of each; taken off again at the end.

    Without any adapter there are no names: PEFT would not know what to do with them.
    """
    from peft import PeftModel

    slots = dict.fromkeys(adapters, "__base__")
    model: Any = None
    try:
        for number, (name, adapter) in enumerate(adapters.items()):
            if adapter is None:
                continue
            slots[name] = f"slot{number}"  # a name of PEFT's cannot have dots
            options = {"adapter_name": slots[name], "torch_device": device}
            if model is None:
                model = PeftModel.from_pretrained(base.model, str(adapter.folder), **options)
            else:
                model.load_adapter(str(adapter.folder), **options)
            model.eval()
        yield (base.model.eval(), None) if model is None else (model, slots)
    finally:
        if model is not None:
            base.model = detach(model)


def _pairs(
    split: Prompts,
    rows: Mapping[str, Sequence[int]],
    left_padding: bool,
    config: EvaluationConfig,
) -> Iterator[list[tuple[str, int]]]:
    """Batches of (adapter, row): the same prompt's stand side by side."""
    asked = {name: set(own) for name, own in rows.items()}
    order = sorted(set().union(*asked.values()), key=lambda row: (int(split.lengths[row]), row))
    pending: list[tuple[str, int]] = []
    for row in order:
        for name in (name for name in asked if row in asked[name]):
            other = pending and split.lengths[pending[0][1]] != split.lengths[row]
            if len(pending) == config.batch_size or (other and not left_padding):
                yield pending
                pending = []
            pending.append((name, row))
    if pending:
        yield pending
