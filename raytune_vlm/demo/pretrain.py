# ruff: noqa: T201 -- a command: it prints
"""Trains the tiny base model from scratch on a mixture of rendered-text tasks.

    python -m raytune_vlm.demo.pretrain --output DIR [--steps N] [--seed S]

The shipped weights in `base/` were made by this very command with its defaults, on one CPU thread.
Every step learns from two small batches, one of text lines and one of receipts and pages, made on
the fly. Five things matter for so small a model:
- a mixture: the tasks that answer in tags chosen by the prompt give every tag, also those of the
  new schema that only the demo uses, a trained embedding;
- made-up words, so that it reads characters and does not guess words;
- a second loss, in the first part of the training only: a linear head (thrown away) tells from each
  image patch which characters stand there;
- Muon (Jordan et al. 2024) for the matrices: twice as many characters recognised in equal time;
- few tokens: short prompts, 36 image tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from raytune_vlm.demo import base_model, lines, receipts
from raytune_vlm.demo.base_model import END, IMAGE_SIZE, PATCH_SIZE, TOKEN_IDS
from raytune_vlm.demo.lines import Glyph, Rng, choice
from raytune_vlm.json_tokens import SEPARATOR, json2token

NUM_STEPS, NUM_HELD_OUT = 2600, 256
LINE_BATCH, RECEIPT_BATCH = 24, 12
MATRIX_LEARNING_RATE, OTHER_LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY = 8e-3, 2e-3, 60, 0.01
PATCH_LOSS_UNTIL = 0.7  # the part of the training in which the patch loss fades from 1 to 0
GROUND_WEIGHT = 0.5  # of patches without ink, which are seven in eight, against all with ink
IGNORED, NO_CHARACTER = -100, 0  # a token that is not learned, a half patch without ink
KEYS = base_model.KEYS_A + base_model.KEYS_B
SAMPLES_PER_PATCH = 2  # a patch is as wide as a narrow character: it may hold two
PATCHES = IMAGE_SIZE // PATCH_SIZE


@dataclass(frozen=True)
class Sample:
    """One image with a prompt and its answer, and the character at each half patch."""

    picture: np.ndarray
    prompt: str
    answer: str
    patch_labels: np.ndarray


def wrap(text: str, keys: tuple[str, ...]) -> str:
    """The text inside the tags of these keys."""
    for key in reversed(keys):
        text = f"<s_{key}>{text}</s_{key}>"
    return text


def patch_labels(glyphs: list[Glyph], image: Image.Image) -> np.ndarray:
    """The token id of the character at each half patch of the picture, or `NO_CHARACTER`."""
    labels = np.full((PATCHES, PATCHES * SAMPLES_PER_PATCH), NO_CHARACTER, dtype=np.int64)
    down, across = PATCHES / image.height, PATCHES * SAMPLES_PER_PATCH / image.width
    for glyph in glyphs:
        # The cells whose middle (index + 0.5) lies inside the glyph's box.
        top = max(0, math.ceil(glyph.top * down - 0.5))
        bottom = math.ceil(glyph.bottom * down - 0.5)
        left = max(0, math.ceil(glyph.left * across - 0.5))
        right = math.ceil(glyph.right * across - 0.5)
        labels[top:bottom, left:right] = TOKEN_IDS[glyph.character]
    return labels


def _sample(image: Image.Image, glyphs: list[Glyph], prompt: str, answer: str) -> Sample:
    return Sample(base_model.squeeze(image), prompt, answer, patch_labels(glyphs, image))


def read_line(rng: Rng) -> Sample:
    """A line and its text."""
    glyphs: list[Glyph] = []
    text = lines.random_line(rng)
    return _sample(lines.render_line(text, rng, glyphs=glyphs), glyphs, "read", text)


def wrap_line(rng: Rng) -> Sample:
    """A line and its text inside the one or two tags that the prompt names."""
    glyphs: list[Glyph] = []
    text = lines.random_line(rng)
    keys = tuple(str(choice(rng, KEYS)) for _ in range(int(rng.integers(1, 3))))
    image = lines.render_line(text, rng, glyphs=glyphs)
    return _sample(image, glyphs, "".join(f"<s_{key}>" for key in keys), wrap(text, keys))


def read_page(rng: Rng) -> Sample:
    """A page and the text of its rows."""
    glyphs: list[Glyph] = []
    image, rows = receipts.render_page(rng, glyphs=glyphs)
    return _sample(image, glyphs, "text", "\n".join(rows))


def wrap_page(rng: Rng) -> Sample:
    """A page and its rows as a list under the key that the prompt names."""
    glyphs: list[Glyph] = []
    image, rows = receipts.render_page(rng, glyphs=glyphs)
    key = str(choice(rng, KEYS))
    return _sample(image, glyphs, f"list<s_{key}>", wrap(SEPARATOR.join(rows), (key,)))


def parse_receipt(rng: Rng) -> Sample:
    """A receipt of kind A and its JSON as tags."""
    glyphs: list[Glyph] = []
    image, truth = receipts.render_kind_a(rng, glyphs=glyphs)
    return _sample(image, glyphs, "parse", json2token(truth))


def ask_receipt(rng: Rng) -> Sample:
    """A receipt of kind A and one question about it."""
    glyphs: list[Glyph] = []
    image, truth = receipts.render_kind_a(rng, glyphs=glyphs)
    item = choice(rng, truth["items"])
    questions = (
        ("sum?", truth["sum"]),
        (f"cost {item['name']}?", item["cost"]),
        (f"qty {item['name']}?", item["qty"]),
    )
    prompt, answer = choice(rng, questions)
    return _sample(image, glyphs, prompt, answer)


Task = Callable[[Rng], Sample]
LINE_TASKS: dict[Task, float] = {read_line: 0.7, wrap_line: 0.3}
RECEIPT_TASKS: dict[Task, float] = {
    parse_receipt: 0.4, read_page: 0.2, wrap_page: 0.25, ask_receipt: 0.15,
}  # fmt: skip


def draw_samples(tasks: dict[Task, float], count: int, rng: Rng) -> list[Sample]:
    """Samples of tasks drawn with the given probabilities."""
    names = list(tasks)
    drawn = rng.choice(len(names), size=count, p=list(tasks.values()))
    return [names[index](rng) for index in drawn]


def collate(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Samples as one batch, padded on the right; only the answers are learned."""
    rows = []
    for sample in samples:
        prompt = base_model.encode_prompt(sample.prompt)
        answer = base_model.encode(sample.answer + END)
        rows.append((prompt + answer, [IGNORED] * len(prompt) + answer))
    longest = max(len(tokens) for tokens, _ in rows)
    input_ids = torch.full((len(rows), longest), TOKEN_IDS[base_model.PAD])
    labels = torch.full((len(rows), longest), IGNORED)
    attention_mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, (tokens, targets) in enumerate(rows):
        input_ids[index, : len(tokens)] = torch.tensor(tokens)
        labels[index, : len(tokens)] = torch.tensor(targets)
        attention_mask[index, : len(tokens)] = 1
    return {
        "input_ids": input_ids,
        "labels": labels,
        "attention_mask": attention_mask,
        "pixel_values": base_model.pixel_values([sample.picture for sample in samples]),
        "patch_labels": torch.from_numpy(np.stack([sample.patch_labels for sample in samples])),
    }


def losses(
    model: Any, patch_head: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss of the answer tokens, and that of the characters at the patches."""
    images = model.model.get_image_features(batch["pixel_values"], return_dict=True)
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        mm_encoder_outputs={"image": images},
        labels=batch["labels"],
    )
    scores = patch_head(images.last_hidden_state)  # [batch, patches, halves * vocabulary]
    scores = scores.view(-1, len(TOKEN_IDS))
    patch_labels = batch["patch_labels"].reshape(-1)
    per_cell = functional.cross_entropy(scores, patch_labels, reduction="none")
    has_ink = patch_labels != NO_CHARACTER
    return output.loss, per_cell[has_ink].mean() + GROUND_WEIGHT * per_cell[~has_ink].mean()


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Linear warm-up, then half a cosine down to 2 %."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, num_steps - WARMUP_STEPS)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def answer(model: Any, samples: list[Sample], *, max_new_tokens: int = 96) -> list[str]:
    """Greedy answers; the batch is padded on the left."""
    prompts = [base_model.encode_prompt(sample.prompt) for sample in samples]
    longest = max(map(len, prompts))
    pad = TOKEN_IDS[base_model.PAD]
    input_ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    output = model.generate(
        input_ids=input_ids,
        attention_mask=(input_ids != pad).long(),
        pixel_values=base_model.pixel_values([sample.picture for sample in samples]),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    texts = []
    for row in output[:, longest:].tolist():
        tokens = [base_model.VOCABULARY[token] for token in row]
        texts.append("".join(tokens[: tokens.index(END)] if END in tokens else tokens))
    return texts


def held_out_scores(model: Any, *, num_samples: int, seed: int) -> dict[str, float]:
    """The share of exactly right answers per task, on samples that training cannot have drawn."""
    model.eval()
    scores = {}
    for task in (*LINE_TASKS, *RECEIPT_TASKS):
        rng = np.random.default_rng([seed, 1])
        samples = [task(rng) for _ in range(num_samples)]
        texts = answer(model, samples)
        right = sum(text == sample.answer for text, sample in zip(texts, samples, strict=True))
        scores[task.__name__] = round(right / num_samples, 4)
    model.train()
    return scores


def build_optimizers(model: Any, patch_head: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the model, AdamW for embeddings, convolution, norms, head."""
    matrices: list[torch.nn.Parameter] = []
    others = list(patch_head.parameters())
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if is_matrix else others).append(parameter)
    optimizers = [
        torch.optim.Muon(
            matrices,
            lr=MATRIX_LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=OTHER_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def train(*, num_steps: int, seed: int, report_every: int = 250) -> Any:
    """The trained model."""
    model = base_model.build_model(seed=seed).train()
    patch_head = torch.nn.Linear(
        model.config.vision_config.hidden_size, SAMPLES_PER_PATCH * len(TOKEN_IDS)
    )
    optimizers = build_optimizers(model, patch_head)
    parameters = [*model.parameters(), *patch_head.parameters()]
    begin = time.monotonic()
    for step in range(num_steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * learning_rate_factor(step, num_steps)
        weight = max(0.0, 1.0 - step / (PATCH_LOSS_UNTIL * num_steps))
        rng = np.random.default_rng([seed, 0, step])
        shown = []
        for tasks, count in ((LINE_TASKS, LINE_BATCH), (RECEIPT_TASKS, RECEIPT_BATCH)):
            loss, patch_loss = losses(model, patch_head, collate(draw_samples(tasks, count, rng)))
            (loss + weight * patch_loss).backward()
            shown += [f"{loss.item():.3f}", f"{patch_loss.item():.3f}"]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0:
            print(
                f"step {step + 1}/{num_steps}, {time.monotonic() - begin:.0f} s: "
                f"lines {shown[0]} (patches {shown[1]}), receipts {shown[2]} (patches {shown[3]})",
                flush=True,
            )
        if (step + 1) % report_every == 0 and step + 1 < num_steps:
            print(held_out_scores(model, num_samples=32, seed=seed), flush=True)
    return model


def save(
    model: Any, folder: Path, *, num_steps: int, seed: int, num_held_out: int, seconds: float
) -> None:
    """Writes the weights in half precision, the processor, and the record of the training."""
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    base_model.build_processor().save_pretrained(folder)
    (folder / base_model.WEIGHTS_FILE).chmod(0o644)  # written as private
    # The scores are those of the weights as a user loads them: rounded to half, run in float.
    scores = held_out_scores(model.float(), num_samples=num_held_out, seed=seed)
    record = {
        "command": f"python -m raytune_vlm.demo.pretrain --output DIR --steps {num_steps} "
        f"--seed {seed}",
        "seed": seed,
        "steps": num_steps,
        "seconds": round(seconds),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "held_out_samples": num_held_out,
        "exact_match": scores,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "numpy", "pillow")},
        },
        "sha256": base_model.file_sha256(folder / base_model.WEIGHTS_FILE),
    }
    text = json.dumps(record, indent=2) + "\n"
    (folder / base_model.TRAINING_FILE).write_text(text, encoding="utf-8")
    print(text)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Trains the demo's base model from scratch.")
    parser.add_argument("--output", type=Path, required=True, help="folder of the result")
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=NUM_HELD_OUT, help="samples a task")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the sums, and so the weights, depend on the number of threads
    begin = time.monotonic()
    model = train(num_steps=options.steps, seed=options.seed)
    seconds = time.monotonic() - begin
    save(
        model,
        options.output,
        num_steps=options.steps,
        seed=options.seed,
        num_held_out=options.held_out,
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
