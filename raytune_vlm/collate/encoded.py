"""A sample as the model takes it; without torch, as data tasks need it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from raytune_vlm.errors import DataError

Span = tuple[int, int]
"""Half-open range of token positions `[start, end)`."""


class SampleRefused(DataError):
    """This one sample cannot be used; the reason is its message."""


@dataclass(frozen=True)
class Encoded:
    """A sample as the model takes it, not padded.

    Attributes
    ----------
    input_ids
        int32 `[length]`, image tokens already expanded.
    spans
        Half-open ranges of `input_ids` that carry loss: the assistant's turns, each with its
        end-of-turn token. Empty for a prompt that is to be answered.
    tensors
        Everything else the processor gave, by name: media tensors (pixels as uint8; for families
        that take patches flat channels-first images, see `collate.pixels`) and token-aligned
        tensors `[length]`.
    """

    input_ids: np.ndarray
    spans: list[Span]
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def num_labelled(self) -> int:
        """Tokens that carry loss."""
        return sum(end - start for start, end in self.spans)
