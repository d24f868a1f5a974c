"""What one optimizer step did: the figures of a line of metrics.jsonl."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from raytune_vlm.train.world import World


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step did; in metrics.jsonl, rates and shares are those of all steps since
    the line before."""

    step: int
    """Steps done, this one included."""
    loss: float
    """What is minimised, per labelled token of the global batch: the cross-entropy, in nats, or
    with a teacher the sum of `config.distillation`."""
    grad_norm: float
    """Global norm of the gradients before clipping."""
    learning_rate: float
    """Of what has no rate of its own (`train.learning_rate_by_scope`, `lora.loraplus_ratio`)."""
    labelled_tokens: int
    """Tokens of the global batch that carry loss."""
    tokens: int
    """Tokens of the global batch, padding not counted."""
    samples: int
    """Samples of the global batch."""
    images: int
    """Images of the global batch."""
    fed_tokens: int
    """Tokens that went through the model, padding and stand-ins counted."""
    seconds: float
    """Of the whole step."""
    skipped: bool
    """Whether there was no update, because loss or gradients were not finite."""
    skipped_steps: int
    """Steps so far without an update because the model's own numbers were not finite."""
    overflowed_steps: int
    """Steps so far without an update because the scale of a float16 loss was too large."""
    micro_batch_size: int
    """Most rows of a forward pass; less than `train.micro_batch_size` after an out-of-memory."""
    tokens_per_second: float
    """Tokens, padding not counted, of all workers."""
    samples_per_second: float
    """Samples of all workers."""
    images_per_second: float
    """Images of all workers."""
    labelled_share: float
    """Labelled tokens as a share of all tokens."""
    padding_share: float
    """What is not `tokens` as a share of the tokens fed."""
    data_wait_share: float
    """Time that workers waited for their micro-batches as a share of the time; mean of workers."""
    mfu: float | None
    """Model FLOPs utilisation as a share (`train.flops`); None where the device's peak is unknown,
    or the base is float32, which no peak is given for."""
    peak_memory_bytes: int
    """Of rank 0: the most that torch had allocated on its GPU during this run, or, on CPU, the
    most memory that its process ever had resident."""
    time: float
    """Unix time at the end of the step."""
    cross_entropy: float | None = None
    """Of the labels, per labelled token, in nats; None without a teacher."""
    kl_divergence: float | None = None
    """Of the student from the teacher at the temperature, per labelled token, in nats; None without
    a teacher."""


@dataclass
class Sums:
    """What ranks add up in one message in each step."""

    loss: float = 0.0
    cross_entropy: float = 0.0
    kl_divergence: float = 0.0
    out_of_memory: float = 0.0
    """Ranks that ran out of memory."""
    failed: float = 0.0
    """Ranks on which a packed pass failed, for want of memory or otherwise."""
    fed_tokens: float = 0.0
    waited: float = 0.0
    """Seconds that ranks waited for micro-batches."""
    vision_rows: float = 0.0
    projector_rows: float = 0.0

    def over_ranks(self, world: World) -> Sums:
        """The sums of all ranks, on every rank."""
        return over_ranks([self], world)[0]


def over_ranks(mine: Sequence[Sums], world: World) -> list[Sums]:
    """Each over all ranks, on every rank, in one message; as many on every rank."""
    if world.size == 1:
        return list(mine)
    rows = [list(asdict(sums).values()) for sums in mine]
    message = torch.tensor(rows, dtype=torch.float64).to(world.device)
    torch.distributed.all_reduce(message)
    return [Sums(*row) for row in message.tolist()]


def merged(steps: Sequence[StepMetrics]) -> StepMetrics:
    """The last of some steps, with the rates and shares of all of them."""
    last = steps[-1]
    seconds = sum(entry.seconds for entry in steps)
    tokens = sum(entry.tokens for entry in steps)
    known = [entry.mfu * entry.seconds for entry in steps if entry.mfu is not None]
    return replace(
        last,
        tokens_per_second=tokens / seconds,
        samples_per_second=sum(entry.samples for entry in steps) / seconds,
        images_per_second=sum(entry.images for entry in steps) / seconds,
        labelled_share=sum(entry.labelled_tokens for entry in steps) / tokens,
        padding_share=1 - tokens / sum(entry.fed_tokens for entry in steps),
        data_wait_share=sum(entry.data_wait_share * entry.seconds for entry in steps) / seconds,
        mfu=sum(known) / seconds if len(known) == len(steps) else None,
    )


def peak_memory(device: str) -> int:
    """See `StepMetrics.peak_memory_bytes`."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # man getrusage: bytes, kilobytes
