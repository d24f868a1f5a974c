"""The plan: which samples make up which optimizer step; a pure function of its arguments."""

from __future__ import annotations

import numpy as np

from raytune_vlm.config.experiment import digest_of


class Plan:
    """Global batches over shuffled epochs.

    Every sample is used once an epoch; a batch that reaches the end of an epoch goes on into the
    next one, so nothing is dropped. The plan does not depend on the number of workers:
    `(digest, step)` is all that resuming needs.

    Parameters
    ----------
    num_samples
        Samples of the training split, at least one.
    batch_size
        Samples per optimizer step, over all workers.
    seed
        Seed of the shuffles.
    """

    def __init__(self, num_samples: int, *, batch_size: int, seed: int, data_digest: str) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.digest = digest_of(
            {"n": num_samples, "batch": batch_size, "seed": seed, "data": data_digest}
        )
        self._epoch: tuple[int, np.ndarray] | None = None

    def step(self, number: int) -> np.ndarray:
        """Rows of the training split in optimizer step `number` (from 0); int64 `[batch_size]`."""
        first = number * self.batch_size
        positions = np.arange(first, first + self.batch_size)
        epochs, offsets = np.divmod(positions, self.num_samples)
        rows = np.empty(self.batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            rows[inside] = self._order(int(epoch))[offsets[inside]]
        return rows

    def _order(self, epoch: int) -> np.ndarray:
        if self._epoch is None or self._epoch[0] != epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._epoch = (epoch, generator.permutation(self.num_samples))
        return self._epoch[1]
