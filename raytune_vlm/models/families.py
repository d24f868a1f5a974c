"""`FAMILIES`: everything the program knows about a VLM architecture, one entry a `model_type`.

A new family is one entry here and one builder in `models/tiny/`; the contract tests in
`tests/contracts/` pick it up from the tables.
"""

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
    packing
        How several samples share a row (`collate.packed`): told apart by positions that start
        again, or by masks of our own; None: they cannot.
    multimodal_positions
        Whether positions are rotary in three dimensions, computed by the model's
        `get_rope_index`.
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
    packing: Literal["positions", "masks"] | None = "positions"
    multimodal_positions: bool = False

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


def _scopes(text: str, projector: str, vision: str) -> dict[str, tuple[str, ...]]:
    return {
        "text": tuple(text.split()),
        "projector": tuple(projector.split()),
        "vision": tuple(vision.split()),
    }


_LLAVA_SCOPES = _scopes(
    "model.language_model.",
    "model.multi_modal_projector model.image_newline",
    "model.vision_tower.",
)
_IDEFICS_SCOPES = _scopes("model.text_model.", "model.connector.", "model.vision_model.")
_QWEN_SCOPES = _scopes(
    "model.language_model.",
    "model.visual.merger. model.visual.deepstack_merger_list.",
    "model.visual.",
)
_OMNI_SCOPES = _scopes(
    "model.language_model.", "model.visual.merger. model.visual.merger_list.", "model.visual."
)
_GEMMA4_SCOPES = _scopes("model.language_model.", "model.embed_vision.", "model.vision_tower.")

_PATCHES: dict[str, MediaLayout] = {"pixel_values": "concatenate", "image_grid_thw": "concatenate"}
_TILES: dict[str, MediaLayout] = {"pixel_values": "samples", "pixel_attention_mask": "samples"}
_SIZED: dict[str, MediaLayout] = {"pixel_values": "concatenate", "image_sizes": "concatenate"}
_GEMMA4_MEDIA: dict[str, MediaLayout] = {
    "pixel_values": "concatenate",
    "image_position_ids": "concatenate",
}
_PHI4 = "model.embed_tokens_extend.image_embed."
_GEMMA4_AUDIO = ("model.audio_tower.", "model.embed_audio.")


def _qwen(model_type: str) -> Family:
    return Family(
        model_type=model_type,
        scopes=_QWEN_SCOPES,
        media=_PATCHES,
        channels="patches",
        multimodal_positions=True,
    )


def _omni(model_type: str, model_class: str) -> Family:
    return Family(
        model_type=model_type,
        scopes=_OMNI_SCOPES,
        media=_PATCHES,
        channels="patches",
        model_class=model_class,
        outside=("model.audio_tower.",),
        multimodal_positions=True,
    )


_QWEN2_5_OMNI = "Qwen2_5OmniThinkerForConditionalGeneration"
_QWEN3_OMNI = "Qwen3OmniMoeThinkerForConditionalGeneration"

_ENTRIES = (
    _qwen("qwen2_vl"),
    _qwen("qwen2_5_vl"),
    _qwen("qwen3_vl"),
    # Of Qwen's omni models the thinker is tuned: what reads images and writes text.
    _omni("qwen2_5_omni", _QWEN2_5_OMNI),
    _omni("qwen2_5_omni_thinker", _QWEN2_5_OMNI),
    _omni("qwen3_omni_moe", _QWEN3_OMNI),
    _omni("qwen3_omni_moe_thinker", _QWEN3_OMNI),
    Family(
        model_type="gemma3",
        scopes=_scopes(
            "model.language_model.", "model.multi_modal_projector.", "model.vision_tower."
        ),
        packing="masks",
        # Gemma 3's projection is a bare Parameter.
        no_linear=("projector",),
    ),
    Family(
        model_type="gemma4",
        scopes=_GEMMA4_SCOPES,
        media=_GEMMA4_MEDIA,
        channels="interleaved",
        outside=_GEMMA4_AUDIO,
    ),
    Family(
        model_type="gemma4_unified",
        # No vision tower: patches are projected into the language model.
        scopes=_scopes(
            "model.language_model.",
            "model.embed_vision.multimodal_embedder.",
            "model.embed_vision.",
        ),
        media=_GEMMA4_MEDIA,
        channels="interleaved",
        needs=("torchvision",),
        outside=_GEMMA4_AUDIO,
    ),
    Family(
        model_type="gemma3n",
        scopes=_GEMMA4_SCOPES,
        needs=("timm", "torchvision"),
        # MobileNet-V5 is made of convolutions.
        no_linear=("vision",),
        outside=_GEMMA4_AUDIO,
        never_called=("correction_coefs",),
    ),
    Family(model_type="paligemma", scopes=_LLAVA_SCOPES, prompt="prefix", packing=None),
    Family(model_type="llava", scopes=_LLAVA_SCOPES),
    Family(model_type="pixtral", scopes=_LLAVA_SCOPES, media=_SIZED, padded_images=True),
    Family(model_type="mistral3", scopes=_LLAVA_SCOPES, media=_SIZED, padded_images=True),
    Family(model_type="llava_next", scopes=_LLAVA_SCOPES, media=_SIZED),
    Family(
        model_type="llava_onevision",
        scopes=_LLAVA_SCOPES,
        media={**_SIZED, "batch_num_images": "concatenate"},
    ),
    Family(
        model_type="internvl",
        scopes=_LLAVA_SCOPES,
    ),
    Family(model_type="idefics3", scopes=_IDEFICS_SCOPES, media=_TILES),
    Family(
        model_type="smolvlm",
        scopes=_IDEFICS_SCOPES,
        media=_TILES,
        needs=("num2words",),
    ),
    Family(
        model_type="mllama",
        scopes=_scopes(
            "model.language_model.", "model.multi_modal_projector", "model.vision_model."
        ),
        media={
            "pixel_values": "samples",
            "aspect_ratio_ids": "samples",
            "aspect_ratio_mask": "samples",
            "cross_attention_mask": "tokens",
        },
        packing=None,
    ),
    Family(
        model_type="kimi_k25",
        scopes=_scopes("model.language_model.", "model.mm_projector.", "model.vision_tower."),
        media=_PATCHES,
        needs=("torchvision",),
    ),
    Family(
        model_type="phi4_multimodal",
        scopes=_scopes(
            "model.embed_tokens. model.layers. model.norm.",
            f"{_PHI4}img_projection_ {_PHI4}global_img_ {_PHI4}sub_img_",
            f"{_PHI4}img_processor.embeddings. {_PHI4}img_processor.encoder. "
            f"{_PHI4}img_processor.post_layernorm.",
        ),
        media={**_SIZED, "image_attention_mask": "concatenate"},
        pixels="image_pixel_values",
        channels="crops",
        model_class="AutoModelForMultimodalLM",
        needs=("torchvision",),
        # Features are taken ahead of the tower's pooling head.
        outside=("model.embed_tokens_extend.audio_embed.", f"{_PHI4}img_processor.head."),
    ),
    Family(
        model_type="nemotron_h_omni",
        scopes=_scopes(
            "language_model.model.",
            "multi_modal_projector.",
            "vision_model.embeddings.cls_ vision_model.embeddings.position_ "
            "vision_model.embeddings.patch_ vision_model.encoder.",
        ),
        media={"pixel_values": "concatenate", "image_grid_hw": "concatenate"},
        channels="planar",
        needs=("torchvision",),
        outside=("audio_tower.", "embed_audio.", "vision_model.embeddings.video_"),
    ),
    Family(
        model_type="florence2",
        scopes=_LLAVA_SCOPES,
        prompt="encoder-decoder",
        max_images=1,
        packing=None,
    ),
    Family(
        model_type="vision-encoder-decoder",
        scopes=_scopes("decoder.", "enc_to_dec_proj", "encoder."),
        prompt="image-encoder",
        max_images=1,
        packing=None,
        # Donut's encoder and decoder are of one width.
        no_linear=("projector",),
        # Donut's decoder counts positions from the first token, padding or not.
        left_padding=False,
    ),
)

FAMILIES: dict[str, Family] = {entry.model_type: entry for entry in _ENTRIES}
