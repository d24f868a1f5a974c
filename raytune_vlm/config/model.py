"""`model`: which base model is adapted."""

from typing import Literal

from raytune_vlm.config.section import Section


class ModelConfig(Section):
    """The frozen base model."""

    name: str = "demo"
    """`demo` (the tiny model that the package ships), a local folder, or a Hugging Face name."""
    revision: str | None = None
    """Commit or tag on the hub; None takes the default branch."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the frozen weights; adapters are always trained in float32."""
    quantization: Literal["none", "nf4"] = "none"
    """`nf4`: the linear layers of the language model are held in 4 bits (QLoRA, Dettmers et al.
    2023), those of the vision tower and the projector in `dtype`, in which all is computed. Needs
    the extra `qlora`."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation, as transformers names it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    image_backend: Literal["auto", "pil", "torchvision"] = "auto"
    """Whose resampling the pixels are equal to, bit for bit: Pillow's or torchvision's (which need
    not be installed); `auto` takes the one that transformers would take here. They differ a little,
    so a model should be served with the one that it was tuned with."""
