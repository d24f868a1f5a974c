"""A digest of everything that the features of given pixels depend on, to the bit."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
import transformers

from raytune_vlm.config.experiment import digest_of
from raytune_vlm.models.loading import Base
from raytune_vlm.models.lora import scope_of


def tower_digest(base: Base, device: str) -> str:
    """16 hex digits that name a tower with its projector, processor, libraries and machine.

    The weights themselves count, every byte of what is not the language model's: an updated
    checkpoint has the same names and sizes. That takes a second and a half for a tower of 1.3 GB
    (blake2b, 0.85 GB/s). Versions and the machine count because other kernels round otherwise.
    """
    config: Any = base.model.config
    parts = (config, getattr(config, "vision_config", None))
    settings = config.to_dict()
    settings.pop("_name_or_path", None)
    return digest_of(
        {
            "model": settings,
            "attention": [getattr(part, "_attn_implementation", None) for part in parts],
            "weights": _weights(base),
            "processor": base.processor.image_processor.to_dict(),
            "image_backend": base.image_backend,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": _machine(device),
        }
    )


def _weights(base: Base) -> str:
    digest = hashlib.blake2b(digest_size=16)
    model: Any = base.model
    head = getattr(model.get_output_embeddings(), "weight", None)
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in sorted(named, key=lambda entry: entry[0]):
        if scope_of(name, base.family) != "text" and tensor is not head:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(bytes_of(tensor).data)
    return digest.hexdigest()


def _machine(device: str) -> list[Any]:
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
        return [name, torch.backends.cudnn.version(), torch.get_float32_matmul_precision()]
    # Products are added up in an order that depends on the number of threads.
    return [device, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """uint8 `[bytes]`: a view where the tensor is contiguous and in the memory of the process."""
    flat: np.ndarray = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat
