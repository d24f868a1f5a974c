"""Memory that does not suffice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from raytune_vlm.errors import TrialInfeasible, first_line


@contextmanager
def infeasible_without_memory(step: int) -> Iterator[None]:
    """What runs out of memory inside, in the update of a step, ends the trial as infeasible."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = f"out of memory in the update of step {step}: {first_line(error)}"
        raise TrialInfeasible(what) from None


def lacks_memory(error: Exception) -> bool:
    """Whether an error is that memory did not suffice."""
    return isinstance(error, torch.OutOfMemoryError | TrialInfeasible)
