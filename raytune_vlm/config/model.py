"""`model`: which base model is adapted."""

from typing import Literal

from raytune_vlm.config.section import Section


class ModelConfig(Section):
    """The frozen base model."""

    name: str = "demo"
    """`demo` (the tiny model that the package ships), `tiny:FAMILY` (a tiny random model of a
    family, for dry runs), a local folder, or a Hugging Face name."""
    revision: str | None = None
    """Commit or tag on the hub; None takes the default branch."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the frozen weights; adapters are always trained in float32."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation, as transformers names it; `auto` takes the one that transformers
    takes for the family: sdpa where the family has it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    image_backend: Literal["auto", "pil", "torchvision"] = "auto"
    """Whose resampling the pixels are equal to, bit for bit: Pillow's or torchvision's (which need
    not be installed); `auto` takes the one that transformers would take here. They differ a little,
    so a model should be served with the one that it was tuned with."""
