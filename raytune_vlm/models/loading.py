"""Finding and loading a base model and its processor.

`check_model` runs on the driver before anything starts and imports neither torch nor
transformers; `load_processor` is what the data stage needs; `load_base` is what trains.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raytune_vlm.config.model import ModelConfig
from raytune_vlm.errors import ModelError, did_you_mean
from raytune_vlm.models.families import FAMILIES, Family
from raytune_vlm.models.quantization import check_quantization, quantization_options

if TYPE_CHECKING:
    import torch

DEMO_BASE = Path(__file__).resolve().parent.parent / "demo" / "base"
"""Folder of the tiny model that the package ships."""


ImageBackend = Literal["pil", "torchvision"]


@dataclass
class Base:
    """A frozen base model with its processor."""

    model: torch.nn.Module
    processor: Any
    family: Family
    image_backend: ImageBackend = "pil"


TORCH_FILTERS = (2, 3)
"""Pillow's numbers of the filters that torch has for uint8 images: bilinear and bicubic."""


def image_backend(config: ModelConfig, image_processor: Any) -> ImageBackend:
    """The backend that `model.image_backend` means for a processor on this machine.

    Raises
    ------
    ModelError
        If torchvision's resampling is asked for and the processor's filter is not one of torch's.
    """
    resample: Any = getattr(image_processor, "resample", None)
    possible = resample is None or int(resample) in TORCH_FILTERS
    if config.image_backend == "auto":
        return "torchvision" if find_spec("torchvision") and possible else "pil"
    if config.image_backend == "torchvision" and not possible:
        raise ModelError(
            f"model.image_backend=torchvision: {type(image_processor).__name__} resizes with "
            f"filter {int(resample)} of Pillow, which torch does not have; use "
            "model.image_backend: pil"
        )
    return config.image_backend


def model_path(config: ModelConfig) -> str:
    """The local folder or hub name that transformers shall load."""
    return str(DEMO_BASE) if config.name == "demo" else config.name


def check_model(config: ModelConfig) -> Family:
    """The family of a model, from its `config.json` alone.

    Raises
    ------
    ModelError
        If the model is not found, is not a model folder, is of an unknown family, or its
        processor needs a package that is not installed.
    """
    model_type = _config_json(config).get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise ModelError(
            f"model.name={config.name!r}: unknown family {model_type!r}"
            f"{did_you_mean(str(model_type), FAMILIES)}"
        )
    missing = [name for name in family.needs if find_spec(name) is None]
    if missing and not Path(model_path(config)).is_dir():
        raise ModelError(
            f"model.name={config.name!r}: the processor of {model_type} needs "
            f"{', '.join(missing)}: pip install {' '.join(missing)}"
        )
    check_quantization(config)
    return family


def _config_json(config: ModelConfig) -> dict[str, Any]:
    folder = Path(model_path(config))
    if folder.is_dir():
        file = folder / "config.json"
        if not file.is_file():
            raise ModelError(f"model.name={config.name!r}: {folder} holds no config.json")
    else:
        file = _hub_file(config)
    try:
        value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"model.name={config.name!r}: {file} is not JSON: {error}") from None
    return value


def _hub_file(config: ModelConfig) -> Path:
    near = did_you_mean(config.name, [*_neighbours(config.name), "demo"])
    hint = near if "did you mean" in near else ""
    if config.name.count("/") != 1 or config.name.startswith((".", "/", "~")):
        raise ModelError(
            f"model.name={config.name!r}: no such folder{hint}; "
            "give 'demo', a local folder, or a hub name such as 'Qwen/Qwen2.5-VL-3B-Instruct'"
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(config.name, "config.json", revision=config.revision))
    except Exception as error:  # the hub client raises a dozen unrelated classes
        reason = textwrap.shorten(str(error), 160, placeholder="...")
        raise ModelError(
            f"model.name={config.name!r}: not a local folder{hint} and not to be had from the hub "
            f"({type(error).__name__}: {reason})"
        ) from None


def _neighbours(name: str) -> list[str]:
    parent = Path(name).parent
    if not parent.is_dir():
        return []
    return [str(parent / path.name) for path in parent.iterdir() if path.is_dir()]


def model_fingerprint(config: ModelConfig) -> dict[str, str]:
    """What identifies the preprocessing of a model: its files, and the image backend in use.

    The Pillow and the torchvision backends of one processor give different pixels, so the backend
    is part of the fingerprint.
    """
    folder = Path(model_path(config))
    digest = hashlib.sha256()
    if folder.is_dir():
        weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".md")
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.suffix not in weights and file.stat().st_size < 2**28:
                digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return {
        "name": config.name,
        "revision": str(config.revision),
        "files": digest.hexdigest()[:16],
        "image_backend": config.image_backend,
        "torchvision": str(find_spec("torchvision") is not None),
    }


def load_processor(config: ModelConfig) -> Any:
    """The processor of a model, as transformers builds it, padding on the right.

    Raises
    ------
    ModelError
        If transformers cannot build it, with its reason.
    """
    allow_missing_video_processor()
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(
            model_path(config), revision=config.revision, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(f"model.name={config.name!r}: no processor: {reason}") from error
    if getattr(processor.image_processor, "backend", "pil") != "pil":
        from transformers import AutoImageProcessor

        # Sizes and tiles come from the Pillow class, whatever the resampling (`collate.pixels`).
        processor.image_processor = AutoImageProcessor.from_pretrained(
            model_path(config), revision=config.revision, backend="pil", trust_remote_code=False
        )
    tokenizer = processor.tokenizer
    if tokenizer.pad_token_id is None:
        raise ModelError(f"model.name={config.name!r}: the tokenizer has no padding token")
    return processor


def allow_missing_video_processor() -> None:
    """Let image-text processors load where torchvision, and so every video processor, is absent.

    transformers checks the video slot of a processor against `VideoProcessorMixin`, which its
    lazy module does not export without torchvision; naming it there is all that is missing.
    """
    if find_spec("torchvision") is not None:
        return
    import transformers.processing_utils as processing
    from transformers.video_processing_utils import VideoProcessorMixin

    processing.transformers_module.VideoProcessorMixin = VideoProcessorMixin


def meta_model(config: ModelConfig) -> torch.nn.Module:
    """The model without its weights (on the meta device): names, shapes and dtypes only."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    plain = AutoConfig.from_pretrained(
        model_path(config), revision=config.revision, trust_remote_code=False
    )
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForImageTextToText.from_config(
            plain, dtype=getattr(torch, config.dtype), attn_implementation=config.attention
        )
    return _frozen(model, config)


def load_base(config: ModelConfig, device: str = "cpu") -> Base:
    """The base model, frozen, in evaluation mode, on a device.

    Raises
    ------
    ModelError
        If it is not found or of an unknown family, or cannot be quantised here.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    family = check_model(config)
    processor = load_processor(config)
    options = {}
    if config.quantization != "none":
        options = quantization_options(config, meta_model(config), family, device)
    model = AutoModelForImageTextToText.from_pretrained(
        model_path(config),
        revision=config.revision,
        dtype=getattr(torch, config.dtype),
        attn_implementation=config.attention,
        trust_remote_code=False,
        **options,
    )
    if config.quantization == "none":
        model.to(device)
    backend = image_backend(config, processor.image_processor)
    model = _frozen(model, config)
    return Base(model=model, processor=processor, family=family, image_backend=backend)


def _frozen(model: Any, config: ModelConfig) -> torch.nn.Module:
    model.requires_grad_(False)
    model.eval()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # PEFT lets the embeddings require gradients anew each time an adapter is put on.
        model.disable_input_require_grads()
    return model
