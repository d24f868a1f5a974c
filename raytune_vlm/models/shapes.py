"""A model run by its shapes alone: no weights, no arithmetic, but the memory of every tensor.

    shapes = ShapeRun()
    model = shapes.weightless(meta_model(config))
    with shapes:
        model(**batch).logits.sum().backward()
    shapes.peak

Weights, and all that is computed from them, are `FakeTensor`s of torch: shape, dtype and device
without data. Inputs stay real, as the control flow of VLMs hangs on them (image grids, token ids).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_INDEXED = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
)


class ShapeRun(TorchDispatchMode):
    """Runs what has only real arguments, and works out shapes of the rest; counts live bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        """Most bytes that tensors made inside took at one time."""
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._weights: dict[int, Any] = {}  # their views are no new memory
        self._live: dict[int, Any] = {}
        self._bytes = 0

    def weightless(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model with fake CPU weights in place of those on the meta device; in place."""
        made: dict[int, Any] = {}

        def stand_in(tensor: torch.Tensor) -> Any:
            if id(tensor) not in made:
                with self._fake:
                    fake: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, torch.nn.Parameter):
                        fake = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
                made[id(tensor)] = fake
                self._weights[fake.untyped_storage()._cdata] = fake
            return made[id(tensor)]

        kept = []  # so that no id is used twice
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None and tensor.is_meta:
                        kept.append(tensor)
                        table[name] = stand_in(tensor)
        return model

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(value, FakeTensor) for value in tree_iter((args, kwargs))):
            if func in _INDEXED:
                args = (args[0], _without_masks(args[1]), *args[2:])
            with self._fake:
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._note(value.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._live or key in self._weights:
            return
        size = storage.nbytes()
        self._bytes += size
        self.peak = max(self.peak, self._bytes)

        def gone(_: Any) -> None:
            del self._live[key]
            self._bytes -= size

        self._live[key] = weakref.ref(storage, gone)


def _without_masks(indices: Any) -> list[Any]:
    """Boolean masks as positions: their number is known, as masks come from the inputs."""
    found: list[Any] = []
    for index in indices:
        mask = isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
        if mask and not isinstance(index, FakeTensor):
            found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found
