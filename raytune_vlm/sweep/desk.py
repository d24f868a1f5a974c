"""The driver's side of `raytune-vlm control`: takes requests, answers in the ledger, acts."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import ray
from ray import tune

from raytune_vlm.errors import CheckpointError, ConfigError, ModelError
from raytune_vlm.records import read_json
from raytune_vlm.sweep.closing import Closing
from raytune_vlm.sweep.constraints import broken
from raytune_vlm.sweep.control import (
    COMMANDS,
    Answer,
    Request,
    Situation,
    answer,
    ending_of,
    with_limits,
)
from raytune_vlm.sweep.ledger import apply_control, events
from raytune_vlm.sweep.runner import Session
from raytune_vlm.sweep.searcher import OptunaSearcher
from raytune_vlm.sweep.turns import Gate, Turns

LOOK_EVERY_S = 0.25
"""How often requests are looked for; Ray Tune comes by ten times a second."""


class Desk(tune.Callback):
    """Takes requests while Ray Tune runs, between two of its steps.

    A request is renamed before it is read, so that whoever asked cannot withdraw it any more. It is
    done only after its answer is in the ledger; what a kill leaves undone then, `search` does on
    the next life of the sweep.
    """

    def __init__(
        self,
        running: Session,
        searcher: OptunaSearcher,
        turns: Turns,
        gate: Gate,
        closing: Closing,
    ) -> None:
        self._running, self._searcher, self._turns = running, searcher, turns
        self._gate, self._closing = gate, closing
        self._folder = running.folder.control
        self._looked = 0.0
        self._awaited: list[str] = []
        self._refuse_unanswered()

    def __getstate__(self) -> dict[str, Any]:
        """Ray Tune pickles a snapshot of itself; the ledger is ours, so there is nothing to it."""
        return {}

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Ray Tune is between two events."""
        if time.monotonic() - self._looked >= LOOK_EVERY_S:
            self.look()
            self._say_awaited()
            self._looked = time.monotonic()

    def look(self) -> None:
        """Take what has been asked since."""
        for file in sorted(self._folder.glob("*.json")):
            taken = file.with_suffix(".taken")
            try:
                file.rename(taken)
            except FileNotFoundError:
                continue  # withdrawn
            self._take(taken)
            taken.unlink()

    def _read(self, file: Path) -> Request | None:
        try:
            return Request(**read_json(file))
        except (ValueError, TypeError) as error:
            self._running.monitor.say(f"control: {file.name} is no request: {error}")
            return None

    def _take(self, file: Path) -> None:
        request = self._read(file)
        if request is None:
            return
        try:
            found = self._answer(request)
        except (ConfigError, ModelError, OSError) as error:
            self._write(request, accepted=False, message=str(error))
        else:
            self._carry_out(request, found)

    def _answer(self, request: Request) -> Answer:
        if request.command not in COMMANDS:
            raise ConfigError(f"no command {request.command!r}")
        now = Situation(
            self._running.experiment,
            self._running.states,
            self._closing.kind,
            is_over=self._gate.is_over,
        )
        found = answer(request, now)
        if "clone" in found.effect:
            self._prepare_clone(found.effect["clone"])
        return found

    def _write(self, request: Request, **fields: Any) -> dict[str, Any]:
        """The answer as the ledger has it."""
        about = {"trial_id": request.trial_id} if request.trial_id is not None else {}
        row = {
            "command": request.command,
            **about,
            "values": request.values,
            "request": request.request_id,
            **fields,
        }
        said = "" if fields["accepted"] else "refused: "
        words = [request.command, *([request.trial_id] if request.trial_id else [])]
        self._running.monitor.say(f"by hand: {' '.join(words)}: {said}{fields['message']}")
        return {"seq": self._running.ledger.append("control", **row), **row}

    def _carry_out(self, request: Request, found: Answer) -> None:
        running, board = self._running, self._running.board
        row = self._write(request, accepted=True, message=found.message, **found.effect)
        apply_control(running.states, row)
        trial_id = request.trial_id
        if kind := ending_of({"event": "control", **row}):
            self._closing.close(kind, f"asked for by hand ({request.command})")
        elif "limits" in row:
            running.experiment = with_limits(running.experiment, row["limits"])
            for part in (self._closing, self._searcher, self._turns):
                part.set_limits(running.experiment)
        elif "clone" in row:
            self._searcher.add(running.states[row["clone"]["trial_id"]])
        elif request.command == "resume":
            ray.get(board.unpause.remote(trial_id))
            self._turns.resume(str(trial_id))
        elif request.command in ("stop", "pause") and not self._turns.is_waiting(str(trial_id)):
            # The executor learns it from the board, the proxy by a report.
            if request.command == "stop":
                ray.get(board.stop.remote(trial_id))
                report: dict[str, Any] = {"done": True}
            else:
                ray.get(board.pause.remote(trial_id))
                report = {"held": self._turns.life(str(trial_id))}
            ray.get(board.report.remote(trial_id, report))

    def _prepare_clone(self, clone: dict[str, Any]) -> None:
        """Predict what a clone costs, and keep the adapter that it starts from.

        Raises
        ------
        ConfigError
            If it would break a constraint, or its parent's checkpoint is gone or damaged.
        """
        from raytune_vlm.train.checkpoint import verify

        clone["predicted"] = self._searcher.predict(clone["recipe"])
        reason = broken(self._running.experiment, clone["predicted"], "predicted")
        if reason is not None:
            raise ConfigError(f"the clone would be infeasible: {reason}")
        folder, origin = self._running.folder, clone["origin"]
        source = folder.trial(origin["parent"]).checkpoint(origin["step"])
        try:
            verify(source)
        except CheckpointError as error:
            raise ConfigError(
                f"{origin['parent']} has no whole checkpoint of step {origin['step']} any more "
                f"(train.keep_checkpoints, train.keep_best): {error.message}"
            ) from None
        kept = folder.trial(clone["trial_id"]).origin
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / "adapter_model.safetensors", kept / "adapter_model.safetensors")

    def _refuse_unanswered(self) -> None:
        """Requests that an earlier life of the sweep took, and ended before it answered."""
        known = {row.get("request") for row in events(self._running.folder.ledger_file)}
        for file in sorted(self._folder.glob("*.taken")):
            request = self._read(file)
            if request is not None and request.request_id not in known:
                message = "the driver ended before it was done; ask again"
                self._write(request, accepted=False, message=message)
            file.unlink()

    def _say_awaited(self) -> None:
        """Say once that nothing goes on but by hand."""
        awaited = self._turns.awaited()
        is_idle = bool(awaited) and all(
            state.held
            or state.ended is not None
            or (self._turns.is_paused(state) and self._turns.is_waiting(state.trial_id))
            for state in self._running.states.values()
        )
        is_new = awaited != self._awaited and self._searcher.is_done
        if is_idle and is_new and self._turns.next_action().kind == "wait":
            root = self._running.folder.root
            self._running.monitor.say(
                f"sweep: waiting for {', '.join(awaited)}, paused by hand: `raytune-vlm control "
                f"{root} resume {awaited[0]}` lets it go on, `drain` ends the search without it"
            )
            self._awaited = awaited
