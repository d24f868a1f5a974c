"""A part of a split that is the same in every trial, for rungs that need not see all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def within_share(sample_ids: Sequence[str], share: float, seed: int) -> list[int]:
    """The places of the samples that a share of the split holds, in order.

    Each sample goes by the hash of the seed and its own id: the parts are nested, and samples that
    are added change nothing for the others.
    """
    if share >= 1:
        return list(range(len(sample_ids)))
    return [place for place, name in enumerate(sample_ids) if _position(name, seed) < share]


def _position(sample_id: str, seed: int) -> float:
    """Where in [0, 1) a sample stands."""
    digest = hashlib.sha256(f"{seed}/rung/{sample_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
