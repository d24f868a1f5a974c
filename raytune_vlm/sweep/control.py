"""What a person asks of a running sweep, and whether it can be done: pure, from the ledger alone.

    raytune-vlm control FOLDER stop t0003
    raytune-vlm control FOLDER clone t0001 train.learning_rate=1e-4

The command line leaves a request in the folder; the driver (`desk.py`) takes it, writes a `control`
event with the answer, and does what was accepted. What follows for the trials is in
`ledger.apply_control`, so that a sweep that is resumed knows it too.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.search_space import clone_recipe
from raytune_vlm.errors import ConfigError, did_you_mean
from raytune_vlm.json_files import write_json
from raytune_vlm.sweep.ledger import TrialState, trial_name

LIMITS = ("num_trials", "max_gpu_hours", "max_wall_time_s", "max_cost")
"""Keys of `sweep` that may be changed while it runs."""

KEPT_BY_CLONES = ("lora.scope", "lora.init", "lora.dora", "lora.modules_to_save")
"""What decides which tensors an adapter has."""


@dataclass(frozen=True)
class Request:
    """What is asked: a command, the trial that it is about, and values by key."""

    command: str
    trial_id: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    request_id: str = field(default_factory=lambda: f"{time.time_ns()}-{uuid.uuid4().hex[:8]}")

    def write(self, folder: Path) -> Path:
        """Leave it for the driver, whole; names are in the order of asking."""
        file = folder / f"{self.request_id}.json"
        write_json(file, asdict(self))
        return file


@dataclass(frozen=True)
class Situation:
    """All that an answer depends on."""

    experiment: ExperimentConfig
    """With the limits that are in force."""
    states: Mapping[str, TrialState]
    closed: str | None = None
    """Which end of the search has begun: `budget`, `drained`, `stable`, `infeasible`."""
    is_over: bool = False
    """Whether the last trial has ended."""


@dataclass(frozen=True)
class Answer:
    """What is done: one line for the person, and what the ledger's event holds besides."""

    message: str
    effect: dict[str, Any] = field(default_factory=dict)


def answer(request: Request, now: Situation) -> Answer:
    """What is done for a request.

    Raises
    ------
    ConfigError
        If it cannot be done; the message says why.
    """
    if now.is_over:
        raise ConfigError("the search is over: its winner is being chosen")
    return COMMANDS[request.command](request, now)


def limits_by_hand(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The limits that were changed so far: key of `sweep` -> value."""
    found: dict[str, Any] = {}
    for row in rows:
        if row["event"] == "control":
            found.update(row.get("limits", {}))
    return found


def with_limits(experiment: ExperimentConfig, limits: Mapping[str, Any]) -> ExperimentConfig:
    """The experiment with other limits.

    Raises
    ------
    ConfigError
        If one is not allowed.
    """
    try:
        return experiment.with_recipe({f"sweep.{key}": value for key, value in limits.items()})
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        reason = problem["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{place}: {reason}" if place else reason) from None


def ending_of(row: Mapping[str, Any]) -> str | None:
    """Which end of the search an event of the ledger begins, if any."""
    if row["event"] == "closed":
        return str(row["kind"])
    if row["event"] == "control" and row["accepted"] and row.get("trial_id") is None:
        return {"stop": "budget", "drain": "drained"}.get(row["command"])
    return None


def _trial(request: Request, now: Situation) -> TrialState:
    """The trial that a request is about; it must not have ended."""
    state = _known(request, now)
    if state.ended is not None:
        raise ConfigError(f"{state.trial_id} has ended already ({state.ended})")
    if state.stop_asked:
        raise ConfigError(f"{state.trial_id} is being stopped already")
    return state


def _known(request: Request, now: Situation) -> TrialState:
    name = str(request.trial_id)
    if name not in now.states:
        raise ConfigError(f"no trial {name!r}{did_you_mean(name, now.states)}")
    return now.states[name]


def _stop(request: Request, now: Situation) -> Answer:
    if request.trial_id is not None:
        state = _trial(request, now)
        return Answer(f"{state.trial_id} is stopped at its next step; what it has is kept")
    if now.closed == "budget":
        raise ConfigError("the search is being ended already")
    _require_trials(now)
    return Answer("the search ends: no new trials, running ones end at their next rung")


def _drain(request: Request, now: Situation) -> Answer:
    if now.closed is not None:
        raise ConfigError(f"there are no new trials already ({now.closed})")
    _require_trials(now)
    return Answer("no new trials: those that there are end by the scheduler, then the search does")


def _require_trials(now: Situation) -> None:
    if not any(state.scored or state.ended is None for state in now.states.values()):
        raise ConfigError("no trial has begun, so there would be nothing to conclude")


def _pause(request: Request, now: Situation) -> Answer:
    state = _trial(request, now)
    if state.held:
        raise ConfigError(f"{state.trial_id} is paused by hand already")
    return Answer(
        f"{state.trial_id} is saved and paused at its next step; `resume {state.trial_id}` lets it "
        "go on, and the search waits for that"
    )


def _resume(request: Request, now: Situation) -> Answer:
    state = _trial(request, now)
    if not state.held:
        raise ConfigError(
            f"{state.trial_id} is not paused by hand; to have the scheduler prefer it, `pin` it"
        )
    return Answer(f"{state.trial_id} goes on when an executor is free and its turn comes")


def _pin(request: Request, now: Situation) -> Answer:
    state = _trial(request, now)
    if now.experiment.sweep.scheduler.type == "fifo":
        raise ConfigError("pin has no effect with sweep.scheduler.type=fifo: it stops no trial")
    if state.pinned:
        raise ConfigError(f"{state.trial_id} is pinned already")
    return Answer(f"{state.trial_id} is trained to the last rung, whatever its scores")


def _unpin(request: Request, now: Situation) -> Answer:
    state = _trial(request, now)
    if not state.pinned:
        raise ConfigError(f"{state.trial_id} is not pinned")
    return Answer(f"the scheduler decides over {state.trial_id} again, from its next rung on")


def _set_budget(request: Request, now: Situation) -> Answer:
    return _limits(request.values, now)


def _extend(request: Request, now: Situation) -> Answer:
    limits = {}
    for key, value in request.values.items():
        present = getattr(now.experiment.sweep, _limit(key))
        if present is None:
            raise ConfigError(f"sweep.{key} is not limited, so it cannot be extended")
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ConfigError(f"extend {key}={value!r}: must be a number above 0")
        limits[key] = present + value
    return _limits(limits, now)


def _limit(key: str) -> str:
    if key not in LIMITS:
        raise ConfigError(f"{key!r} is no limit of a sweep{did_you_mean(key, LIMITS)}")
    return key


def _limits(limits: dict[str, Any], now: Situation) -> Answer:
    changed = with_limits(now.experiment, {_limit(key): value for key, value in limits.items()})
    if now.closed is not None:
        raise ConfigError(f"there are no new trials any more ({now.closed})")
    before, after = now.experiment.sweep, changed.sweep
    shown = ", ".join(f"{key} {getattr(before, key)} -> {getattr(after, key)}" for key in limits)
    return Answer(f"sweep: {shown}", {"limits": {key: getattr(after, key) for key in limits}})


def _clone(request: Request, now: Situation) -> Answer:
    state, experiment = _known(request, now), now.experiment
    for key in KEPT_BY_CLONES:
        if key in request.values:
            raise ConfigError(f"a clone keeps its parent's adapter: it cannot have another {key}")
    recipe = clone_recipe(experiment, state.recipe, request.values)
    own, parent = experiment.with_recipe(recipe).lora, experiment.with_recipe(state.recipe).lora
    if own.init in ("pissa", "olora") and own != parent:
        raise ConfigError(
            f"with lora.init={own.init} the adapter cannot be changed: its start is a part of it"
        )
    last = experiment.train.max_steps
    steps = [step for step in state.scored if step < last]
    if not steps:
        why = "before the last one " if state.scored else ""
        raise ConfigError(f"{state.trial_id} has not been scored at any rung {why}yet")
    step, number = max(steps), len(now.states)
    above = next(r for r in experiment.sweep.scheduler_rungs(last) if r > step)
    clone = {
        "trial_id": trial_name(number),
        "number": number,
        "recipe": recipe,
        "origin": {"parent": state.trial_id, "step": step, "recipe": state.recipe},
        "promoted_to": above,
    }
    ranks = "".join(
        f"; rank of {scope} {before} -> {after} by "
        + ("zero-padding" if after > before else "truncated SVD")
        for scope in own.scopes
        if (before := parent.rank_of(scope)) != (after := own.rank_of(scope))
    )
    return Answer(
        f"{clone['trial_id']} is a clone of {state.trial_id} at step {step}, with a fresh "
        f"optimizer{ranks}",
        {"clone": clone},
    )


COMMANDS = {
    "stop": _stop,
    "pause": _pause,
    "resume": _resume,
    "pin": _pin,
    "unpin": _unpin,
    "clone": _clone,
    "extend": _extend,
    "set-budget": _set_budget,
    "drain": _drain,
}
"""Command -> what it answers."""
