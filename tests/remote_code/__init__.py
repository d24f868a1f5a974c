"""Small models whose code lies beside their weights, one a family of `remote_families.py`."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from raytune_vlm.models.tiny import parts

HERE = Path(__file__).parent

CLASSES = {
    "kimi_vl": ("configuration_small.SmallConfig", "modeling_small.SmallModel"),
    "NVLM_D": ("modeling_small.SmallConfig", "modeling_small.SmallModel"),
    "llavaonevision1_5": ("modeling_small.SmallConfig", "modeling_small.SmallModel"),
    "nemotron_parse": ("modeling_small.SmallConfig", "modeling_small.SmallModel"),
}
"""`model_type` -> its configuration and its model, as `auto_map` names them."""


def write_remote_model(model_type: str, folder: Path) -> Path:
    """A folder with weights, tokenizer, and code that transformers runs only when told to."""
    torch.manual_seed(0)
    settings, tokens, preprocessor = SETTINGS[model_type]()
    modules = [name.rpartition(".") for name in CLASSES[model_type]]
    config_class, model_class = (
        getattr(importlib.import_module(f"remote_code.{model_type.lower()}.{module}"), name)
        for module, _, name in modules
    )
    model_class(config_class(**settings)).save_pretrained(folder)
    tokens.save_pretrained(folder)
    for file in (HERE / model_type.lower()).glob("*.py"):
        shutil.copy(file, folder)
    config, model = CLASSES[model_type]
    auto_map = {"AutoConfig": config, "AutoModel": model, "AutoModelForCausalLM": model}
    _merge(folder / "config.json", {"auto_map": auto_map})
    if model_type == "kimi_vl":
        own = [None, "tokenization_small.SmallTokenizer"]
        _merge(
            folder / "tokenizer_config.json",
            {"tokenizer_class": "SmallTokenizer", "auto_map": {"AutoTokenizer": own}},
        )
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def _merge(file: Path, more: dict[str, Any]) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **more}))


def _kimi() -> tuple[dict[str, Any], Any, dict[str, Any]]:
    specials = ("<|im_start|>", "<|media_start|>", "<|media_content|>", "<|media_end|>")
    tokens = parts.tokenizer(
        *specials, "<|media_pad|>", eos_token="<|im_end|>", pad_token="[PAD]", bos_token="[BOS]"
    )
    image = "<|media_start|>image<|media_content|><|media_pad|><|media_end|>"
    tokens.chat_template = parts.CHATML.replace("IMAGE", image)
    text = parts.text_config(**parts.ends(tokens))
    media = tokens.convert_tokens_to_ids("<|media_pad|>")
    settings = {"text_config": text, "media_token_id": media, "eos_token_id": tokens.eos_token_id}
    return settings, tokens, {"in_token_limit": 16, "patch_size": 14, "num_pooled_tokens": 1024}


def _nvlm() -> tuple[dict[str, Any], Any, dict[str, Any]]:
    tokens = parts.tokenizer(
        "<|im_start|>", "<|vision_pad|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokens.chat_template = (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
        "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    settings = {
        "llm_config": parts.text_config(**parts.ends(tokens)),
        "force_image_size": 56,
        "patch_size": 14,
        "downsample_ratio": 0.5,
        "max_dynamic_patch": 2,
        "vision_config": {"model_type": "intern_vit_6b"},
        "use_thumbnail": True,
    }
    return settings, tokens, {}


def _onevision() -> tuple[dict[str, Any], Any, dict[str, Any]]:
    from raytune_vlm.models.tiny.qwen import qwen2_5_vl

    model, processor = qwen2_5_vl()
    settings = model.config.to_dict()
    settings.pop("model_type")
    settings["vision_config"]["temporal_patch_size"] = 1
    images = processor.image_processor
    preprocessor = {
        "size": dict(images.size),
        "patch_size": images.patch_size,
        "merge_size": images.merge_size,
        "temporal_patch_size": 1,
    }
    processor.tokenizer.chat_template = processor.chat_template
    return settings, processor.tokenizer, preprocessor


def _parse() -> tuple[dict[str, Any], Any, dict[str, Any]]:
    tokens = parts.tokenizer(
        "<predict_bbox>", "<output_markdown>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    decoder = {
        **parts.ends(tokens, bos=True),
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 512,
        "is_decoder": True,
        "is_encoder_decoder": False,
        "add_cross_attention": True,
    }
    settings = {
        "decoder": decoder,
        "image_size": [64, 64],
        "decoder_start_token_id": tokens.eos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }
    return settings, tokens, {}


SETTINGS = {
    "kimi_vl": _kimi,
    "NVLM_D": _nvlm,
    "llavaonevision1_5": _onevision,
    "nemotron_parse": _parse,
}
