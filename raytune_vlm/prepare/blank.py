"""A grey image for batches of text alone, where workers hold parts of a model.

They wait for each other in every module: a rank without images would never come to the vision
tower.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from raytune_vlm.collate.encode import Encoder
from raytune_vlm.collate.encoded import Encoded
from raytune_vlm.errors import ModelError
from raytune_vlm.models.loading import Base


class _CountsImages(Protocol):
    num_images: np.ndarray


def blank_sample(base: Base, split: _CountsImages) -> Encoded | None:
    """A sample of one image without labels; None where every sample of the split has an image.

    Raises
    ------
    ModelError
        If it would change what the samples beside it are answered.
    """
    if split.num_images.all():
        return None
    if not base.family.text_beside_images:
        raise ModelError(
            f"{base.family.model_type} answers samples without images otherwise beside an image: "
            "leave them out, or use train.backend=ddp"
        )
    return Encoder(base.processor, base.family, base.image_backend).blank()
