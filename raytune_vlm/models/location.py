"""Where a base model lies, what it is, and whether it may be loaded; without torch.

`check_model` runs on the driver before anything starts.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import textwrap
import uuid
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from raytune_vlm import __version__
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.errors import ModelError, did_you_mean
from raytune_vlm.models.families import FAMILIES, Family
from raytune_vlm.models.quantization import check_quantization
from raytune_vlm.models.trust import OPTION, check_trust

DEMO_BASE = Path(__file__).resolve().parent.parent / "demo" / "base"
"""Folder of the tiny model that the package ships."""

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
    found = _read_config(config, file)
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
    check_quantization(config)
    return family


def _config_file(config: ModelConfig) -> Path:
    folder = Path(model_path(config))
    if not folder.is_dir():
        return _hub_file(config)
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"model.name={config.name!r}: {folder} holds no config.json")
    return file


def config_json(config: ModelConfig) -> dict[str, Any]:
    """A model's `config.json`; raises ModelError if it is not found or not JSON."""
    return _read_config(config, _config_file(config))


def _read_config(config: ModelConfig, file: Path) -> dict[str, Any]:
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
