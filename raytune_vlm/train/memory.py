"""Memory that does not suffice for an update, which no smaller micro-batch makes smaller."""

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
