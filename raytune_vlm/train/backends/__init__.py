"""`BACKENDS`: how the workers of an executor share a model, by `train.backend`.

A new one is a class in a file of its own, a line here and a name in `config/train.py`;
`tests/test_backends.py` picks it up and compares it with one worker.
"""

from __future__ import annotations

from raytune_vlm.train.backends.base import Backend
from raytune_vlm.train.backends.ddp import Ddp
from raytune_vlm.train.backends.deepspeed import DeepSpeed
from raytune_vlm.train.backends.fsdp2 import Fsdp2

__all__ = ["BACKENDS", "Backend"]

BACKENDS: dict[str, type[Backend]] = {"ddp": Ddp, "fsdp2": Fsdp2, "deepspeed": DeepSpeed}
