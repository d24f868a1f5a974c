"""raytune_vlm: find the best LoRA recipe for a vision-language model, and prove it."""

__version__ = "0.1.0"
