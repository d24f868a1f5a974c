"""What a frozen vision tower and projector make of images, computed once and kept.

Where nothing of them is trained, an image has the same features in every epoch, every trial and
every evaluation. transformers takes them as `mm_encoder_outputs` in the place of pixels
(`GenerationMixin._prepare_multimodal_encoder_kwargs_for_generation` in
`transformers/generation/utils.py` has the arguments of `get_image_features`).
"""

from __future__ import annotations

import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

from raytune_vlm.collate.batch import PixelTable, collate
from raytune_vlm.collate.encoded import Encoded
from raytune_vlm.collate.feature_store import FeatureStore
from raytune_vlm.models.loading import Base
from raytune_vlm.models.lora import scope_of
from raytune_vlm.monitor import Say

_KEPT = ("pooler_output", "deepstack_features")
"""What a model's forward reads of the features."""

_RATES = ("attention_dropout", "activation_dropout", "dropout", "drop_prob", "layerdrop")
"""What transformers' modules call a rate of dropping; `drop_prob` is that of stochastic depth."""


class _Samples(Protocol):
    def encoded(self, number: int) -> Encoded:
        """The encoded sample of a row."""


class Features:
    """The features of images, by what the image is: in memory, on disk (`disk`), else computed.

    Of those in memory, which were computed here, the least recently used are dropped. What is on
    disk is not copied there: it is mapped, and so in memory already.

    Each sample's are computed by themselves, so that they do not depend on the batch.

    Parameters
    ----------
    base
        Its tower and projector are as they were loaded whenever this is used.
    max_bytes
        Memory of the process (not of a GPU) for them.
    say
        Told why images go through the tower in every pass, as soon as that is known.
    """

    def __init__(
        self, base: Base, device: str, max_bytes: int, say: Say = lambda message: None
    ) -> None:
        self._base, self._device, self._max_bytes = base, device, max_bytes
        self._say = say
        self._pixels = PixelTable(
            base.processor.image_processor, base.family, device, backend=base.image_backend
        )
        self._encode: Any = getattr(base.model.base_model, "get_image_features", None)
        self._kept: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()
        self._bytes = 0
        self._keys: WeakKeyDictionary[_Samples, dict[int, bytes | None]] = WeakKeyDictionary()
        self._is_checked = False
        self.disk: FeatureStore | None = None
        """Where they are kept and looked for beyond the memory of this process."""
        self.computed = self.found = self.read = 0
        """Samples whose features were computed, taken from memory, and from the disk."""
        self.obstacle = self._why_not()
        """Why images go through the tower in every pass; None where they do not."""
        self._tell()

    def _tell(self) -> None:
        if self.obstacle is not None:
            self._say(f"images are encoded in every pass: {self.obstacle}")

    def _why_not(self) -> str | None:
        kind = self._base.family.model_type
        takes = inspect.signature(self._base.model.forward).parameters
        if self._encode is None or "mm_encoder_outputs" not in takes:
            return f"{kind} takes no features in the place of pixels"
        towers = [m for name, m in self._base.model.named_modules() if self._is_tower(name)]
        if any(map(drops, towers)):
            return f"the vision tower of {kind} has dropout"
        return None

    def _is_tower(self, name: str) -> bool:
        return scope_of(f"{name}.", self._base.family) in ("vision", "projector")

    def replace(
        self, batch: dict[str, Any], samples: _Samples, rows: Sequence[int]
    ) -> dict[str, Any]:
        """A batch of some rows with features in the place of its pixels.

        Parameters
        ----------
        batch
            As `collate` made it, pixels still uint8; left as it is where it has none.
        rows
            The samples in the order of the batch.
        """
        if "pixel_values" not in batch or self.obstacle is not None:
            return batch
        parts = [part for row in rows if (part := self._of(samples, row)) is not None]
        if self.obstacle is not None:
            return batch
        rest = {name: entry for name, entry in batch.items() if name != "pixel_values"}
        return {**rest, "mm_encoder_outputs": {"image": _joined(parts, self._device)}}

    def _of(self, samples: _Samples, row: int) -> Any:
        """The features of a sample's images; None without an image."""
        keys, sample = self._keys.setdefault(samples, {}), None
        if row not in keys:
            sample = samples.encoded(row)
            keys[row] = self._key(sample)
        key = keys[row]
        if key is None:
            return None
        if key in self._kept:
            self._kept.move_to_end(key)
            self.found += 1
            return self._kept[key][0]
        if self.disk is not None and (stored := self.disk.get(key)) is not None:
            self.read += 1
            return stored
        found = self._compute(sample or samples.encoded(row))
        if self.disk is not None and self.obstacle is None:
            self.disk.put(key, found)
        size = sum(tensor.nbytes for tensor in _tensors(found))
        self._kept[key] = found, size
        self._bytes += size
        self.computed += 1
        while self._bytes > self._max_bytes and len(self._kept) > 1:
            _, (_, dropped) = self._kept.popitem(last=False)
            self._bytes -= dropped
        return found

    def _key(self, sample: Encoded) -> bytes | None:
        """What the features depend on; None without an image."""
        if "pixel_values" not in sample.tensors:
            return None
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(sample.tensors.keys() & self._base.family.media.keys()):
            array = sample.tensors[name]
            digest.update(f"{name} {array.dtype} {array.shape} ".encode())
            digest.update(array.tobytes())
        return digest.digest()

    @torch.no_grad()
    def _compute(self, sample: Encoded) -> Any:
        """A sample's features, held in the memory of the process."""
        model = self._base.model
        training = model.training
        model.eval()
        try:
            plain = self._batch(sample)
            pixels = self._pixels(plain)
            takes = inspect.signature(self._encode).parameters.keys() & pixels.keys()
            output = self._encode(**{name: pixels[name] for name in takes}, return_dict=True)
            found = type(output)(**{name: output[name] for name in _KEPT if name in output})
            if not self._is_checked:
                self._check(plain, pixels, found)
        finally:
            model.train(training)
        return _moved(found, "cpu")

    def _batch(self, sample: Encoded) -> dict[str, Any]:
        pad = self._base.processor.tokenizer.pad_token_id
        batch = collate([sample], self._base.family, pad_token_id=pad)
        del batch["labels"]
        return {name: entry.to(self._device) for name, entry in batch.items()}

    def _check(self, plain: dict[str, Any], pixels: dict[str, Any], found: Any) -> None:
        """Leave it, if a model that is given features says something else than with pixels."""
        rest = {name: entry for name, entry in plain.items() if name != "pixel_values"}
        expected = self._base.model(**pixels, use_cache=False).logits
        given = {"image": _joined([found], self._device)}
        logits = self._base.model(**rest, mm_encoder_outputs=given, use_cache=False).logits
        self._is_checked = True
        if not torch.equal(expected, logits):
            most = float((expected - logits).abs().max())
            self.obstacle = (
                f"{self._base.family.model_type} answers otherwise with features than with pixels "
                f"(logits differ by {most:.1g})"
            )
            self._tell()


def drops(module: Any) -> bool:
    """Whether a module drops anything in training."""
    if isinstance(module, torch.nn.modules.dropout._DropoutNd):
        return bool(module.p > 0)
    rates = (getattr(module, name, 0.0) for name in _RATES)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _joined(parts: Sequence[Any], device: str) -> Any:
    """The features of several samples as those of one batch, on a device."""
    first = parts[0]
    fields = {
        name: _level([part[name] for part in parts])
        if name != "deepstack_features"
        else [_level(list(level)) for level in zip(*(part[name] for part in parts), strict=True)]
        for name in first
    }
    return _moved(type(first)(**fields), device)


def _level(values: Sequence[Any]) -> Any:
    """A tensor `[images, ...]` of each sample, or a list of tensors, one an image."""
    if all(isinstance(value, torch.Tensor) for value in values):
        return torch.cat(list(values))
    return [image for value in values for image in value]


def _moved(value: Any, device: str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, list | tuple):
        return type(value)(_moved(entry, device) for entry in value)
    return type(value)(**{name: _moved(entry, device) for name, entry in value.items()})


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    entries = value if isinstance(value, list | tuple) else value.values()
    return [tensor for entry in entries for tensor in _tensors(entry)]
