"""Tiny random models of the real classes, with real processors built offline.

For tests and dry runs: `write_tiny_model("qwen2_5_vl", folder)` leaves a folder that the program
takes as `model.name`. Tokenizers are byte-level with no merges, so any text round-trips.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from raytune_vlm.errors import did_you_mean
from raytune_vlm.models.tiny import documents, gemma, llava, mistral, others, qwen, torchvision

BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "gemma3": gemma.gemma3,
    "gemma4": gemma.gemma4,
    "gemma4_unified": gemma.gemma4_unified,
    "gemma3n": gemma.gemma3n,
    "paligemma": gemma.paligemma,
    "idefics3": others.idefics3,
    "smolvlm": others.smolvlm,
    "mllama": others.mllama,
    "llava": llava.llava,
    "llava_next": llava.llava_next,
    "llava_onevision": llava.llava_onevision,
    "internvl": llava.internvl,
    "pixtral": mistral.pixtral,
    "mistral3": mistral.mistral3,
    "qwen2_vl": qwen.qwen2_vl,
    "qwen2_5_vl": qwen.qwen2_5_vl,
    "qwen3_vl": qwen.qwen3_vl,
    "qwen2_5_omni_thinker": qwen.qwen2_5_omni_thinker,
    "qwen3_omni_moe_thinker": qwen.qwen3_omni_moe_thinker,
    "kimi_k25": torchvision.kimi_k25,
    "phi4_multimodal": torchvision.phi4_multimodal,
    "nemotron_h_omni": torchvision.nemotron_h_omni,
    "florence2": documents.florence2,
    "vision-encoder-decoder": documents.donut,
}
"""`model_type` -> its tiny model and processor."""


def write_tiny_model(model_type: str, folder: Path, *, seed: int = 0) -> Path:
    """Write a tiny random model of a family and its processor into a folder.

    Raises
    ------
    KeyError
        If there is no tiny model for the family; the message names those there are.
    """
    from raytune_vlm.models.loading import allow_missing_torchvision

    if model_type not in BUILDERS:
        raise KeyError(f"no tiny model for {model_type!r}{did_you_mean(model_type, BUILDERS)}")
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    allow_missing_torchvision()
    torch.manual_seed(seed)
    model, processor = BUILDERS[model_type]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
