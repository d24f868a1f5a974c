"""NVLM-D: tiles of 448 pixels in the best fitting grid, a thumbnail last, a text tag ahead of each.

    <Image><tile_1>....<tile_2>....<tile_global_thumbnail>....</Image>

where the dots are 256 image tokens; an image of one tile is its own thumbnail. Rules from
vllm-project/vllm, vllm/model_executor/models/nvlm_d.py (tags) and internvl.py (tiles); the tiling
is InternVL's, which transformers' `GotOcr2ImageProcessorPil` has.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from transformers import GotOcr2ImageProcessorPil, ProcessorMixin

from raytune_vlm.errors import ModelError

IMAGE_TOKEN = "<|vision_pad|>"

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]

FLATTEN = (
    "{%- set flat = namespace(messages=[], text='') -%}"
    "{%- for message in messages -%}"
    "{%- set flat.text = '' -%}"
    "{%- if message['content'] is string -%}{%- set flat.text = message['content'] -%}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set flat.text = flat.text + 'IMAGE\n' -%}"
    "{%- else -%}{%- set flat.text = flat.text + part['text'] -%}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set flat.messages = flat.messages + "
    "[{'role': message['role'], 'content': flat.text}] -%}"
    "{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
).replace("IMAGE", IMAGE_TOKEN)
"""Put ahead of a chat template for texts, it makes texts of lists of parts: an image is its token
and a newline."""


class NVLMDProcessor(ProcessorMixin):
    """One `<|vision_pad|>` of the chat template becomes the tagged tiles of an image."""

    def __init__(
        self, image_processor: Any, tokenizer: Any, chat_template: Any = None, **more: int
    ) -> None:
        self.image_seq_length = more.pop("image_seq_length", 256)
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: Any, image_idx: int, **_: Any) -> str:
        """The text of one image."""
        return tagged_tiles(int(image_inputs["num_patches"][image_idx]), self.image_seq_length)

    @property
    def unused_input_names(self) -> list[str]:
        """What the image processor gives and the model does not take."""
        return ["num_patches"]


def tagged_tiles(num_tiles: int, tokens_per_tile: int) -> str:
    """The text of an image of so many tiles, the thumbnail counted."""
    tags = [f"<tile_{number}>" for number in range(1, num_tiles)] + ["<tile_global_thumbnail>"]
    return f"<Image>{''.join(tag + IMAGE_TOKEN * tokens_per_tile for tag in tags)}</Image>"


def build(tokenizer: Any, config: dict[str, Any], preprocessor: dict[str, Any]) -> NVLMDProcessor:
    """The processor of a model.

    Raises
    ------
    ModelError
        If the model's tiles have no thumbnail, which its tags cannot say.
    """
    if config.get("use_thumbnail") is False:
        raise ModelError("NVLM_D: use_thumbnail=false in config.json: no tags are known for that")
    vision = config["vision_config"]
    side = config.get("force_image_size") or vision["image_size"]
    patch = config.get("patch_size") or vision["patch_size"]
    images = GotOcr2ImageProcessorPil(
        size={"height": side, "width": side},
        crop_to_patches=config.get("dynamic_image_size", True),
        min_patches=config.get("min_dynamic_patch", 1),
        max_patches=config.get("max_dynamic_patch", 6),
        image_mean=preprocessor.get("image_mean", IMAGENET_MEAN),
        image_std=preprocessor.get("image_std", IMAGENET_STD),
    )
    tokens = int((side // patch) ** 2 * config.get("downsample_ratio", 0.5) ** 2)
    template = tokenizer.chat_template and FLATTEN + tokenizer.chat_template
    return NVLMDProcessor(images, tokenizer, template, image_seq_length=tokens)


def connect(model: Any, processor: NVLMDProcessor) -> None:
    """Give a loaded model the `forward` and `generate` that the other families have.

    The published ones want flags of images, print from rank 0 of a process group, and return the
    new tokens alone. What they are made of is kept: `extract_feature` `[tiles, tokens, width]` in
    place of the image tokens, then `language_model`.
    """

    def embedded(self: Any, input_ids: Any, pixel_values: Any) -> Any:
        embeds = self.language_model.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return embeds
        features = self.extract_feature(pixel_values).to(embeds)
        there = (input_ids == processor.image_token_id).unsqueeze(-1).expand_as(embeds)
        if int(there.sum()) != features.numel():
            tokens, found = int(there[..., 0].sum()), features.numel() // embeds.shape[-1]
            raise ValueError(f"{tokens} image tokens but {found} image features")
        return embeds.masked_scatter(there, features)

    def forward(
        self: Any, input_ids: Any, attention_mask: Any = None, pixel_values: Any = None, **more: Any
    ) -> Any:
        embeds = embedded(self, input_ids, pixel_values)
        return self.language_model(inputs_embeds=embeds, attention_mask=attention_mask, **more)

    def generate(
        self: Any, input_ids: Any, attention_mask: Any = None, pixel_values: Any = None, **more: Any
    ) -> Any:
        import torch

        embeds = embedded(self, input_ids, pixel_values)
        new = self.language_model.generate(
            inputs_embeds=embeds, attention_mask=attention_mask, **more
        )
        return torch.cat([input_ids, new], dim=1)

    model.forward = MethodType(forward, model)
    model.generate = MethodType(generate, model)
    model.generation_config = model.language_model.generation_config
