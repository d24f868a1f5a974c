"""Neat packing: several samples in one row, none of which sees another; without torch.

The samples' tokens stand one after the other and `segments` numbers them; on the device
`collate.positions` makes of it what keeps them apart. Losses equal those of the samples alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raytune_vlm.collate.arrays import same_size
from raytune_vlm.collate.encoded import Encoded
from raytune_vlm.models.families import Family

SEGMENTS = "segments"
"""Token-aligned: 1 for the first sample of a row, 2 for the second, ...; 0 for padding."""


def joined(samples: Sequence[Encoded], family: Family) -> Encoded:
    """Samples as one row, with `segments`."""
    lengths = [len(sample.input_ids) for sample in samples]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    spans = [
        (int(start) + first, int(start) + last)
        for start, sample in zip(starts, samples, strict=False)
        for first, last in sample.spans
    ]
    tensors = {}
    for name in sorted({name for sample in samples for name in sample.tensors}):
        if name in family.media:
            arrays = [sample.tensors[name] for sample in samples if name in sample.tensors]
            tensors[name] = np.concatenate(same_size(arrays))
        else:  # token-aligned: a sample without it counts as zeros
            arrays = [
                sample.tensors.get(name, np.zeros(length, dtype=np.int8))
                for sample, length in zip(samples, lengths, strict=True)
            ]
            tensors[name] = np.concatenate(arrays)
    tensors[SEGMENTS] = np.repeat(np.arange(1, len(samples) + 1, dtype=np.int32), lengths)
    ids = np.concatenate([sample.input_ids for sample in samples])
    return Encoded(ids, spans, tensors)
