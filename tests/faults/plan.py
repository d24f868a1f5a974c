"""The plan: which fault strikes where, and how the sweep has to end.

The passage of its point at which a fault strikes is drawn from the seed, among those that the
undisturbed sweep made.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

KILLED = -9


@dataclass(frozen=True)
class Fault:
    """A row of the plan.

    Attributes
    ----------
    where
        For people.
    point, moment, what, options
        See `strike/sitecustomize.py`: a point that is wrapped; `before`, `in` (before the first
        fsync) or `after` it; an action and what it needs.
    ends
        Exit status of every life of the driver; all but the last are followed by `resume`.
    changes
        Dotted keys of the experiment.
    says
        What the driver's output has to contain.
    repeats
        Whether steps may be done again: those since the last checkpoint.
    without
        A trial that the fault itself changes, left out of the comparison.
    on_tmpfs
        Whether the storage has to be a small file system of its own, which takes a privilege.
    """

    name: str
    where: str
    point: str
    moment: str
    what: str
    options: dict[str, Any] = field(default_factory=dict)
    ends: Sequence[int] = (0,)
    changes: dict[str, Any] = field(default_factory=dict)
    says: str = ""
    repeats: bool = True
    without: str | None = None
    on_tmpfs: bool = False

    def plan(self, seed: int, trace: list[dict[str, Any]]) -> dict[str, Any]:
        """What `plan.json` says; `trace` is that of the undisturbed sweep."""
        only = self.options.get("only", {})
        passages = sum(
            row.get("point") == self.point and all(row[key] == only[key] for key in only)
            for row in trace
        )
        chance = random.Random(f"{seed}/{self.name}")
        drawn = {"number": chance.randint(1, passages), "place": chance.random()}
        return {
            **drawn,
            "point": self.point,
            "moment": self.moment,
            "what": self.what,
            **self.options,
        }


@dataclass(frozen=True)
class Change:
    """What is not as it was when a sweep that was killed half-way is resumed.

    Attributes
    ----------
    file, before, after
        A text in a file, and what stands there instead; files of the data begin with `data/`.
    end
        The exit status of `resume`.
    """

    name: str
    where: str
    file: str
    before: str
    after: str
    end: int
    says: str


HALFWAY = "driver killed after a ledger write"
"""The fault that leaves behind what is resumed with changes."""

CHANGES = (
    Change(
        "configuration changed",
        "another `train.batch_size` in `experiment.json`",
        "experiment.json",
        '"batch_size": 4',
        '"batch_size": 3',
        2,
        "was changed since the sweep began",
    ),
    Change(
        "data changed",
        "another answer in the training data",
        "data/train.jsonl",
        '"text": "tea"',
        '"text": "ham"',
        2,
        "changed since the sweep began",
    ),
    Change(
        "code or library changed",
        "another version in `experiment.json`",
        "experiment.json",
        '"raytune-vlm": "',
        '"raytune-vlm": "0.0.',
        0,
        "WARNING: changed since the sweep began: raytune-vlm",
    ),
)

DRIVER = {"victim": "driver"}

FAULTS = (
    *(
        Fault(
            f"driver killed {moment} a ledger write",
            "kill -9 of itself",
            "ledger",
            moment,
            "kill",
            ends=(KILLED, 0),
        )
        for moment in ("before", "in", "after")
    ),
    Fault(
        "driver killed in the conclusion",
        "kill -9 once `report` was touched",
        "ledger",
        "after",
        "kill",
        {"only": {"event": "touched"}},
        ends=(KILLED, 0),
    ),
    *(
        Fault(
            f"driver killed {moment} a checkpoint write",
            "kill -9 by the worker that writes it",
            "checkpoint",
            moment,
            "kill",
            DRIVER,
            ends=(KILLED, 0),
        )
        for moment in ("before", "in", "after")
    ),
    Fault("worker killed", "kill -9 after a step", "step", "after", "kill"),
    Fault("worker killed in a checkpoint write", "kill -9 of itself", "checkpoint", "in", "kill"),
    Fault("evaluation killed half-way", "kill -9 after some answers", "answer", "after", "kill"),
    Fault(
        "packed host killed",
        "two slots, kill -9 after a step",
        "step",
        "after",
        "kill",
        changes={"sweep.slots": 2, "sweep.packing": "exact"},
    ),
    Fault(
        "proxy killed",
        "kill -9 before it asks for a report",
        "proxy",
        "before",
        "kill",
        says="its proxy died",
    ),
    Fault(
        "Ray Train's controller killed",
        "kill -9 after a step",
        "step",
        "after",
        "kill",
        {"victim": "TrainController"},
    ),
    Fault(
        "board killed",
        "kill -9 after a step",
        "step",
        "after",
        "kill",
        {"victim": "BoardState"},
        ends=(3, 0),
        says="the board died",
    ),
    Fault(
        "driver told to stop",
        "SIGTERM after a step",
        "step",
        "after",
        "kill",
        {**DRIVER, "signal": "SIGTERM"},
        ends=(3, 0),
        repeats=False,
    ),
    Fault(
        "driver told to stop in the conclusion",
        "SIGTERM once `report` was touched",
        "ledger",
        "after",
        "kill",
        {"only": {"event": "touched"}, "signal": "SIGTERM"},
        ends=(3, 0),
        repeats=False,
    ),
    Fault(
        "worker stopped",
        "SIGSTOP after a step, never continued",
        "step",
        "after",
        "kill",
        {"signal": "SIGSTOP"},
        ends=(3, 0),
        changes={"sweep.max_wait_s": 45},
        says="has had no workers",
    ),
    Fault(
        "worker hangs",
        "the training thread stands still after a step",
        "step",
        "after",
        "hang",
        changes={"train.hang_timeout_s": 5},
        says="nothing moved for",
    ),
    Fault(
        "loss is not a number",
        "once, in a step of t0001",
        "loss",
        "after",
        "nan",
        {"only": {"trial": "t0001"}},
        without="t0001",
    ),
    Fault(
        "out of memory",
        "once, in a forward pass of t0001",
        "loss",
        "before",
        "oom",
        {"only": {"trial": "t0001"}},
        without="t0001",
        says="micro-batch 2 -> 1",
    ),
    *(
        Fault(
            f"checkpoint {how}",
            f"`{file}` right after it was written, worker killed",
            "checkpoint",
            "after",
            "damage",
            {"how": how, "file": file},
            says="checkpoint passed over",
        )
        for how, file in (
            ("truncated", "optimizer.safetensors"),
            ("altered", "adapter_model.safetensors"),
        )
    ),
    *(
        Fault(
            f"disk full in the {part}",
            "a small tmpfs, filled after a step; room is made before `resume`",
            "step",
            "after",
            "fill",
            {"only": {"trial": trial_id}},
            ends=(3, 0),
            on_tmpfs=True,
        )
        for part, trial_id in (("search", "t0001"), ("conclusion", "t0002/seed-1"))
    ),
    Fault(
        "storage disappears",
        "after a step, back before `resume`",
        "step",
        "after",
        "hide",
        ends=(3, 0),
        on_tmpfs=True,
    ),
    Fault(
        "searcher raises",
        "once, at a proposal",
        "proposal",
        "before",
        "raise",
        ends=(1, 0),
    ),
    Fault(
        "two drivers on one folder",
        "`resume` by another process",
        "ledger",
        "after",
        "second",
        says="is driven by process",
    ),
    Fault(
        "clock set back",
        "an hour, for the driver, at a ledger write",
        "ledger",
        "before",
        "clock",
    ),
)
