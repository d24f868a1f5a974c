"""What a worker will train and how much memory it will take, before anything is loaded.

The model is built without its weights and gets its adapter as in training, so the count of trained
parameters is exact. Memory is that of one worker in its second optimizer step: weights, adapter,
AdamW's moments, and the most that tensors take at one time in forward and backward passes over
a micro-batch of samples as long as `data.max_length`. That is found by running them on shapes
(`models.shapes`).

Not in it: what the device's libraries and its allocator keep for themselves (on a GPU about 0.5 to
1 GB), and workspaces inside kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raytune_vlm.collate.batch import PixelTable, collate
from raytune_vlm.collate.encode import Encoder
from raytune_vlm.collate.encoded import Encoded
from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.lora import LoraConfig
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.config.train import TrainConfig
from raytune_vlm.errors import first_line
from raytune_vlm.models.families import Family
from raytune_vlm.models.image_backends import image_backend
from raytune_vlm.models.loading import load_processor, meta_model
from raytune_vlm.models.location import check_model
from raytune_vlm.models.lora import attach, trainable_by_scope
from raytune_vlm.models.quantization import quantized_modules
from raytune_vlm.models.shapes import ShapeRun
from raytune_vlm.models.teacher import teacher_config
from raytune_vlm.train.backends.fsdp2 import blocks
from raytune_vlm.train.layers import RecomputedLayers
from raytune_vlm.train.objective import distilled
from raytune_vlm.train.output_layer import TokenLosses

IMAGE_SIDE = 1024
"""Side in pixels of the image of the sample that is made up for a prediction."""

BITS_OF_NF4 = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits a weight: 4, an 8-bit scale for each 64, a float32 for each 256 of those (double
quantisation: Dettmers et al. 2023, section 3)."""


@dataclass(frozen=True)
class Prediction:
    """Parameters, and bytes of one worker at its peak."""

    trainable: dict[str, int]
    """Trained parameters by scope."""
    weights: int
    """The base model, its buffers and what is frozen of the adapter; a teacher as it is held."""
    adapter: int
    """What is trained: adapters, and copies of modules that are trained in full."""
    gradients: int
    optimizer: int
    """Two moments of each trained parameter; with DeepSpeed a share of them and of a copy."""
    activations: int | None
    """All else at the peak; None where it cannot be found."""
    num_samples: int
    """Samples of the micro-batch that this is for."""
    num_tokens: int
    """Tokens of its longest sample."""
    obstacle: str = ""
    """Why there are no `activations`."""

    @property
    def total(self) -> int | None:
        """Bytes at the peak."""
        if self.activations is None:
            return None
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations


def predict(experiment: ExperimentConfig, samples: Sequence[Encoded] | None = None) -> Prediction:
    """Trainable parameters and memory of a worker that trains an experiment's recipe.

    Parameters
    ----------
    samples
        The largest micro-batch; None: as many samples as fit one, each with an image and
        `data.max_length` tokens.

    Raises
    ------
    ModelError
        If the model or its processor is not found, or the adapter does not fit it.
    """
    family = check_model(experiment.model)
    processor = load_processor(experiment.model)
    samples = samples or [_largest_sample(experiment, processor, family)] * _num_rows(experiment)
    model = meta_model(experiment.model)
    teacher = _teacher(experiment)
    packed = _in_four_bits(model, family, experiment.model)
    with torch.device("meta"):
        adapted: Any = attach(model, family, experiment.lora, seed=0)
    RecomputedLayers(adapted, family, experiment.train).change()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    adapter = sum(p.nbytes for p in trained)
    tensors = {id(t): t for t in (*adapted.parameters(), *adapted.buffers())}
    weights = sum(t.nbytes for t in tensors.values()) - adapter - _saved(packed)
    weights += _size_of_teacher(teacher, experiment)
    parts = blocks(adapted.get_base_model(), family)
    if experiment.train.holders > 1:
        weights -= _elsewhere(parts, experiment)
    dtype = experiment.train.fsdp2.compute_dtype
    if dtype is not None:  # weights, which are counted, are in another one
        computing = meta_model(experiment.model.model_copy(update={"dtype": dtype}))
        with torch.device("meta"):
            adapted = attach(computing, family, experiment.lora, seed=0)
    activations, obstacle = None, ""
    try:
        batch = _batch(experiment, samples, processor, family)
        peak = _peak_of_passes(adapted, teacher, batch, experiment)
    except RuntimeError as error:  # shapes that hang on the weights: experts, perhaps
        obstacle = first_line(error)
    else:
        # A layer in 4 bits is unpacked while it is used.
        peak += max((p.nbytes for p in packed), default=0)
        # A step of AdamW: one more tensor for each gradient, where it is done for all at once.
        activations = max(peak, 2 * adapter) - adapter
    return Prediction(
        trainable=trainable_by_scope(adapted, family),
        weights=weights,
        adapter=adapter,
        gradients=adapter,
        optimizer=_optimizer(adapter, experiment.train),
        activations=activations,
        num_samples=len(samples),
        num_tokens=max(len(sample.input_ids) for sample in samples),
        obstacle=obstacle,
    )


def predict_trainable(experiment: ExperimentConfig) -> int:
    """Trained parameters of an experiment's recipe, without a forward pass.

    Raises
    ------
    ModelError
        If the model is not found, or the adapter does not fit it.
    """
    family = check_model(experiment.model)
    with torch.device("meta"):
        adapted: Any = attach(meta_model(experiment.model), family, experiment.lora, seed=0)
    return sum(trainable_by_scope(adapted, family).values())


def _in_four_bits(
    model: torch.nn.Module, family: Family, config: ModelConfig
) -> list[torch.nn.Parameter]:
    """The weights that are held in 4 bits."""
    if config.quantization == "none":
        return []
    names = {f"{name}.weight" for name in quantized_modules(model, family)}
    return [p for name, p in model.named_parameters() if name in names]


def _saved(packed: Sequence[torch.nn.Parameter]) -> int:
    """Bytes that 4 bits take less."""
    return sum(round(p.nbytes - p.numel() * BITS_OF_NF4 / 8) for p in packed)


def _teacher(experiment: ExperimentConfig) -> torch.nn.Module | None:
    """The teacher without its weights and its adapter."""
    if experiment.train.distillation.teacher is None:
        return None
    return meta_model(teacher_config(experiment))


def _size_of_teacher(teacher: torch.nn.Module | None, experiment: ExperimentConfig) -> int:
    """Bytes of the teacher that an executor holds; its adapter is float32 there as in the file."""
    if teacher is None:
        return 0
    family, folder = check_model(experiment.model), experiment.train.distillation.adapter
    tensors = {id(t): t for t in (*teacher.parameters(), *teacher.buffers())}
    size = sum(t.nbytes for t in tensors.values())
    size -= _saved(_in_four_bits(teacher, family, experiment.model))
    if folder is not None:
        size += (Path(folder) / "adapter_model.safetensors").stat().st_size
    return size


def _elsewhere(parts: Sequence[torch.nn.Module], experiment: ExperimentConfig) -> int:
    """Bytes of a base cut up among workers that one of them does not hold at any time.

    It holds its share of the blocks, and two blocks whole: the one in use and the next, in the
    dtype of the computation.
    """
    dtype = getattr(torch, experiment.train.fsdp2.compute_dtype or "", None)
    frozen = [[p for p in part.parameters() if not p.requires_grad] for part in parts]
    sizes = [sum(p.nbytes for p in found) for found in frozen]
    whole = [sum(p.numel() * (dtype or p.dtype).itemsize for p in found) for found in frozen]
    others = sum(sizes) - sum(sizes) // experiment.train.holders
    return max(0, others - sum(sorted(whole)[-2:]))


def _optimizer(adapter: int, train: TrainConfig) -> int:
    """Bytes on the worker's device of AdamW's moments, and of the copy that DeepSpeed updates."""
    if train.backend != "deepspeed":
        return 2 * adapter
    if train.deepspeed.offload_optimizer and train.gpus_per_worker:
        return 0
    return -(-3 * adapter // train.num_workers)


def describe(prediction: Prediction, lora: LoraConfig) -> str:
    """One line for people."""
    scopes = ", ".join(
        f"{scope} {count:,} "
        + ("in full" if scope in lora.full_scopes else f"at rank {lora.rank_of(scope)}")
        for scope, count in prediction.trainable.items()
    )
    trained = f"{sum(prediction.trainable.values()):,} trained parameters ({scopes})"
    if prediction.total is None:
        return f"{trained}; memory cannot be predicted: {prediction.obstacle}"
    parts = ", ".join(
        f"{name} {_size(getattr(prediction, name))}"
        for name in ("weights", "adapter", "gradients", "optimizer", "activations")
    )
    return (
        f"{trained}; a worker needs about {_size(prediction.total)} ({parts}) for "
        f"{prediction.num_samples} samples of {prediction.num_tokens:,} tokens at a time"
    )


def _size(count: int | None) -> str:
    count = count or 0
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _peak_of_passes(
    model: torch.nn.Module,
    teacher: torch.nn.Module | None,
    batch: dict[str, torch.Tensor],
    experiment: ExperimentConfig,
) -> int:
    """Most bytes of activations and gradients in the micro-batches of a step."""
    labels = batch.pop("labels")
    rows = -(-experiment.train.batch_size // experiment.train.num_workers)
    model.train()
    shapes = ShapeRun()
    shapes.weightless(model)
    config = experiment.train.distillation
    if teacher is not None and config.is_on:
        shapes.weightless(teacher)
    with shapes:
        for _ in range(2 if rows > len(labels) else 1):  # gradients wait for the next ones
            if teacher is not None and config.is_on:
                distilled(model, teacher, batch, batch, labels, config)[0].backward()
            else:
                TokenLosses(model)(batch, labels, lambda _: None).sum().backward()
    return shapes.peak


def _batch(
    experiment: ExperimentConfig, samples: Sequence[Encoded], processor: Any, family: Family
) -> dict[str, Any]:
    backend = image_backend(experiment.model, processor.image_processor)
    batch = collate(samples, family, pad_token_id=processor.tokenizer.pad_token_id)
    batch = PixelTable(processor.image_processor, family, backend=backend)(batch)
    return {**batch, "use_cache": False}


def _num_rows(experiment: ExperimentConfig) -> int:
    train = experiment.train
    rows = min(train.micro_batch_size, -(-train.batch_size // train.num_workers))
    if train.micro_batch_tokens is not None:
        rows = min(rows, max(1, train.micro_batch_tokens // experiment.data.max_length))
    return rows


def _largest_sample(experiment: ExperimentConfig, processor: Any, family: Family) -> Encoded:
    """A sample of one image and `data.max_length` tokens, or a few less."""
    from PIL import Image

    backend = image_backend(experiment.model, processor.image_processor)
    encoder = Encoder(processor, family, backend, sizes_only=True)
    most = experiment.data.max_length
    side = IMAGE_SIDE

    def sample(words: int) -> Encoded:
        picture = Image.new("RGB", (side, side))
        question = [{"type": "image"}, {"type": "text", "text": "read"}]
        answer = [{"type": "text", "text": " ".join(["word"] * words)}]
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        return encoder.training(messages, [picture])

    shortest = sample(1)
    while len(shortest.input_ids) > most and side > 64:
        side //= 2
        shortest = sample(1)
    room = most - len(shortest.input_ids)
    if room <= 0:
        return shortest
    each = (len(sample(101).input_ids) - len(shortest.input_ids)) / 100
    return sample(1 + int(room / each))
