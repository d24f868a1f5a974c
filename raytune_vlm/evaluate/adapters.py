"""Several adapters of one base in one process, their prompts side by side in a batch.

PEFT answers each row of a batch with an adapter of its own (`adapter_names`; `_mixed_batch_forward`
in `peft/tuners/lora/layer.py`); the base's layers run once for all rows. A row has to be a sample
there, so this holds for the language model alone: the vision tower and the projector see images and
patches. PEFT refuses DoRA, and a module trained in full is one for all rows. Such adapters are
answered one by one, and named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_vlm.config.evaluation import EvaluationConfig
from raytune_vlm.config.lora import LoraConfig
from raytune_vlm.evaluate.generate import Answering, Prompts, generate
from raytune_vlm.evaluate.scoring import Prediction
from raytune_vlm.models.adapter_file import load_adapter
from raytune_vlm.models.loading import Base
from raytune_vlm.models.lora import attach, detach, unmixable


@dataclass(frozen=True)
class Adapter:
    """A trained adapter: its files and what it was made by."""

    folder: Path
    recipe: LoraConfig
    seed: int


@dataclass(frozen=True)
class Answers:
    """What several adapters answered."""

    by_name: dict[str, list[Prediction]]
    """Name -> answers in the order of the rows."""
    one_by_one: dict[str, str]
    """Name of each adapter that could not share its batches -> why."""


def generate_many(
    base: Base,
    adapters: Mapping[str, Adapter | None],
    split: Prompts,
    rows: Sequence[int],
    config: EvaluationConfig,
    *,
    device: str = "cpu",
) -> Answers:
    """The answers of several adapters to the same prompts; None stands for the base alone.

    The texts are those of `generate` with each adapter by itself. The base is left as it was.
    """
    reasons = {
        name: None if adapter is None else unmixable(adapter.recipe)
        for name, adapter in adapters.items()
    }
    apart = {name: reason for name, reason in reasons.items() if reason is not None}
    mixed = {name: adapter for name, adapter in adapters.items() if name not in apart}
    found = _answer_mixed(base, mixed, split, rows, config, device)
    for name in apart:
        adapter = adapters[name]
        assert adapter is not None
        model = attach(base.model, base.family, adapter.recipe, seed=adapter.seed)
        try:
            load_adapter(adapter.folder, model)
            answers = generate(model, base, split, rows, config, device=device)
        finally:
            base.model = detach(model)
        assert answers is not None
        found[name] = answers
    return Answers({name: found[name] for name in adapters}, apart)


def _answer_mixed(
    base: Base,
    adapters: Mapping[str, Adapter | None],
    split: Prompts,
    rows: Sequence[int],
    config: EvaluationConfig,
    device: str,
) -> dict[str, list[Prediction]]:
    """Pairs of a row and an adapter, those of about the same length together."""
    if not any(adapters.values()):
        plain = generate(base.model, base, split, rows, config, device=device) if adapters else []
        return {name: list(plain or ()) for name in adapters}
    found: dict[tuple[str, int], Prediction] = {}
    with loaded(base, adapters, device) as (model, slots):
        answering = Answering(model, base, split, config, device)
        for chunk in _pairs(split, rows, list(adapters), base.family.left_padding, config):
            answers = answering.answer(
                [row for _, row in chunk], adapter_names=[slots[name] for name, _ in chunk]
            )
            found |= dict(zip(chunk, answers, strict=True))
    return {name: [found[name, row] for row in rows] for name in adapters}


@contextmanager
def loaded(
    base: Base, adapters: Mapping[str, Adapter | None], device: str
) -> Iterator[tuple[Any, dict[str, str]]]:
    """The base with all adapters on it, and PEFT's name of each; taken off again at the end."""
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
        yield model, slots
    finally:
        if model is not None:
            base.model = detach(model)


def _pairs(
    split: Prompts,
    rows: Sequence[int],
    names: Sequence[str],
    left_padding: bool,
    config: EvaluationConfig,
) -> Iterator[list[tuple[str, int]]]:
    """Batches of (adapter, row): the same prompt's stand side by side."""
    order = sorted(rows, key=lambda row: (int(split.lengths[row]), row))
    pending: list[tuple[str, int]] = []
    for row in order:
        for name in names:
            other = pending and split.lengths[pending[0][1]] != split.lengths[row]
            if len(pending) == config.batch_size or (other and not left_padding):
                yield pending
                pending = []
            pending.append((name, row))
    if pending:
        yield pending
