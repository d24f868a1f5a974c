"""`Family`: what differs from one VLM architecture to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from raytune_vlm.errors import ModelError

MediaLayout = Literal["samples", "concatenate", "tokens"]
"""How a batch is made of the samples' media tensors:

- `samples`: stacked along a new first dimension, the others padded with zeros;
- `concatenate`: joined along dimension 0 (images, patches or tiles), the others padded with zeros;
- `tokens`: `[length, ...]`, padded with the tokens, on their side.
"""

Prompt = Literal["chat", "prefix", "encoder-decoder", "image-encoder"]
"""How a conversation becomes tokens:

- `chat`: by the processor's chat template;
- `prefix`: one question and one answer, as prefix and suffix of one sequence (PaliGemma);
- `encoder-decoder`: the question into the text encoder, the answer from the decoder (Florence-2);
- `image-encoder`: the image alone is encoded; the decoder reads the question and goes on with the
  answer (Donut).
"""


@dataclass(frozen=True)
class Family:
    """What differs from one architecture to the next.

    Attributes
    ----------
    model_type
        As `config.json` names it; `pixtral` is a `llava` whose vision tower is Pixtral's.
    scopes
        LoRA scope -> prefixes of module names. The longest prefix that fits a module decides.
    media
        Media tensor -> how a batch is made of it. What is not named is aligned with the tokens.
    prompt
        How a conversation becomes tokens.
    pixels
        What the model's forward calls the pixels; here they are `pixel_values`.
    channels
        Where the colour channel of the pixels is:

        - `-3`: its axis counted from the end, `[..., 3, height, width]`;
        - `patches`: Qwen's `[patches, 3 * t * p * p]`, cut on the device from flat images
          `[3 * height * width]`;
        - `interleaved`: patches whose last dimension is `p * p * 3`, the colour running fastest;
        - `planar`: patches whose last dimension is `3 * p * p`. Nemotron's processor resizes in
          float32 and does not round, so these are kept as float32;
        - `crops`: Phi-4's crops `[images, crops, 3, side, side]`. The small picture of the whole
          that comes ahead of them is made on the device, of the normalised crops.
    padded_images
        Whether images of a batch are padded to the largest, `image_sizes` telling what is image.
    model_class
        Class of transformers that loads it.
    max_images
        Most images of a sample; None: any number.
    needs
        Packages that the processor or the model imports beyond ours.
    no_linear
        Scopes without any linear layer, where LoRA cannot go.
    outside
        Prefixes of what belongs to no scope: audio towers, and what images never reach.
    never_called
        Last names of linear layers whose weight the model reads without calling them: LoRA on
        them would have no effect.
    left_padding
        Whether prompts of different lengths can be answered in one batch, padded on the left.
    text_beside_images
        Whether a sample without images is answered the same beside one with images.
    packing
        How several samples share a row (`collate.packed`): told apart by positions that start
        again, or by masks of our own; None: they cannot.
    multimodal_positions
        Whether positions are rotary in three dimensions, computed by the model's
        `get_rope_index`.
    remote_code
        transformers has no class for it: the model's code has to be trusted (`models/trust.py`).
    own_processor
        Its processor is one of `models/processors`, not AutoProcessor's.
    decoder_start
        The tokenizer's tokens that go ahead of an `image-encoder`'s question: `eos`, `bos`.
    """

    model_type: str
    scopes: Mapping[str, tuple[str, ...]]
    media: Mapping[str, MediaLayout] = field(
        default_factory=lambda: {"pixel_values": "concatenate"}
    )
    prompt: Prompt = "chat"
    pixels: str = "pixel_values"
    channels: Literal[-3, "patches", "interleaved", "planar", "crops"] = -3
    padded_images: bool = False
    model_class: str = "AutoModelForImageTextToText"
    max_images: int | None = None
    needs: tuple[str, ...] = ()
    no_linear: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    never_called: tuple[str, ...] = ()
    left_padding: bool = True
    text_beside_images: bool = True
    packing: Literal["positions", "masks"] | None = "positions"
    multimodal_positions: bool = False
    remote_code: bool = False
    own_processor: bool = False
    decoder_start: tuple[str, ...] = ()

    def check_scopes(self, scopes: set[str]) -> None:
        """Raise ModelError for a LoRA scope that holds no linear layer in this family."""
        for scope in sorted(scopes & set(self.no_linear)):
            others = " or ".join(name for name in self.scopes if name not in self.no_linear)
            raise ModelError(
                f"lora.scope: {scope!r} holds no linear layer in {self.model_type}; use {others}"
            )

    def check_packing(self, pack_tokens: int | None) -> None:
        """Raise ModelError if samples are to share rows and cannot in this family."""
        if pack_tokens is not None and self.packing is None:
            raise ModelError(
                f"train.pack_tokens={pack_tokens}: samples of {self.model_type} cannot share a row"
            )


def scopes(text: str, projector: str, vision: str) -> dict[str, tuple[str, ...]]:
    """`Family.scopes` from prefixes with spaces between them."""
    return {
        "text": tuple(text.split()),
        "projector": tuple(projector.split()),
        "vision": tuple(vision.split()),
    }
