"""The exception tree: every error a user can cause or has to know about.

Each class is also the builtin that it specialises and can be pickled with its attributes, because
errors cross Ray processes. The command line prints them as one line and ends with `exit_status`:
2 for wrong use or bad input, 1 for a failure, 3 for a stop that `resume` can continue.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from raytune_vlm.visible import one_line

LONGEST_NAME = 80


class RaytuneVlmError(Exception):
    """The root of the tree. `message` is one line that names what is wrong and what to do.

    Several problems are a line each. They often quote what others wrote, and end in logs: control
    characters in them become marks, line breaks blanks.
    """

    exit_status = 1

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.message = "\n".join(map(one_line, problems))

    def __str__(self) -> str:
        return self.message


class ConfigError(RaytuneVlmError, ValueError):
    """The experiment or the command line is wrong; nothing was started."""

    exit_status = 2


class DataError(RaytuneVlmError, ValueError):
    """The data is missing, empty, or too much of it is bad."""

    exit_status = 2


class ModelError(RaytuneVlmError, ValueError):
    """The model cannot be found, is of an unknown family, or a LoRA target matches nothing."""

    exit_status = 2


class LeaseError(RaytuneVlmError, RuntimeError):
    """Another process drives this sweep folder."""

    exit_status = 2


class CheckpointError(RaytuneVlmError, OSError):
    """A checkpoint is torn, altered, or does not fit the run that wants it."""


class StorageFull(CheckpointError):
    """There is no room for a checkpoint; the recipe is not to blame, and `resume` goes on."""

    exit_status = 3


class EvaluationError(RaytuneVlmError, RuntimeError):
    """A score could not be computed, or scores of different variants were to be compared."""


class InfrastructureError(RaytuneVlmError, RuntimeError):
    """A worker, node or store failed; the recipe is not to blame."""


class TrialInfeasible(RaytuneVlmError, MemoryError):
    """The recipe cannot run here at all: out of memory, or a constraint is broken."""


class TrialDiverged(RaytuneVlmError, ArithmeticError):
    """The loss or the gradients stopped being finite numbers."""


class AuditFailed(RaytuneVlmError, RuntimeError):
    """The adapter does not train or has no effect, or its checkpoint or merge answers otherwise."""


class SweepInterrupted(RaytuneVlmError, RuntimeError):
    """The sweep stopped before its end and can be resumed."""

    exit_status = 3


class LabellingStopped(RaytuneVlmError, RuntimeError):
    """Labelling stopped before its end; the same command goes on and pays nothing twice."""

    exit_status = 3


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its `repr` where it says nothing."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the nearest known name, else the known names, else nothing.

    Names of more than `LONGEST_NAME` characters, such as a row may have, are not among them.
    """
    names = sorted(known_name for known_name in known if len(known_name) <= LONGEST_NAME)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f" (did you mean '{near[0]}'?)"
    return f" (known: {', '.join(names)})" if names and len(names) <= 24 else ""
