"""`data.augmentation`: random changes of training images, all off by default."""

from pydantic import Field, model_validator

from raytune_vlm.config.section import Section


class AugmentationConfig(Section):
    """How far a training image may be changed.

    The ranges are small and there are no flips: what is written in a picture must stay readable,
    and a mirrored picture says something else.
    """

    brightness: float = Field(default=0.0, ge=0, le=0.5)
    """Largest relative change of the brightness, up or down."""
    contrast: float = Field(default=0.0, ge=0, le=0.5)
    """Largest relative change of the contrast."""
    saturation: float = Field(default=0.0, ge=0, le=1)
    """Largest relative change of the colourfulness."""
    jpeg_quality: tuple[int, int] | None = None
    """Lowest and highest quality (1 to 95) of a JPEG compression; None: none."""
    jpeg_probability: float = Field(default=0.5, ge=0, le=1)
    """Share of the images that are compressed, where `jpeg_quality` is given."""
    max_rotation_degrees: float = Field(default=0.0, ge=0, le=15)
    """Largest rotation, either way; the corners get the colour of the border."""
    min_crop: float = Field(default=1.0, ge=0.5, le=1)
    """Smallest share of width and of height that a random crop keeps; 1: no crop. The crop is
    resized to the size of the whole, so that a sample keeps its number of image tokens."""

    @model_validator(mode="after")
    def _quality_in_order(self) -> "AugmentationConfig":
        if self.jpeg_quality is not None:
            low, high = self.jpeg_quality
            if not 1 <= low <= high <= 95:
                raise ValueError(
                    f"jpeg_quality must be [low, high] with 1 <= low <= high <= 95, "
                    f"got [{low}, {high}]"
                )
        return self
