"""Lets torchvision import beside a build of torch that its compiled part was not made for.

The families that need torchvision use its resizing and padding only, which are torch's own. With
the schemas of the compiled operators declared ahead, the package imports and those work:

    pip install --no-deps --target LIBS torchvision timm
    PYTHONPATH=LIBS:tests python -m pytest -p with_torchvision tests/test_models.py \\
        tests/contracts tests/test_pixels.py tests/test_train.py

Never install it into the environment itself: transformers takes every torchvision that it finds
for one that imports.
"""

import re
from importlib.util import find_spec
from pathlib import Path

import torch

_ROOT = Path(next(iter(find_spec("torchvision").submodule_search_locations)))
_SOURCE = (_ROOT / "_meta_registrations.py").read_text(encoding="utf-8")
_FOUND = re.findall(r'register_meta\("(\w+)"|torchvision::(\w+)', _SOURCE)
_OPERATORS = {"nms", *(name for pair in _FOUND for name in pair if name)}
# Kept: the declarations live as long as the library object.
LIBRARY = torch.library.Library("torchvision", "DEF")
for operator in sorted(_OPERATORS):
    LIBRARY.define(f"{operator}(Tensor a) -> Tensor")
