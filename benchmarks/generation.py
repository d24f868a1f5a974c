"""Answers a second: batched generation from the prepared store, and adapters side by side.

    python benchmarks/generation.py [--samples 24] [--repetitions 3] [--new-tokens 8]

- `loop`: what a script does: decode the image, the Hugging Face processor, `generate`, one sample
  after the other;
- `ours`: `evaluate.generate.generate` in batches of 16: token ids from the store, pixels decoded;
- `one by one` and `mixed`: four adapters of different ranks on the same prompts, each by itself or
  in shared batches (`evaluate.adapters.generate_many`);
- `slots one by one` and `slots`: the same four as packed trials have them at a rung: beside the
  base already (`packed.answering`), so that none is loaded.

Interleaved repetitions in one process, one thread, so that a second is one of CPU time: what else
runs on the machine takes none of it. A tiny model and one of about 30 M parameters, of random
weights, so that nearly every answer has all its tokens.
"""

from __future__ import annotations

import io
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

from raytune_vlm.collate.encode import Encoder
from raytune_vlm.collate.pixels import PIXEL_NAMES, PixelMaker
from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.evaluation import EvaluationConfig
from raytune_vlm.config.lora import LoraConfig
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.evaluate.adapters import Adapter, generate_many
from raytune_vlm.evaluate.generate import generate
from raytune_vlm.images import encode_png
from raytune_vlm.models.adapter_file import load_adapter, save_adapter
from raytune_vlm.models.loading import Base, load_base, meta_model
from raytune_vlm.models.lora import attach, detach, lora_layers
from raytune_vlm.models.tiny import write_tiny_model
from raytune_vlm.packed.answering import answer_side_by_side
from raytune_vlm.prepare.store import (
    PreparedSplit,
    RowWriter,
    encoded_to_row,
    open_split,
    write_index,
)

MID = {
    "text_config": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "vision_config": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
    },
}
"""What makes an Idefics3 of about 30 M parameters of the tiny one."""
MODELS: dict[str, dict[str, dict[str, int]]] = {"tiny": {}, "mid": MID}
RANKS = (2, 4, 8, 16)


def write_model(folder: Path, sizes: dict[str, dict[str, int]]) -> Base:
    """A model of random weights in the tiny one's form."""
    write_tiny_model("idefics3", folder)
    if sizes:
        config = json.loads((folder / "config.json").read_text())
        for part, changes in sizes.items():
            config[part].update(changes)
            config[part].pop("head_dim", None)
        (folder / "config.json").write_text(json.dumps(config))
        model = meta_model(ModelConfig(name=str(folder))).to_empty(device="cpu")
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(folder)
    return load_base(ModelConfig(name=str(folder)))


def conversation(number: int, image: Any = None) -> list[dict[str, Any]]:
    """A question of a length of its own about one image."""
    asked = {"type": "image"} if image is None else {"type": "image", "image": image}
    text = {"type": "text", "text": "read " * (1 + number % 12)}
    return [{"role": "user", "content": [asked, text]}]


def write_split(base: Base, folder: Path, count: int) -> PreparedSplit:
    """Prompts with one image each, prepared."""
    encoder = Encoder(base.processor, base.family, sizes_only=True)
    maker = PixelMaker(base.processor.image_processor, base.family, None, ImageLimits())
    generator = np.random.default_rng(0)
    (folder / "shard").mkdir()
    index = []
    with RowWriter(folder / "shard" / "report.arrow") as writer:
        for number in range(count):
            pixels = generator.integers(0, 256, (240, 320, 3), dtype=np.uint8)
            image = Image.fromarray(pixels)
            encoded = encoder.prompt(conversation(number), [image])
            for name in PIXEL_NAMES:
                encoded.tensors.pop(name, None)
            name = f"s{number}"
            index.append(
                {
                    **{"split": "report", "shard": "shard", "row": number, "source": 0},
                    **{"sample_id": name, "group_id": name, "images_id": "", "origin": name},
                    **{"length": len(encoded.input_ids), "num_labelled": 0, "num_media": 0},
                    **{"num_images": 1, "num_bytes": 0, "num_pixel_bytes": 0, "truncated": False},
                }
            )
            row = {"sample_id": name, "group_id": name, "prompt": "", "reference": ""}
            writer.add({**row, "images": [encode_png(image)], **encoded_to_row(encoded)})
    write_index(folder / "index.arrow", index)
    return open_split(folder, folder / "index.arrow", "report", maker.decode)


@torch.no_grad()
def loop(base: Base, split: PreparedSplit, config: EvaluationConfig) -> list[str]:
    """One sample at a time, by the processor itself."""
    texts = []
    for row in range(len(split)):
        image = Image.open(io.BytesIO(split.images(row)[0])).convert("RGB")
        inputs = base.processor.apply_chat_template(
            [conversation(row, image)],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
        output = base.model.generate(
            **inputs, do_sample=False, max_new_tokens=config.max_new_tokens
        )
        new = output[0, inputs["input_ids"].shape[1] :]
        texts.append(base.processor.tokenizer.decode(new, skip_special_tokens=True))
    return texts


def write_adapters(base: Base, folder: Path) -> dict[str, Adapter]:
    """Adapters on the language model, of several ranks, each with an effect."""
    made = {}
    for number, rank in enumerate(RANKS):
        recipe = LoraConfig(rank=rank)
        model = attach(base.model, base.family, recipe, seed=number)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.02 * torch.randn_like(parameter)
        save_adapter(model, folder / str(rank))
        base.model = detach(model)
        made[f"rank-{rank}"] = Adapter(folder / str(rank), recipe, number)
    return made


def resident(base: Base, adapter: Adapter) -> dict[str, Any]:
    """An adapter's layers, off the base again, as a slot has them."""
    model = attach(base.model, base.family, adapter.recipe, seed=adapter.seed)
    load_adapter(adapter.folder, model)
    layers = lora_layers(model)
    base.model = detach(model)
    return layers


def measure(sizes: dict[str, Any], samples: int, repetitions: int, new_tokens: int) -> Any:
    """Answers a second of each way, ratios' medians, and whether the answers are the same."""
    config = EvaluationConfig(max_new_tokens=new_tokens, batch_size=16)
    root = Path(tempfile.mkdtemp(prefix="raytune_vlm-benchmark-"))
    try:
        base = write_model(root / "model", sizes)
        (root / "store").mkdir()
        split = write_split(base, root / "store", samples)
        rows = list(range(samples))
        adapters = write_adapters(base, root / "adapters")
        slots = {name: resident(base, adapter) for name, adapter in adapters.items()}

        def one_by_one() -> Any:
            return {
                name: generate_many(base, {name: adapter}, split, {name: rows}, config).by_name[
                    name
                ]
                for name, adapter in adapters.items()
            }

        def beside(chosen: dict[str, Any]) -> Any:
            return answer_side_by_side(base, chosen, split, dict.fromkeys(chosen, rows), config)

        ways: dict[str, tuple[int, Callable[[], Any]]] = {
            "loop": (samples, lambda: loop(base, split, config)),
            "ours": (samples, lambda: generate(base.model, base, split, rows, config)),
            "one by one": (samples * len(RANKS), one_by_one),
            "mixed": (
                samples * len(RANKS),
                lambda: (
                    generate_many(
                        base, adapters, split, dict.fromkeys(adapters, rows), config
                    ).by_name
                ),
            ),
            "slots one by one": (
                samples * len(RANKS),
                lambda: {name: beside({name: own})[name] for name, own in slots.items()},
            ),
            "slots": (samples * len(RANKS), lambda: beside(slots)),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        answers: dict[str, Any] = {}
        for _ in range(repetitions):
            for name, (count, way) in ways.items():
                began = time.process_time()
                answers[name] = way()
                rates[name].append(count / (time.process_time() - began))

        def ratio(first: str, second: str) -> float:
            pairs = zip(rates[first], rates[second], strict=True)
            return statistics.median(one / other for one, other in pairs)

        same = sum(a == b.text for a, b in zip(answers["loop"], answers["ours"], strict=True))
        return {
            "parameters": sum(entry.numel() for entry in base.model.parameters()),
            "answers_per_second": rates,
            "ours_to_loop": ratio("ours", "loop"),
            "mixed_to_one_by_one": ratio("mixed", "one by one"),
            "slots_to_one_by_one": ratio("slots", "slots one by one"),
            "answers_as_in_the_loop": f"{same} of {samples}",
            "adapters_answer_the_same": (
                answers["mixed"] == answers["one by one"] == answers["slots"]
            ),
        }
    finally:
        shutil.rmtree(root)


@click.command()
@click.option("--samples", default=24, show_default=True)
@click.option("--repetitions", default=3, show_default=True)
@click.option("--new-tokens", default=8, show_default=True)
@click.option("--model", "models", type=click.Choice(list(MODELS)), multiple=True)
def main(samples: int, repetitions: int, new_tokens: int, models: tuple[str, ...]) -> None:
    """Measure the models (both, if none is named); print rates, ratios, whether answers agree."""
    torch.set_num_threads(1)
    for name in models or MODELS:
        found = measure(MODELS[name], samples, repetitions, new_tokens)
        print(json.dumps({name: found}, indent=1), flush=True)


if __name__ == "__main__":
    main()
