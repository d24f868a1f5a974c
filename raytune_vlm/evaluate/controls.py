"""Controls: is a score due to the images?

Each control answers (some of) the same prompts in another way and is scored with the same metrics:

- `blank_image`: grey images of the same sizes;
- `shuffled_image`: the images of other samples;
- `text_only`: no images, where the family's template takes a prompt without;
- `gold`: the reference given as the answer: what the metric itself allows at most.

A model that scores no better than with blank images has learnt the language of the answers and not
to look (Goyal et al. 2017, "Making the V in VQA matter"): that is noted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from raytune_vlm.comparisons import Comparison
from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.evaluation import METRIC_MODES, Control
from raytune_vlm.errors import DataError
from raytune_vlm.evaluate.altered import AlteredPrompts, grey, own_pictures, partners
from raytune_vlm.evaluate.scoring import Prediction
from raytune_vlm.models.loading import Base
from raytune_vlm.prepare.store import PreparedSplit
from raytune_vlm.references import read_reference


class ControlSkipped(DataError):
    """A control that cannot be made of this model or these samples; the reason is its message."""


def control_prompts(
    control: Control,
    base: Base,
    split: PreparedSplit,
    rows: Sequence[int],
    *,
    limits: ImageLimits,
    seed: int,
) -> tuple[AlteredPrompts, list[int]]:
    """The prompts of a control that is generated, and which of the rows it is made of.

    Raises
    ------
    ControlSkipped
        If it cannot be made.
    """
    rows = [row for row in rows if split.num_images[row]]
    if not rows:
        raise ControlSkipped("no sample has an image")
    own = partial(own_pictures, split, limits)
    if control == "shuffled_image":
        other = partners(split, rows, seed)
        rows = [row for row in rows if row in other]
        if not rows:
            raise ControlSkipped("no two samples have as many images")
        return AlteredPrompts(split, base, rows, lambda row: own(other[row])), rows
    if control == "blank_image":
        blank = AlteredPrompts(split, base, rows, lambda row: [grey(x) for x in own(row)])
        return blank, rows
    assert control == "text_only", control
    if base.family.prompt != "chat":
        raise ControlSkipped(f"{base.family.model_type} takes no prompt without an image")
    return AlteredPrompts(split, base, rows, lambda row: None), rows


def gold_answers(split: PreparedSplit, rows: Sequence[int], base: Base) -> list[Prediction]:
    """The first answer of each reference, as if a model had given it."""
    tokenizer = base.processor.tokenizer
    found = []
    for row in rows:
        reference = split.text(row, "reference")
        text = read_reference(reference).answers[0]
        found.append(
            Prediction(
                sample_id=split.sample_ids[row],
                group_id=split.group_ids[row],
                prompt=split.text(row, "prompt"),
                reference=reference,
                text=text,
                num_tokens=len(tokenizer(text, add_special_tokens=False)["input_ids"]),
                truncated=False,
            )
        )
    return found


def blank_note(entry: Comparison, metric: str, who: str) -> str | None:
    """What to say of a model that is not shown to be better than with blank images."""
    if entry.name != "blank_image" or metric not in entry.tests:
        return None
    test = entry.tests[metric]  # altered minus plain: a model that looks loses by blank images
    clear = test.upper < 0 if METRIC_MODES[metric] == "max" else test.lower > 0
    if clear:
        return None
    return (
        f"{who} is not shown to use its images: {metric} {entry.plain[metric]:.3f}, with blank "
        f"images {entry.altered[metric]:.3f} (difference {test.difference:+.3f}, "
        f"[{test.lower:+.3f}, {test.upper:+.3f}], {entry.num_samples} samples)"
    )
