"""Replicates: trials of one recipe with different seeds, and what they say together.

With `sweep.scheduler.seeds` every proposal is trained as so many trials. The ledger says of all but
the first of them whose replicates they are, so equal proposals are not taken for replicates.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter

from raytune_vlm.sweep.ledger import BY_HAND, Ending, TrialState


def recipe_id(state: TrialState) -> str:
    """The first trial of a trial's recipe."""
    return state.replicates or state.trial_id


def by_recipe(states: Iterable[TrialState]) -> list[list[TrialState]]:
    """The trials of each recipe; all in the order of their numbers."""
    found: dict[str, list[TrialState]] = {}
    for state in sorted(states, key=attrgetter("number")):
        found.setdefault(state.replicates or state.trial_id, []).append(state)
    return list(found.values())


def to_replicate(states: Collection[TrialState], seeds: int) -> tuple[TrialState, int] | None:
    """The first trial of the recipe that still lacks some, and how many it has; None if the next
    proposal is a new recipe. `states` are in the order of the ledger."""
    own = [state for state in states if state.origin is None and not state.untrained]
    number = len(own) % seeds
    return (own[-number], number) if number else None


def value_at(trials: Sequence[TrialState], step: int, metric: str) -> float | None:
    """What a recipe is worth at a rung: the mean over its trials; None if not all have come there.

    One that has yet to come is waited for: else it would depend on who is faster who is ahead. One
    that failed or broke a limit never comes, nor does the recipe then: the mean of the others would
    be that of the lucky ones. A trial that was stopped by hand, or whose workers died, says nothing
    of the recipe and is left out.
    """
    if len(trials) == 1:
        scores = trials[0].scored.get(step)
        return None if scores is None else scores[metric]
    there = [state for state in trials if step in state.scored]
    if not there or any(not _is_excused(state) for state in trials if step not in state.scored):
        return None
    return sum(state.scored[step][metric] for state in there) / len(there)


def _is_excused(state: TrialState) -> bool:
    """Whether a trial ended for a reason that the recipe has no part in."""
    message = state.message or ""
    is_lost = state.ended == "failed" and message.startswith("infrastructure:")
    return is_lost or (state.ended == "stopped" and message == BY_HAND)


def is_whole(trials: Sequence[TrialState], seeds: int) -> bool:
    """Whether a recipe has all of its trials; a clone is alone, and so is what was not trained."""
    return len(trials) >= seeds or trials[0].origin is not None or trials[0].untrained


def has_ended(trials: Sequence[TrialState], seeds: int) -> bool:
    """Whether nothing more is to come of a recipe."""
    return is_whole(trials, seeds) and all(state.ended is not None for state in trials)


def together(trials: Sequence[TrialState]) -> TrialState:
    """A recipe's trials as the one trial that the searcher knows: the first, with means."""
    if len(trials) == 1:
        return trials[0]
    first, scored = trials[0], {}
    for step in sorted({step for state in trials for step in state.scored}):
        names = next(state.scored[step] for state in trials if step in state.scored)
        values = {name: value_at(trials, step, name) for name in names}
        known = {name: value for name, value in values.items() if value is not None}
        if known:
            scored[step] = known
    return replace(
        first,
        scored=scored,
        ended=_ending(trials),
        message=next((state.message for state in trials if state.message), None),
        costs={step: _mean_costs(trials, step) for step in scored},
        ended_at=max(state.ended_at for state in trials),
    )


def _ending(trials: Sequence[TrialState]) -> Ending | None:
    if any(state.ended is None for state in trials):
        return None
    counted = [state.ended for state in trials if not _is_excused(state)]
    if "failed" in counted or all(state.ended == "failed" for state in trials):
        return "failed"
    return "finished" if counted and set(counted) == {"finished"} else "stopped"


def _mean_costs(trials: Sequence[TrialState], step: int) -> dict[str, float]:
    rows: list[Mapping[str, float]] = [s.costs[step] for s in trials if step in s.costs]
    shared = [name for name in rows[0] if all(name in row for row in rows)] if rows else []
    return {name: sum(row[name] for row in rows) / len(rows) for name in shared}
