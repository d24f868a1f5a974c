"""Loading a base model and its processor.

`load_processor` is what the data stage needs, `load_base` what trains, `meta_model` what predicts.
"""

from __future__ import annotations

import fcntl
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytune_vlm.config.model import ModelConfig
from raytune_vlm.errors import ModelError, did_you_mean, first_line
from raytune_vlm.models.chat_template import check_template
from raytune_vlm.models.families import Family
from raytune_vlm.models.image_backends import ImageBackend, image_backend
from raytune_vlm.models.location import check_model, code_options, config_json, model_path
from raytune_vlm.models.lora import scope_of
from raytune_vlm.models.quantization import quantization_options

if TYPE_CHECKING:
    import torch


@dataclass
class Base:
    """A frozen base model with its processor."""

    model: torch.nn.Module
    processor: Any
    family: Family
    image_backend: ImageBackend = "pil"


def load_processor(config: ModelConfig) -> Any:
    """The processor of a model, as transformers builds it, padding on the right.

    Of a family that has none in transformers it is one of ours (`models/processors`), around the
    model's own tokenizer.

    Raises
    ------
    ModelError
        If transformers cannot build it, with its reason, the tokenizer is code that nobody trusts,
        or the chat template is refused (`check_template`).
    """
    import transformers

    family = check_model(config)
    allow_missing_torchvision()
    try:
        if family.own_processor:
            from raytune_vlm.models.processors import build_processor

            with _code_lock(family):
                processor = build_processor(
                    model_path(config), family, code_options(config, family)
                )
        else:
            # By attribute: `allow_missing_torchvision` may have changed what is there.
            processor = transformers.AutoProcessor.from_pretrained(
                model_path(config), revision=config.revision, trust_remote_code=False
            )
    except (OSError, ValueError, ImportError, AttributeError, TypeError) as error:
        reason = first_line(error)
        raise ModelError(f"model.name={config.name!r}: no processor: {reason}") from error
    images = processor.image_processor
    if images.backend != "pil" and hasattr(transformers, f"{type(images).__name__}Pil"):
        # Sizes and tiles come from the Pillow class, whatever the resampling (`collate.pixels`).
        processor.image_processor = transformers.AutoImageProcessor.from_pretrained(
            model_path(config), revision=config.revision, backend="pil", trust_remote_code=False
        )
    if hasattr(processor, "spatial_merge_size"):
        # Pixtral's processor sets this at each call; here its image processor is called alone too.
        side = processor.patch_size * processor.spatial_merge_size
        processor.image_processor.patch_size = {"height": side, "width": side}
    tokenizer = processor.tokenizer
    if processor.chat_template is None:  # Phi-4's processor drops it when it is loaded
        processor.chat_template = getattr(tokenizer, "chat_template", None)
    if isinstance(processor.chat_template, str):
        check_template(processor.chat_template, config.name)
    if tokenizer.pad_token_id is None:
        raise ModelError(f"model.name={config.name!r}: the tokenizer has no padding token")
    return processor


@contextmanager
def _code_lock(family: Family) -> Iterator[None]:
    """One process of a machine at a time: transformers copies code into its cache without a lock,
    and a process may import what another is still writing."""
    if not family.remote_code:
        yield
        return
    from transformers.dynamic_module_utils import HF_MODULES_CACHE

    Path(HF_MODULES_CACHE).mkdir(parents=True, exist_ok=True)
    with (Path(HF_MODULES_CACHE) / ".raytune_vlm.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _fetch_code(config: ModelConfig, family: Family) -> None:
    """Copy and import the code of a model's classes; loading then finds it copied."""
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    path, options = model_path(config), code_options(config, family)
    classes = config_json(config).get("auto_map", {})
    if family.model_class not in classes:
        raise ModelError(
            f"model.name={config.name!r}: its auto_map names no {family.model_class}"
            f"{did_you_mean(family.model_class, classes)}"
        )
    with _code_lock(family):
        AutoConfig.from_pretrained(path, **options)
        get_class_from_dynamic_module(
            classes[family.model_class],
            path,
            revision=options["revision"],
            code_revision=options["code_revision"],
        )


def allow_missing_torchvision() -> None:
    """Let image-text processors load that need nothing of torchvision, where it is absent.

    transformers checks the video slot of a processor against `VideoProcessorMixin`, which its
    lazy module does not export without torchvision: it is named there. Whatever video processor a
    checkpoint asks for, the slot gets that base class with the checkpoint's settings: images never
    come to it, and it refuses videos. Pixtral's processor, marked as needing torchvision, takes one
    function from the module of its torchvision class that the module of the Pillow class has too.
    """
    if find_spec("torchvision") is not None:
        return
    import transformers
    import transformers.processing_utils as processing
    from transformers.models import pixtral
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor
    from transformers.models.pixtral import image_processing_pil_pixtral
    from transformers.video_processing_utils import VideoProcessorMixin

    processing.transformers_module.VideoProcessorMixin = VideoProcessorMixin
    AutoVideoProcessor.from_pretrained = VideoProcessorMixin.from_pretrained
    name = "transformers.models.pixtral.image_processing_pixtral"
    sys.modules.setdefault(name, image_processing_pil_pixtral)
    from transformers.models.pixtral.processing_pixtral import PixtralProcessor

    pixtral.PixtralProcessor = transformers.PixtralProcessor = PixtralProcessor


def meta_model(config: ModelConfig) -> torch.nn.Module:
    """The model without its weights (on the meta device): names, shapes and dtypes only."""
    import torch
    import transformers

    family = check_model(config)
    options = code_options(config, family)
    how = {"dtype": getattr(torch, config.dtype), "attn_implementation": _attention(config)}
    chosen: Any = getattr(transformers, family.model_class)
    with torch.device("meta"):
        if family.model_class.startswith("Auto"):
            plain = transformers.AutoConfig.from_pretrained(model_path(config), **options)
            trusted = {"trust_remote_code": True} if family.remote_code else {}
            model = chosen.from_config(plain, **how, **trusted)
        else:
            plain = chosen.config_class.from_pretrained(model_path(config), **options)
            model = chosen._from_config(plain, **how)
    return _frozen(model, config, family)


def load_base(config: ModelConfig, device: str = "cpu") -> Base:
    """The base model, frozen, in evaluation mode, on a device.

    Raises
    ------
    ModelError
        If it is not found or of an unknown family, or cannot be quantised here.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    family = check_model(config)
    _refuse_adapter(config)
    processor = load_processor(config)
    options = code_options(config, family)
    if family.remote_code:
        _fetch_code(config, family)
    if config.quantization != "none":
        options |= quantization_options(config, meta_model(config), family, device)
    try:
        model = getattr(transformers, family.model_class).from_pretrained(
            model_path(config),
            dtype=getattr(torch, config.dtype),
            attn_implementation=_attention(config),
            use_safetensors=True,  # never a pickle, not even one that torch calls safe
            **options,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = textwrap.shorten(str(error), 240, placeholder="...")
        raise ModelError(f"model.name={config.name!r}: not loaded: {reason}") from error
    if family.own_processor:
        from raytune_vlm.models.processors import GLUE

        if family.model_type in GLUE:
            GLUE[family.model_type](model, processor)
    if config.quantization == "none":
        model.to(device)
    backend = image_backend(config, processor.image_processor)
    return Base(_frozen(model, config, family), processor, family, backend)


def _refuse_adapter(config: ModelConfig) -> None:
    """Raise ModelError where transformers would load an adapter, or the base that it names."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(model_path(config), revision=config.revision) is not None:
        raise ModelError(
            f"model.name={config.name!r}: holds an adapter (adapter_config.json), and may name "
            "another base model; give the base as model.name, an adapter by `evaluate --adapter`"
        )


def _attention(config: ModelConfig) -> str | None:
    return None if config.attention == "auto" else config.attention


def _frozen(model: Any, config: ModelConfig, family: Family) -> torch.nn.Module:
    model.requires_grad_(False)
    model.eval()
    _attend_both_ways(model, family)
    return model


def _attend_both_ways(model: torch.nn.Module, family: Family) -> None:
    """Mark the attention of vision towers as not causal, which all of them are not.

    transformers' sdpa takes attention without a mask for causal unless it is marked
    (`integrations/sdpa_attention.py`); Phi-4's tower is marked wrongly and Mllama's not at all, so
    an image that fills its crops would be seen one way alone and the other way in a batch.
    """
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Attention") and scope_of(name, family) == "vision":
            module.is_causal = False  # type: ignore[assignment]
