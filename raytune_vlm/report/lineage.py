"""Where a clone comes from: the trials before it, and what its recipe was on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from raytune_vlm.report.formatting import count, recipe_value


@dataclass(frozen=True)
class Leg:
    """A part of the way: the trial that trained it, its recipe, and its last step."""

    trial_id: str
    recipe: Mapping[str, Any]
    until: int | None
    """None: to where the lineage ends."""


def lineage(
    trial_id: str, recipe: Mapping[str, Any], origins: Mapping[str, Mapping[str, Any]]
) -> list[Leg]:
    """From the first ancestor to the trial itself; one leg for a trial that is no clone.

    `origins`: clone -> its `parent`, the `step` that it goes on from, the parent's `recipe`.
    """
    legs = [Leg(trial_id, recipe, None)]
    while (origin := origins.get(legs[0].trial_id)) and len(legs) <= len(origins):
        legs.insert(0, Leg(str(origin["parent"]), origin["recipe"], int(origin["step"])))
    return legs


def schedule(legs: list[Leg]) -> str:
    """Every value that changed: `train.learning_rate 1e-3 to step 40, 8e-4 from there`."""
    told = []
    for key in dict.fromkeys(key for leg in legs for key in leg.recipe):
        values = [(recipe_value(leg.recipe.get(key)), leg.until) for leg in legs]
        parts = [(value, list(run)[-1][1]) for value, run in groupby(values, lambda v: v[0])]
        if len(parts) > 1:
            words = (
                f"{value} to step {count(until)}" if until is not None else f"{value} from there"
                for value, until in parts
            )
            told.append(f"{key} {', '.join(words)}")
    return "; ".join(told)


def caution(legs: list[Leg]) -> str:
    """Comment lines for the experiment of a clone's last recipe; empty for a trial that is none."""
    if len(legs) < 2:
        return ""
    names = ", then ".join(leg.trial_id for leg in legs)
    changed = " ".join(schedule(legs).split()) or "no value changed"
    return (
        f"# NOT what was found: {legs[-1].trial_id} is a clone, trained as {names}.\n"
        f"# {changed}\n"
        "# This is its last recipe alone, to be trained from the beginning. What was found is the\n"
        "# adapter beside it.\n"
    )
