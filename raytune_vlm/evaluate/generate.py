"""Batched greedy generation for the prompts of a prepared split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from raytune_vlm.collate.batch import PixelTable, collate
from raytune_vlm.collate.encoded import Encoded
from raytune_vlm.collate.labels import structural_tokens
from raytune_vlm.config.evaluation import EvaluationConfig
from raytune_vlm.evaluate.scoring import Prediction
from raytune_vlm.models.families import Family
from raytune_vlm.models.loading import Base
from raytune_vlm.prepare.store import PreparedSplit


@dataclass(frozen=True)
class Together:
    """How workers that hold parts of one model stay in step while they answer different prompts."""

    most: Callable[[int], int]
    """The largest of what the workers give it, on each of them."""
    blank: Encoded | None
    """What is added to prompts without any image, so that every worker's pass has one; None where
    every prompt has."""


@torch.no_grad()
def generate(
    model: Any,
    base: Base,
    split: PreparedSplit,
    rows: Sequence[int],
    config: EvaluationConfig,
    *,
    device: str = "cpu",
    keep_going: Callable[[], bool] = lambda: True,
    together: Together | None = None,
) -> list[Prediction] | None:
    """The model's answers to the prompts of some rows, in the order of the rows.

    Prompts are sorted by length, padded on the left (or answered with those of the same length,
    where a family has no padding on the left) and answered greedily until the end-of-turn token or
    `max_new_tokens`.

    Parameters
    ----------
    together
        Where the model is cut up over workers, how to stay in step with them; every worker then
        needs a row at least.

    Returns
    -------
    list of Prediction, or None
        None if `keep_going` said no between two batches.
    """
    pixels = PixelTable(
        base.processor.image_processor, base.family, device, backend=base.image_backend
    )
    tokenizer = base.processor.tokenizer
    ends = _end_tokens(model, tokenizer)
    found: dict[int, Prediction] = {}
    model.eval()
    chunks = list(_chunks(split, rows, base.family, config.batch_size))
    if together is not None:
        chunks += [chunks[-1]] * (together.most(len(chunks)) - len(chunks))
    for chunk in chunks:
        if not keep_going():
            return None
        samples = [split.encoded(row) for row in chunk]
        if (
            together is not None
            and together.blank is not None
            and not split.num_images[chunk].any()
        ):
            samples.append(together.blank)
        batch = collate(
            samples,
            base.family,
            pad_token_id=tokenizer.pad_token_id,
            padding_side="left",
        )
        del batch["labels"]
        batch = pixels({name: tensor.to(device) for name, tensor in batch.items()})
        output = model.generate(
            **batch,
            do_sample=False,
            num_beams=1,
            max_new_tokens=config.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends,
            synced_gpus=together is not None,
        )
        # What is generated follows the decoder's tokens, also where an encoder reads the prompt.
        ids = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
        asked = batch[ids].shape[1]
        for row, tokens in zip(chunk, output[: len(chunk), asked:].tolist(), strict=True):
            found[row] = _prediction(split, row, tokens, ends, base)
    return [found[row] for row in rows]


def _chunks(
    split: PreparedSplit, rows: Sequence[int], family: Family, size: int
) -> Iterator[list[int]]:
    """Rows of about the same length together, at most `size`."""
    order = sorted(rows, key=lambda row: int(split.lengths[row]))
    by_length = groupby(order, key=lambda row: 0 if family.left_padding else split.lengths[row])
    for _, group in by_length:
        equal = list(group)
        yield from (equal[start : start + size] for start in range(0, len(equal), size))


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({int(token) for token in [*ends, tokenizer.eos_token_id] if token is not None})


def _prediction(
    split: PreparedSplit, row: int, tokens: list[int], ends: list[int], base: Base
) -> Prediction:
    stop = next((place for place, token in enumerate(tokens) if token in ends), None)
    structure = structural_tokens(base.processor.tokenizer, base.family)
    answer = [token for token in tokens[:stop] if token not in structure]
    text = base.processor.tokenizer.decode(answer)
    return Prediction(
        sample_id=split.sample_ids[row],
        group_id=split.group_ids[row],
        prompt=split.text(row, "prompt"),
        reference=split.text(row, "reference"),
        text=text,
        num_tokens=len(tokens) if stop is None else stop + 1,
        truncated=stop is None,
    )
