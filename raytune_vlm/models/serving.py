"""Can vLLM serve an adapter? `SERVED` and `NOT_SERVED`: what its source says of each family.

Read in the release named by `VLLM_VERSION`; vLLM itself is not needed. Three things can go wrong
with an adapter that PEFT loads well:

- vLLM refuses it: DoRA, `modules_to_save`, a rank above the largest (`vllm/lora/peft_helper.py`,
  `vllm/config/lora.py`);
- its architecture takes no adapters, or none on the vision side (`SupportsLoRA`,
  `supports_tower_connector_lora` of the class in `vllm/model_executor/models/`);
- **it leaves tensors out without a word.** A tensor's name is rewritten by the architecture's
  `hf_to_vllm_mapper`, and only its last part is checked; where no module of vLLM has the whole
  name, it is never applied (`LoRAModelManager.activate_adapter`). The modules that vLLM can adapt
  are given here as patterns of whole names, so that each tensor is looked up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VLLM_VERSION = "0.33.0"
"""The release, commit 4ba787ec9, whose source the tables below were read from."""

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of `--max-lora-rank`; an adapter may have any rank up to it."""

LOADABLE_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""`init_lora_weights`, where it is a name, of adapters that fit the unchanged base model."""

UNSUPPORTED_KEYS = {
    "use_dora": "DoRA",
    "modules_to_save": "modules trained in full (modules_to_save)",
    "lora_bias": "biases in the adapter (lora_bias)",
    "layer_replication": "layer_replication",
    "alora_invocation_tokens": "activated LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
}
"""Key of `adapter_config.json` that must be unset -> what it stands for."""


@dataclass(frozen=True)
class Served:
    """One architecture in vLLM.

    Attributes
    ----------
    architecture
        vLLM's class, as `config.json` selects it.
    renames
        Prefixes of names and what vLLM makes of them, one after the other.
    text
        Pattern of whole names, after renaming, of the language model's modules that vLLM adapts.
    tower
        The same of vision tower and connector, adapted with `--enable-tower-connector-lora`; None
        where vLLM adapts neither.
    """

    architecture: str
    renames: tuple[tuple[str, str], ...]
    text: str
    tower: str | None = None

    def rename(self, name: str) -> str:
        """A module's name as vLLM has it."""
        for old, new in self.renames:
            if name.startswith(old):
                name = new + name.removeprefix(old)
        return name


@dataclass(frozen=True)
class Verdict:
    """What vLLM does with an adapter."""

    problems: tuple[str, ...]
    """Why it cannot be served as it is; empty if it can."""
    options: tuple[str, ...] = ()
    """Options of `vllm serve` that it needs."""


_LAYER = r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
_TEXT = rf"language_model\.model\.{_LAYER}"
_LANGUAGE = ("model.language_model.", "language_model.model.")
_LLAVA = (
    _LANGUAGE,
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
# vLLM's classes of CLIP and SigLIP keep `vision_model` in their names; transformers 5 has left it
# out, so an adapter on those towers finds nothing there.
_SIGLIP = r"layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
_TOWER = rf"vision_tower\.vision_model\.encoder\.{_SIGLIP}"
_LINEARS = r"multi_modal_projector\.linear_[12]"
_QWEN = (_LANGUAGE, ("model.visual.", "visual."))
_QWEN_OLD = (*_QWEN, ("model.", "language_model.model."))
_QWEN_ATTENTION = r"visual\.blocks\.\d+\.attn\.(qkv|proj)"
_MERGER = r"visual\.merger\.mlp\.[02]"
_IDEFICS = (
    rf"model\.text_model\.{_LAYER}",
    rf"model\.(vision_model\.encoder\.{_SIGLIP}|connector\.modality_projection\.proj)",
)
_GEMMA4 = (
    ("model.vision_tower", "vision_tower"),
    ("model.embed_vision", "embed_vision"),
    _LANGUAGE,
)
_GEMMA4_TEXT = (
    rf"language_model\.model\.({_LAYER}|layers\.\d+\.per_layer_(input_gate|projection)"
    r"|per_layer_model_projection)"
)
_GEMMA4_TOWER = rf"vision_tower\.(encoder\.{_LAYER}\.linear|patch_embedder\.input_proj)"
_EMBED = r"embed_vision\.embedding_projection"

SERVED: dict[str, Served] = {
    "qwen2_vl": Served(
        "Qwen2VLForConditionalGeneration",
        _QWEN_OLD,
        _TEXT,
        rf"{_QWEN_ATTENTION}|visual\.blocks\.\d+\.mlp\.fc[12]|{_MERGER}",
    ),
    "qwen2_5_vl": Served(
        "Qwen2_5_VLForConditionalGeneration",
        _QWEN_OLD,
        _TEXT,
        rf"{_QWEN_ATTENTION}|visual\.blocks\.\d+\.mlp\.(gate|up|down)_proj|{_MERGER}",
    ),
    "qwen3_vl": Served(
        "Qwen3VLForConditionalGeneration",
        _QWEN,
        _TEXT,
        rf"{_QWEN_ATTENTION}|visual\.(blocks\.\d+\.mlp|merger|deepstack_merger_list\.\d+)"
        r"\.linear_fc[12]",
    ),
    "gemma3": Served("Gemma3ForConditionalGeneration", _LLAVA, _TEXT, _TOWER),
    "gemma4": Served(
        "Gemma4ForConditionalGeneration", _GEMMA4, _GEMMA4_TEXT, rf"{_GEMMA4_TOWER}|{_EMBED}"
    ),
    "gemma4_unified": Served("Gemma4UnifiedForConditionalGeneration", _GEMMA4, _GEMMA4_TEXT),
    # The projector is a plain linear layer there, which takes no adapter.
    "paligemma": Served("PaliGemmaForConditionalGeneration", _LLAVA, _TEXT, _TOWER),
    "llava": Served("LlavaForConditionalGeneration", _LLAVA, _TEXT, rf"{_TOWER}|{_LINEARS}"),
    "llava_next": Served(
        "LlavaNextForConditionalGeneration", _LLAVA, _TEXT, rf"{_TOWER}|{_LINEARS}"
    ),
    "idefics3": Served("Idefics3ForConditionalGeneration", (), *_IDEFICS),
    "smolvlm": Served("SmolVLMForConditionalGeneration", (), *_IDEFICS),
    "internvl": Served("InternS1ForConditionalGeneration", _LLAVA, _TEXT),
    "mistral3": Served(
        "Mistral3ForConditionalGeneration", (*_LLAVA, ("model.", "language_model.model.")), _TEXT
    ),
}

# Pixtral's checkpoints in transformers' format are LLaVA's class with another tower.
SERVED["pixtral"] = Served("LlavaForConditionalGeneration", _LLAVA, _TEXT)

_UNCHECKED = "how vLLM names its modules was not looked up"
_THINKER = "the names of the thinker's modules, as transformers has them, match none of vLLM's"

NOT_SERVED: dict[str, str] = {
    "qwen2_5_omni": _THINKER,
    "qwen2_5_omni_thinker": _THINKER,
    "qwen3_omni_moe": _THINKER,
    "qwen3_omni_moe_thinker": _THINKER,
    "gemma3n": "its Gemma3nForConditionalGeneration takes no adapters",
    "llava_onevision": "its LlavaOnevisionForConditionalGeneration takes no adapters",
    "kimi_k25": "its KimiK25ForConditionalGeneration takes no adapters",
    "kimi_vl": "its KimiVLForConditionalGeneration takes no adapters",
    "NVLM_D": _UNCHECKED,
    "llavaonevision1_5": _UNCHECKED,
    "nemotron_h_omni": _UNCHECKED,
    "nemotron_parse": _UNCHECKED,
    "mllama": "the architecture was removed in vLLM 0.10.2",
    "vision-encoder-decoder": "Donut was removed in vLLM 0.10.2",
    "florence2": "the architecture is only in a plugin (vllm-project/bart-plugin)",
    "phi4_multimodal": "Phi4MultimodalForCausalLM was removed in vLLM 0.12.0",
}
"""Families whose adapters vLLM does not serve -> why."""


def check_adapter(folder: Path, model_type: str) -> Verdict:
    """What vLLM does with a PEFT folder on a base of a family, from its two files alone."""
    from safetensors import safe_open

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    with safe_open(str(folder / "adapter_model.safetensors"), "pt") as file:
        return check_names(config, file.keys(), model_type)


def check_names(config: Mapping[str, Any], tensors: Iterable[str], model_type: str) -> Verdict:
    """The verdict on an `adapter_config.json` and the names of the adapter's tensors."""
    problems = [f"vLLM has no {what}" for key, what in UNSUPPORTED_KEYS.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        problems.append(f"vLLM has no trained biases (bias={config['bias']!r})")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in LOADABLE_INITS:
        problems.append(f"init_lora_weights={init!r} changes the base model's weights")
    options = ["--enable-lora"]
    rank = max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
    if rank > MAX_RANKS[-1]:
        problems.append(f"rank {rank} is above {MAX_RANKS[-1]}, the largest that vLLM allows")
    else:
        options.append(f"--max-lora-rank {next(size for size in MAX_RANKS if size >= rank)}")
    served = SERVED.get(model_type)
    if served is None:
        why = NOT_SERVED.get(model_type, "it is not in the table of raytune_vlm")
        return Verdict((*problems, f"vLLM {VLLM_VERSION} serves no {model_type} adapter: {why}"))
    pairs = (re.fullmatch(r"(.*)\.lora_[AB]\.weight", name) for name in tensors)
    modules = {pair[1].removeprefix("base_model.model.") for pair in pairs if pair}
    found, needs_tower = _places(served, modules)
    if found:
        problems.append(found)
    if needs_tower:
        options.append("--enable-tower-connector-lora")
    return Verdict(tuple(problems), tuple(options) if not problems else ())


def _places(served: Served, modules: set[str]) -> tuple[str | None, bool]:
    """What is wrong with where the modules are, and whether any is in tower or connector."""
    lost, needs_tower = [], False
    for module in sorted(modules):
        name = served.rename(module)
        if re.fullmatch(served.text, name):
            continue
        if served.tower is not None and re.fullmatch(served.tower, name):
            needs_tower = True
        else:
            lost.append(f"{module} (there {name})")
    if not lost:
        return None, needs_tower
    reach = "" if served.tower else ", which adapts the language model only"
    return (
        f"{len(lost)} of {len(modules)} adapted modules have no counterpart in vLLM's "
        f"{served.architecture}{reach}, and would be left out without a word: {lost[0]}"
    ), needs_tower
