"""Best-fit-decreasing bin packing, for many windows of samples at once.

Rule: within a window the longest item that is left goes into the bin with the least room that
still holds it (Johnson, "Near-optimal bin packing algorithms", 1973). A window is small enough for
the order of the samples to stay random and large enough for its last, half-filled bins not to
matter; all windows are packed side by side, one numpy operation an item.
"""

from __future__ import annotations

import numpy as np

WINDOW = 1024
"""Samples that are packed together."""


def best_fit_decreasing(lengths: np.ndarray, capacity: int, window: int = WINDOW) -> np.ndarray:
    """The bin of each item; bins are numbered in the order of the windows.

    Parameters
    ----------
    lengths
        int `[items]`, each in 1..capacity.
    capacity
        What the lengths in a bin may sum up to.
    window
        Items per window: items of different windows never share a bin.

    Returns
    -------
    numpy.ndarray
        int64 `[items]`, values `0 .. bins - 1`, every bin in use.

    Raises
    ------
    ValueError
        If an item is longer than the capacity, or not positive.
    """
    if len(lengths) == 0:
        return np.zeros(0, dtype=np.int64)
    if lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(
            f"lengths must lie in 1..{capacity}, got {int(lengths.min())}..{int(lengths.max())}"
        )
    whole = len(lengths) - len(lengths) % window
    parts = [_pack(lengths[:whole].reshape(-1, window), capacity)] if whole else []
    if whole < len(lengths):
        parts.append(_pack(lengths[whole:].reshape(1, -1), capacity))
    local = np.concatenate([part.ravel() for part in parts])
    numbers = (np.arange(len(lengths)) // window) * window + local
    _, bins = np.unique(numbers, return_inverse=True)
    return bins.astype(np.int64)


def _pack(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """`best_fit_decreasing` for `[windows, items]`: the bin of each item within its window."""
    small = np.int16 if capacity < np.iinfo(np.int16).max else np.int32
    windows, items = lengths.shape
    order = np.argsort(-lengths, axis=1, kind="stable")
    falling = np.take_along_axis(lengths, order, axis=1).astype(small)
    # An unopened bin has all its room: it is the best fit only where no opened one holds the item.
    room = np.full((windows, items), capacity, dtype=small)
    chosen = np.empty((windows, items), dtype=np.int64)
    everywhere = np.arange(windows)
    too_small = np.iinfo(small).max
    opened = 0
    for place in range(items):
        length = falling[:, place]
        seen = room[:, : opened + 1]
        fits = np.where(seen >= length[:, None], seen, too_small)
        best = fits.argmin(axis=1)
        room[everywhere, best] -= length
        chosen[:, place] = best
        opened = max(opened, int(best.max()) + 1)
        opened = min(opened, items - 1)
    bins = np.empty_like(chosen)
    np.put_along_axis(bins, order, chosen, axis=1)
    return bins
