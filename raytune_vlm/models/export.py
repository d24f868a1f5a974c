"""A checkpoint as something to use: an adapter folder for PEFT, or a whole merged model."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raytune_vlm.config.model import ModelConfig
from raytune_vlm.errors import ConfigError, ModelError
from raytune_vlm.models.loading import load_base, load_processor
from raytune_vlm.models.location import check_model, code_options, model_path


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder that appears under its name, whole, when the block ends; after an error not at all.

    Raises
    ------
    ConfigError
        If there is something at that place already.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"--output={output}: there is something already; give a new folder")
    temporary = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_adapter(checkpoint: Path, model: ModelConfig, folder: Path) -> None:
    """Put a checkpoint's adapter into a folder, with a base that can be found, and the processor.

    The base stands in `adapter_config.json` as the hub's name with its revision, or as the path of
    a local folder; a trainer's machine may have had it elsewhere.
    """
    shutil.copy2(checkpoint / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    config = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": model_path(model), "revision": model.revision}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    _save_processor(model, folder)


def write_merged(checkpoint: Path, model: ModelConfig, folder: Path) -> None:
    """Write the base with a checkpoint's adapter in its weights, and the processor.

    Merged on the CPU, in the dtype of the base (the adapter's product is computed in float32 and
    rounded once).

    Raises
    ------
    ModelError
        If the base is quantised, or the adapter's numbers are not finite.
    """
    from peft import PeftModel
    from transformers import AutoConfig

    options = code_options(model, check_model(model))
    config = AutoConfig.from_pretrained(model_path(model), **options)
    if getattr(config, "quantization_config", None) is not None:
        raise _quantised(model)
    base = load_base(model)
    adapted = PeftModel.from_pretrained(base.model, str(checkpoint), torch_device="cpu")
    if not all(weight.is_floating_point() for weight in _adapted_weights(adapted)):
        raise _quantised(model)
    try:
        merged: Any = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"{checkpoint}: cannot be merged: {error}") from error
    merged.save_pretrained(folder)
    _save_processor(model, folder)


def _save_processor(model: ModelConfig, folder: Path) -> None:
    """Put the processor beside the weights; one of our own is of no use to other programs."""
    if not check_model(model).own_processor:
        load_processor(model).save_pretrained(folder)


def _adapted_weights(model: Any) -> Iterator[Any]:
    from peft.tuners.lora import LoraLayer

    return (m.get_base_layer().weight for m in model.modules() if isinstance(m, LoraLayer))


def _quantised(model: ModelConfig) -> ModelError:
    return ModelError(
        f"model.name={model.name!r} is quantised: merging would round the adapter away, so the "
        "merged model would answer otherwise; use --format adapter"
    )
