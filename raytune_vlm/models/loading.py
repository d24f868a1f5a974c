"""Finding and loading a base model and its processor.

`check_model` runs on the driver before anything starts and imports neither torch nor
transformers; `load_processor` is what the data stage needs; `load_base` is what trains.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import sys
import textwrap
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from raytune_vlm import __version__
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.errors import ModelError, did_you_mean
from raytune_vlm.models.families import FAMILIES, Family
from raytune_vlm.models.lora import scope_of
from raytune_vlm.models.trust import OPTION, check_trust

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


_TORCH_FILTERS = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}
"""The filters that torch has for uint8 images."""


def torch_filter(resample: int | None) -> str:
    """torch's name of one of Pillow's filters; None is bilinear, as in transformers.

    Raises
    ------
    ModelError
        If torch does not have it.
    """
    filter_ = Image.Resampling.BILINEAR if resample is None else Image.Resampling(resample)
    if filter_ not in _TORCH_FILTERS:
        raise ModelError(
            "model.image_backend=torchvision: the image processor resizes with "
            f"{filter_.name}, which torch does not have; use model.image_backend: pil"
        )
    return _TORCH_FILTERS[filter_]


def image_backend(config: ModelConfig, image_processor: Any) -> ImageBackend:
    """The backend that `model.image_backend` means for a processor on this machine.

    Raises
    ------
    ModelError
        If torchvision's resampling is asked for and the processor's filter is not one of torch's,
        or Pillow's where the processor has no class for it.
    """
    if image_processor.backend == "torchvision":
        if config.image_backend == "pil":
            raise ModelError(
                f"model.image_backend=pil: {type(image_processor).__name__} has torchvision's "
                "resampling only; use model.image_backend: torchvision"
            )
        return "torchvision"
    resample: Any = getattr(image_processor, "resample", None)
    if config.image_backend == "auto":
        possible = resample is None or resample in _TORCH_FILTERS
        return "torchvision" if find_spec("torchvision") and possible else "pil"
    if config.image_backend == "torchvision":
        torch_filter(resample)
    return config.image_backend


TINY = "tiny:"
"""`model.name: tiny:gemma3` is a tiny random model of that family, for dry runs."""


def model_path(config: ModelConfig) -> str:
    """The local folder or hub name that transformers shall load."""
    if config.name.startswith(TINY):
        return str(_tiny_model(config.name.removeprefix(TINY)))
    return str(DEMO_BASE) if config.name == "demo" else config.name


@cache
def _tiny_model(model_type: str) -> Path:
    """The folder of a family's tiny model, written once a machine; always the same weights."""
    from huggingface_hub.constants import HF_HOME

    from raytune_vlm.models.tiny import BUILDERS, write_tiny_model

    if model_type not in BUILDERS:
        near = did_you_mean(model_type, BUILDERS)
        raise ModelError(f"model.name={TINY + model_type!r}: no such family{near}")
    folder = Path(HF_HOME) / "raytune_vlm" / f"tiny-{__version__}" / model_type
    if not folder.exists():
        temporary = folder.with_name(f".{model_type}.{uuid.uuid4().hex[:8]}")
        write_tiny_model(model_type, temporary)
        try:
            temporary.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(temporary)
    return folder


def check_model(config: ModelConfig) -> Family:
    """The family of a model, from its `config.json` alone.

    Raises
    ------
    ModelError
        If the model is not found, is not a model folder, is of an unknown family, its processor
        needs a package that is not installed, or it needs code of its own that is not trusted.
    """
    file = _config_file(config)
    found = _config_json(config, file)
    model_type = found.get("model_type")
    if model_type == "llava" and found.get("vision_config", {}).get("model_type") == "pixtral":
        model_type = "pixtral"
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise ModelError(
            f"model.name={config.name!r}: unknown family {model_type!r}"
            f"{did_you_mean(str(model_type), FAMILIES)}"
        )
    missing = [name for name in family.needs if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"model.name={config.name!r}: {model_type} needs {', '.join(missing)}: "
            f"pip install {' '.join(missing)}"
        )
    if family.remote_code:
        check_trust(config, str(model_type), file)
    elif config.trusted_revision is not None:
        raise ModelError(
            f"model.name={config.name!r}: {model_type} is a class of transformers, no other code "
            f"is needed; leave {OPTION} out"
        )
    return family


def _config_file(config: ModelConfig) -> Path:
    folder = Path(model_path(config))
    if not folder.is_dir():
        return _hub_file(config)
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"model.name={config.name!r}: {folder} holds no config.json")
    return file


def _config_json(config: ModelConfig, file: Path) -> dict[str, Any]:
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

    Of a hub model the revision is the commit that `model.revision` means now: a branch moves on.
    The Pillow and the torchvision backends of one processor give different pixels, so the backend
    is part of the fingerprint.

    Raises
    ------
    ModelError
        If the model is neither a local folder nor to be had from the hub or its cache.
    """
    folder = Path(model_path(config))
    digest = hashlib.sha256()
    if folder.is_dir():
        revision = str(config.revision)
        weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".md")
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.suffix not in weights and file.stat().st_size < 2**28:
                digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    else:
        revision = _hub_file(config).parent.name  # <cache>/models--a--b/snapshots/<commit>/
    return {
        "name": config.name,
        "revision": revision,
        "files": digest.hexdigest()[:16],
        "image_backend": config.image_backend,
        "torchvision": str(find_spec("torchvision") is not None),
    }


def load_processor(config: ModelConfig) -> Any:
    """The processor of a model, as transformers builds it, padding on the right.

    Of a family that has none in transformers it is one of ours (`models/processors`), around the
    model's own tokenizer.

    Raises
    ------
    ModelError
        If transformers cannot build it, with its reason, or the tokenizer is code that nobody
        trusts.
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
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
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
    if tokenizer.pad_token_id is None:
        raise ModelError(f"model.name={config.name!r}: the tokenizer has no padding token")
    return processor


def code_options(config: ModelConfig, family: Family) -> dict[str, Any]:
    """What `from_pretrained` is told of revision and code, after `check_model` let it pass.

    `code_revision` pins code that a file of the model takes from another repository to a commit
    which that one does not have.
    """
    if not family.remote_code:
        return {"revision": config.revision, "trust_remote_code": False}
    return {
        "revision": config.revision,
        "code_revision": config.trusted_revision,
        "trust_remote_code": True,
    }


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
    classes = _config_json(config, _config_file(config)).get("auto_map", {})
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


def load_base(config: ModelConfig, device: str = "cpu") -> Base:
    """The base model, frozen, in evaluation mode, on a device.

    Raises
    ------
    ModelError
        If it is not found or of an unknown family.
    """
    import torch
    import transformers

    family = check_model(config)
    processor = load_processor(config)
    if family.remote_code:
        _fetch_code(config, family)
    try:
        model = getattr(transformers, family.model_class).from_pretrained(
            model_path(config),
            dtype=getattr(torch, config.dtype),
            attn_implementation=None if config.attention == "auto" else config.attention,
            **code_options(config, family),
        )
    except (OSError, ValueError, ImportError) as error:
        reason = textwrap.shorten(str(error), 240, placeholder="...")
        raise ModelError(f"model.name={config.name!r}: not loaded: {reason}") from error
    if family.own_processor:
        from raytune_vlm.models.processors import GLUE

        if family.model_type in GLUE:
            GLUE[family.model_type](model, processor)
    model.requires_grad_(False)
    model.eval()
    _attend_both_ways(model, family)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.to(device)
    backend = image_backend(config, processor.image_processor)
    return Base(model=model, processor=processor, family=family, image_backend=backend)


def _attend_both_ways(model: torch.nn.Module, family: Family) -> None:
    """Mark the attention of vision towers as not causal, which all of them are not.

    transformers' sdpa takes attention without a mask for causal unless it is marked
    (`integrations/sdpa_attention.py`); Phi-4's tower is marked wrongly and Mllama's not at all, so
    an image that fills its crops would be seen one way alone and the other way in a batch.
    """
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Attention") and scope_of(name, family) == "vision":
            module.is_causal = False  # type: ignore[assignment]
