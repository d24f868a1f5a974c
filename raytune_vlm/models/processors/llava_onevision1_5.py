"""LLaVA-OneVision-1.5: Qwen2-VL's sizes and patches (of one frame) and image tokens.

As its published processor, Qwen2.5-VL's, but without a video part, which would need torchvision,
and without the token types that newer releases of it add and the model does not know.
"""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin, Qwen2VLImageProcessorPil

IMAGE_TOKEN = "<|image_pad|>"

SETTINGS = (
    *("size", "min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size"),
    *("image_mean", "image_std"),
)
"""What is taken from `preprocessor_config.json`."""


class LlavaOnevision15Processor(ProcessorMixin):
    """One `<|image_pad|>` of the chat template becomes one a group of patches."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: Any = None) -> None:
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: Any, image_idx: int, **_: Any) -> str:
        """The tokens of one image."""
        patches = int(image_inputs["image_grid_thw"][image_idx].prod())
        return IMAGE_TOKEN * (patches // self.image_processor.merge_size**2)


def build(
    tokenizer: Any, config: dict[str, Any], preprocessor: dict[str, Any]
) -> LlavaOnevision15Processor:
    """The processor of a model."""
    given = {name: preprocessor[name] for name in SETTINGS if preprocessor.get(name) is not None}
    given.setdefault("temporal_patch_size", 1)
    images = Qwen2VLImageProcessorPil(**given)
    return LlavaOnevision15Processor(images, tokenizer, tokenizer.chat_template)
