"""How this package uses Ray Data: without its output, and with the errors of its tasks as ours."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from raytune_vlm.errors import RaytuneVlmError


@contextmanager
def quiet_ray_data(*, in_order: bool) -> Iterator[None]:
    """Ray Data set up for a job that the block runs; an error of this package that a task raised
    comes out as itself.

    Parameters
    ----------
    in_order
        Keep the order of the blocks.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    # After the first use of ray.data, which sets its own level; what it would print is raised.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.execution_options.preserve_order = in_order
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RaytuneVlmError):
            raise error.cause from None
        raise
