"""The tiny base model: its tokenizer, processor, configuration, and the shipped copy.

An Idefics3 of about 1.4 million parameters that reads rendered receipts. `BASE_FOLDER` holds the
shipped weights, trained by `python -m raytune_vlm.demo.pretrain`;
`python -m raytune_vlm.demo.base_model` checks them against `TRAINING.json`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from raytune_vlm.errors import CheckpointError

BASE_FOLDER = Path(__file__).parent / "base"
TRAINING_FILE = "TRAINING.json"
WEIGHTS_FILE = "model.safetensors"

IMAGE_SIZE = 96
PATCH_SIZE = 8
SCALE_FACTOR = 2
LONGEST_EDGE = 192
NUM_IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE // SCALE_FACTOR) ** 2

PAD, UNKNOWN, USER, ASSISTANT, END = "<pad>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>"
FAKE_IMAGE, IMAGE, GLOBAL_IMAGE = "<fake_token_around_image>", "<image>", "<global-img>"
END_OF_UTTERANCE = "<end_of_utterance>"  # the processor's class adds it; unused here
CONTROL_TOKENS = (
    PAD, UNKNOWN, USER, ASSISTANT, END, FAKE_IMAGE, IMAGE, GLOBAL_IMAGE, END_OF_UTTERANCE,
)  # fmt: skip
CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))
KEYS_A = ("items", "name", "qty", "cost", "sum")
KEYS_B = ("menu", "nm", "cnt", "price", "total", "total_price")
SEPARATOR_TAG = "<sep/>"
TAGS = (SEPARATOR_TAG, *(f"<{mark}s_{key}>" for key in KEYS_A + KEYS_B for mark in ("", "/")))
VOCABULARY = (*CONTROL_TOKENS, *CHARACTERS, *TAGS)
TOKEN_IDS = {token: index for index, token in enumerate(VOCABULARY)}
_PIECES = re.compile("|".join(map(re.escape, (*CONTROL_TOKENS, *TAGS))) + r"|[\s\S]")

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{- '<|assistant|>' -}}"
    "{%- generation -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{{- part['text'] -}}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|end|>' -}}"
    "{%- endgeneration -%}"
    "{%- else -%}{{- '<|user|>' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image>' -}}"
    "{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def build_tokenizer() -> Any:
    """A tokenizer in which every printable ASCII character and every tag is one token."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {token: index for token, index in TOKEN_IDS.items() if token not in TAGS}
    inner = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS]
    )
    inner.add_tokens([AddedToken(token, normalized=False, special=False) for token in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[
            token for token in CONTROL_TOKENS if token not in (PAD, UNKNOWN, END)
        ],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build_processor() -> Any:
    """The stock Idefics3 processor: one square image, no splitting, no torchvision."""
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    image_processor = Idefics3ImageProcessorPil(
        do_image_splitting=False,
        size={"longest_edge": LONGEST_EDGE},
        max_image_size={"longest_edge": IMAGE_SIZE},
    )
    return Idefics3Processor(
        image_processor,
        build_tokenizer(),
        image_seq_len=NUM_IMAGE_TOKENS,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(*, seed: int = 0) -> Any:
    """The model with random weights."""
    import torch
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    tokens = {
        "pad_token_id": TOKEN_IDS[PAD],
        "bos_token_id": None,
        "eos_token_id": TOKEN_IDS[END],
    }
    config = Idefics3Config(
        image_token_id=TOKEN_IDS[IMAGE],
        scale_factor=SCALE_FACTOR,
        tie_word_embeddings=True,
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(VOCABULARY),
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
            **tokens,
        },
        **tokens,
    )
    torch.manual_seed(seed)
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config.eos_token_id = TOKEN_IDS[END]
    model.generation_config.pad_token_id = TOKEN_IDS[PAD]
    return model


def encode(text: str) -> list[int]:
    """The token ids of a text, as the tokenizer gives them, without the tokenizer."""
    return [TOKEN_IDS.get(piece, TOKEN_IDS[UNKNOWN]) for piece in _PIECES.findall(text)]


def encode_prompt(prompt: str) -> list[int]:
    """The token ids of one user message with one image, up to where the answer begins."""
    image = f"{FAKE_IMAGE}{GLOBAL_IMAGE}{IMAGE * NUM_IMAGE_TOKENS}{FAKE_IMAGE}"
    return encode(f"{USER}{image}{prompt}{END}{ASSISTANT}")


def squeeze(image: Image.Image) -> np.ndarray:
    """The grey picture as the processor resizes it: [96, 96] bytes."""
    grey = image.convert("L")
    if grey.width >= grey.height:
        width, height = LONGEST_EDGE, int(LONGEST_EDGE / (grey.width / grey.height))
        height += height % 2
    else:
        height, width = LONGEST_EDGE, int(LONGEST_EDGE * (grey.width / grey.height))
        width += width % 2
    grey = grey.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(grey.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS))


def pixel_values(pictures: Sequence[np.ndarray]) -> Any:
    """What `squeeze` gave as the processor's tensor: [batch, 1, 3, 96, 96], in -1 to 1."""
    import torch

    grey = torch.from_numpy(np.stack(pictures)).to(torch.float32) / 127.5 - 1.0
    return grey[:, None, None].expand(-1, 1, 3, -1, -1).contiguous()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file as hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def verify(folder: Path = BASE_FOLDER) -> dict[str, Any]:
    """The training record of a base model, after its weights were checked against it."""
    record_path, weights_path = folder / TRAINING_FILE, folder / WEIGHTS_FILE
    for path in (record_path, weights_path):
        if not path.is_file():
            raise CheckpointError(f"the base model lacks {path.name}: {path} does not exist")
    record: dict[str, Any] = json.loads(record_path.read_text(encoding="utf-8"))
    found = file_sha256(weights_path)
    if found != record["sha256"]:
        raise CheckpointError(
            f"{weights_path} is not the file that {TRAINING_FILE} describes: "
            f"its sha256 is {found}, expected {record['sha256']}"
        )
    return record


if __name__ == "__main__":
    print(json.dumps(verify(), indent=2))  # noqa: T201
