"""Batched greedy generation for the prompts of a prepared split."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import torch

from raytune_vlm.collate.batch import PixelTable, collate
from raytune_vlm.collate.encoded import Encoded
from raytune_vlm.collate.features import Features
from raytune_vlm.collate.labels import structural_tokens
from raytune_vlm.config.evaluation import EvaluationConfig
from raytune_vlm.errors import first_line
from raytune_vlm.evaluate.scoring import Prediction
from raytune_vlm.models.families import Family
from raytune_vlm.models.loading import Base
from raytune_vlm.monitor import Say


@dataclass(frozen=True)
class Together:
    """How workers that hold parts of one model stay in step while they answer different prompts."""

    most: Callable[[int], int]
    """The largest of what the workers give it, on each of them."""
    blank: Encoded | None
    """What is added to prompts without any image, so that every worker's pass has one; None where
    every prompt has."""


class Prompts(Protocol):
    """What is asked, by row number: a `PreparedSplit`, or one with other images (`altered`)."""

    lengths: np.ndarray
    num_images: np.ndarray

    @property
    def sample_ids(self) -> list[str]:
        """The id of each row."""

    @property
    def group_ids(self) -> list[str]:
        """The group of each row."""

    def encoded(self, number: int) -> Encoded:
        """The encoded prompt of a row."""

    def text(self, number: int, column: str) -> str:
        """`prompt` or `reference` of a row."""


def deal(lengths: np.ndarray, rows: Sequence[int], num_workers: int, extra: int) -> list[list[int]]:
    """Rows for each of some workers, about as much work for each.

    The longest prompt first, each to the worker that has least so far (Graham 1969, LPT): a row
    counts its own tokens and `extra` for the answer. Every row is dealt once; the same input gives
    the same hands on every worker.
    """
    hands: list[list[int]] = [[] for _ in range(num_workers)]
    loads = [(0, worker) for worker in range(num_workers)]
    for row in sorted(rows, key=lambda row: (-int(lengths[row]), row)):
        load, worker = heapq.heappop(loads)
        hands[worker].append(row)
        heapq.heappush(loads, (load + int(lengths[row]) + extra, worker))
    return [sorted(hand) for hand in hands]


def generate(
    model: Any,
    base: Base,
    split: Prompts,
    rows: Sequence[int],
    config: EvaluationConfig,
    *,
    device: str = "cpu",
    keep_going: Callable[[int], bool] = lambda done: True,
    keep: Callable[[Sequence[Prediction]], None] = lambda answers: None,
    together: Together | None = None,
    features: Features | None = None,
    say: Say = lambda message: None,
) -> list[Prediction] | None:
    """The model's answers to the prompts of some rows, in the order of the rows.

    Prompts are sorted by length, padded on the left (or answered with those of the same length,
    where a family has no padding on the left) and answered greedily until the end-of-turn token or
    `max_new_tokens`.

    Parameters
    ----------
    keep_going
        Asked between two batches, with the number of rows that are answered.
    keep
        Given the answers of each batch as it ends.
    together
        Where the model is cut up over workers, how to stay in step with them; every worker then
        needs a row at least.
    features
        What the base's tower and projector make of images, if the model's are the base's.
    say
        Told of batches that memory did not suffice for: they are halved, but for workers that have
        to stay in step.

    Returns
    -------
    list of Prediction, or None
        None if `keep_going` said no.
    """
    answering = Answering(model, base, split, config, device, features, say)
    found: dict[int, Prediction] = {}
    model.eval()
    chunks = list(_chunks(split.lengths, rows, base.family, config.batch_size))
    if together is not None:
        chunks += [chunks[-1]] * (together.most(len(chunks)) - len(chunks))
    for chunk in chunks:
        if not keep_going(len(found)):
            return None
        blank = together.blank if together and not split.num_images[chunk].any() else None
        answers = answering.answer(chunk, blank=blank, synced_gpus=together is not None)
        new = [entry for row, entry in zip(chunk, answers, strict=True) if row not in found]
        found |= dict(zip(chunk, answers, strict=True))
        keep(new)
    return [found[row] for row in rows]


class Answering:
    """Batches of prompts to a model, answers back."""

    def __init__(
        self,
        model: Any,
        base: Base,
        split: Prompts,
        config: EvaluationConfig,
        device: str,
        features: Features | None = None,
        say: Say = lambda message: None,
    ) -> None:
        self._features, self._say, self._most = features, say, config.batch_size
        self._model, self._base, self._split = model, base, split
        self._device, self._config = device, config
        self._pixels = PixelTable(
            base.processor.image_processor, base.family, device, backend=base.image_backend
        )
        self._ends = _end_tokens(model, base.processor.tokenizer)

    def answer(
        self,
        rows: Sequence[int],
        *,
        blank: Encoded | None = None,
        adapter_names: Sequence[str] | None = None,
        synced_gpus: bool = False,
    ) -> list[Prediction]:
        """The answers to some rows, in one batch if memory suffices for that.

        Raises
        ------
        torch.OutOfMemoryError
            If it does not for one row, or, with `synced_gpus`, for all: others wait for this batch.
        """
        found: list[Prediction] = []
        while left := rows[len(found) :]:
            part = left[: self._most]
            options: dict[str, Any] = {"synced_gpus": True} if synced_gpus else {}
            if adapter_names is not None:
                options["adapter_names"] = adapter_names[len(found) :][: len(part)]
            try:
                found += self._answer(part, blank, options)
                continue
            except torch.OutOfMemoryError as error:
                if len(part) == 1 or synced_gpus:
                    raise
                reason = first_line(error)
            self._most = (len(part) + 1) // 2
            self._say(
                f"out of memory with {len(part)} prompts in a batch (evaluation.batch_size): "
                f"{self._most} for the rest of these ({reason})"
            )
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return found

    @torch.no_grad()
    def _answer(
        self, rows: Sequence[int], blank: Encoded | None, options: dict[str, Any]
    ) -> list[Prediction]:
        """The answers to one batch; `options` go to the model's `generate`."""
        samples = [self._split.encoded(row) for row in rows]
        tokenizer = self._base.processor.tokenizer
        batch = collate(
            samples if blank is None else [*samples, blank],
            self._base.family,
            pad_token_id=tokenizer.pad_token_id,
            padding_side="left",
        )
        del batch["labels"]
        batch = {name: entry.to(self._device) for name, entry in batch.items()}
        if self._features is not None and blank is None:
            batch = self._features.replace(batch, self._split, rows)
        batch = self._pixels(batch)
        output = self._model.generate(
            **batch,
            do_sample=False,
            num_beams=1,
            max_new_tokens=self._config.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=self._ends,
            **options,
        )
        # What is generated follows the decoder's tokens, also where an encoder reads the prompt.
        ids = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
        tokens = output[: len(rows), batch[ids].shape[1] :].tolist()
        return [
            _prediction(self._split, row, own, self._ends, self._base)
            for row, own in zip(rows, tokens, strict=True)
        ]


def _chunks(
    lengths: np.ndarray, rows: Sequence[int], family: Family, size: int
) -> Iterator[list[int]]:
    """Rows of about the same length together, at most `size`."""
    order = sorted(rows, key=lambda row: int(lengths[row]))
    by_length = groupby(order, key=lambda row: 0 if family.left_padding else lengths[row])
    for _, group in by_length:
        equal = list(group)
        yield from (equal[start : start + size] for start in range(0, len(equal), size))


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({int(token) for token in [*ends, tokenizer.eos_token_id] if token is not None})


def _prediction(
    split: Prompts, row: int, tokens: list[int], ends: list[int], base: Base
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
