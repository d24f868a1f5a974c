"""The random state of every library that a step may draw from, as tensors: no pickle.

`python` and `numpy` are Mersenne twisters (624 words and a position); both may hold the second half
of a pair of normal numbers, which is NaN here where they hold none.
"""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch


def seed(value: int) -> None:
    """Seed Python's `random`, numpy's legacy generator and torch's, accelerators included."""
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def capture(device: str) -> dict[str, torch.Tensor]:
    """This process's random state: Python's, numpy's, torch's, and its accelerator's.

    Returns
    -------
    dict
        `python` int64 `[625]`, `python_normal` float64 `[1]`, `numpy` int64 `[625]`,
        `numpy_normal` float64 `[1]`, `cpu` and (on a GPU) `cuda` as torch has them.
    """
    _, words, normal = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)
    twister = legacy["state"]
    found = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_normal": _normal(normal),
        "numpy": torch.tensor([*twister["key"].tolist(), twister["pos"]], dtype=torch.int64),
        "numpy_normal": _normal(legacy["gauss"] if legacy["has_gauss"] else None),
    }
    return found | of_torch(device)


def of_torch(device: str) -> dict[str, torch.Tensor]:
    """The part of it that is torch's: what dropout draws from."""
    found = {"cpu": torch.get_rng_state()}
    if device.startswith("cuda"):
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def restore(found: dict[str, torch.Tensor], device: str) -> None:
    """Put a captured state back; what is not in it stays as it is."""
    if "python" in found:
        words = tuple(found["python"].tolist())
        random.setstate((3, words, _held(found["python_normal"])))
    if "numpy" in found:
        *keys, position = found["numpy"].tolist()
        normal = _held(found["numpy_normal"])
        np.random.set_state(
            ("MT19937", np.array(keys, np.uint32), position, int(normal is not None), normal or 0.0)
        )
    if "cpu" in found:
        torch.set_rng_state(found["cpu"])
    if "cuda" in found and device.startswith("cuda"):
        torch.cuda.set_rng_state(found["cuda"], device)


def _normal(value: float | None) -> torch.Tensor:
    return torch.tensor([math.nan if value is None else value], dtype=torch.float64)


def _held(value: torch.Tensor) -> float | None:
    return None if math.isnan(float(value)) else float(value)
