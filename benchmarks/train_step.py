"""Time of a training step: `Run.step` against a plain torch + transformers + peft loop.

    python benchmarks/train_step.py [--model-size small] [--repetitions 3] [--steps 3]
    python benchmarks/train_step.py --model-size 3b      # on CUDA: bfloat16, tokens/s and MFU

A random Qwen2.5-VL of the real class, LoRA of rank 16 on its language model, the same prepared
samples in the same global batches, AdamW, clipping. The plain loop is what the guides show: the
model's own loss, one micro-batch after the other; its batches are collated before the clock,
those of `Run.step` within it. Ways are interleaved, in one process. Also measured: the share of a
step that waits for data, a checkpoint as a share of a step, and with `--workers 2` two gloo workers
against one at the same global batch. Where `trl` is installed and there is a GPU, its `SFTTrainer`
takes the plain loop's batches too.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from packed_rows import write_split

from raytune_vlm.collate.pixels import PixelMaker
from raytune_vlm.config import ExperimentConfig
from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.models.loading import Base, load_base, meta_model
from raytune_vlm.models.lora import attach, detach
from raytune_vlm.models.tiny import write_tiny_model
from raytune_vlm.prepare.store import PreparedSplit, open_split
from raytune_vlm.train.run import Run, TrainingData
from raytune_vlm.train.world import World

_TOWER = {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16}
"""The vision tower of Qwen2.5-VL-3B-Instruct."""
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {},
    "small": {
        "text_config": {
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 10,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
        "vision_config": {
            "hidden_size": 256,
            "intermediate_size": 768,
            "depth": 4,
            "num_heads": 4,
            "out_hidden_size": 512,
        },
    },
    "2b": {
        "text_config": {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
        },
        "vision_config": {**_TOWER, "out_hidden_size": 1536},
    },
    "3b": {
        "text_config": {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
        },
        "vision_config": {**_TOWER, "out_hidden_size": 2048},
    },
}
"""What differs from the tiny model: `3b` has the dimensions of Qwen2.5-VL-3B-Instruct, the language
model of `2b` those of Qwen2-VL-2B-Instruct."""


def resize(config: dict[str, Any], size: str) -> None:
    """Change the tiny model's config to a size."""
    for part, changes in SIZES[size].items():
        config[part].update(changes)
        for derived in ("head_dim", "layer_types"):
            config[part].pop(derived, None)
    width = config["text_config"]["hidden_size"] // config["text_config"]["num_attention_heads"]
    for holder in (config["text_config"], config):
        for name in ("rope_parameters", "rope_scaling"):
            if "mrope_section" in (holder.get(name) or {}):
                eighth = width // 8
                section = [eighth, eighth + eighth // 2, width // 2 - 2 * eighth - eighth // 2]
                holder[name]["mrope_section"] = section


def random_base(size: str, device: str) -> Base:
    """A base of random weights made on its device, with the tiny one's processor: no file of it."""
    tiny = load_base(ModelConfig(name="tiny:qwen2_5_vl"))
    kind: Any = type(tiny.model)
    config = tiny.model.config.to_dict()
    resize(config, size)
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = kind._from_config(kind.config_class.from_dict(config), dtype=dtype)
    return Base(model.requires_grad_(False).eval(), tiny.processor, tiny.family, tiny.image_backend)


def write_model(folder: Path, size: str) -> ModelConfig:
    """A random model with the tiny one's processor, in files that several processes load."""
    write_tiny_model("qwen2_5_vl", folder)
    config = json.loads((folder / "config.json").read_text())
    resize(config, size)
    (folder / "config.json").write_text(json.dumps(config))
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    settings = ModelConfig(name=str(folder), dtype=dtype)
    model: Any = meta_model(settings).to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    model.save_pretrained(folder)
    return settings


def experiment(steps: int, workers: int = 1) -> ExperimentConfig:
    """The recipe of all ways."""
    return ExperimentConfig.model_validate(
        {
            "name": "train_step",
            "data": {"max_length": 1024, "sources": [{"type": "messages", "path": "none"}]},
            "lora": {"rank": 16},
            "train": {
                "max_steps": 10_000,
                "batch_size": 8,
                "micro_batch_size": 4,
                "learning_rate": 1e-4,
                "schedule": "constant",
                "num_workers": workers,
            },
        }
    )


def ours(base: Base, split: PreparedSplit, world: World, steps: int) -> dict[str, float]:
    """Medians over steps of `Run.step`, after a step with the audit."""
    run = Run(base, split, experiment(steps, world.size), world, TrainingData("b"))
    try:
        run.step()
        found = [run.step() for _ in range(steps)]
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            run.save(Path(world.broadcast(folder)) / "step_000001")
            stall = time.perf_counter() - began
    finally:
        run.close()
    seconds = statistics.median(step.seconds for step in found)
    return {
        "seconds": seconds,
        "tokens_per_second": statistics.median(step.tokens_per_second for step in found),
        "data_wait_share": statistics.median(step.data_wait_share for step in found),
        "checkpoint_steps": stall / seconds,
        "mfu": statistics.median(step.mfu or 0.0 for step in found),
        "loss": found[-1].loss,
    }


def plain(base: Base, split: PreparedSplit, device: str, steps: int) -> dict[str, float]:
    """Medians over steps of the plain loop on the same global batches, collated beforehand."""
    config = experiment(steps)
    maker = Run(base, split, config, World(device=device), TrainingData("b"))
    batches = []
    for step in range(steps + 1):
        found = maker.batches.step(step)
        batches.append([maker.batches.on_device(entry.arrays, entry.rows) for entry in found])
    maker.close()
    model = attach(base.model, base.family, config.lora, seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    model.train()
    seconds = []
    for parts in batches:
        began = time.perf_counter()
        for batch, labels in parts:
            loss = model(**batch, labels=labels).loss / len(parts)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        float(loss)
        seconds.append(time.perf_counter() - began)
    base.model = detach(model)
    return {"seconds": statistics.median(seconds[1:])}


def trl(base: Base, split: PreparedSplit, device: str, steps: int) -> dict[str, float] | None:
    """Seconds a step of TRL's `SFTTrainer` on the same collated micro-batches; None without it."""
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError:
        return None
    config = experiment(steps)
    maker = Run(base, split, config, World(device=device), TrainingData("b"))
    fed = []
    for step in range(steps + 1):
        for entry in maker.batches.step(step):
            batch, labels = maker.batches.on_device(entry.arrays, entry.rows)
            fed.append({**{k: v for k, v in batch.items() if k != "use_cache"}, "labels": labels})
    maker.close()
    model = attach(base.model, base.family, config.lora, seed=0)

    class Trainer(SFTTrainer):  # type: ignore[misc,valid-type]
        def get_train_dataloader(self) -> Any:
            return fed

    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            max_steps=steps + 1,
            per_device_train_batch_size=config.train.micro_batch_size,
            gradient_accumulation_steps=2,
            learning_rate=1e-4,
            bf16=device != "cpu",
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
        )
        trainer = Trainer(model=model, args=settings, train_dataset=fed)
        began = time.perf_counter()
        trainer.train()
        seconds = (time.perf_counter() - began) / (steps + 1)
    base.model = detach(model)
    return {"seconds": seconds}


def worker(folder: Path, steps: int) -> None:
    """One of several gloo workers; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = World(dist.get_rank(), dist.get_world_size())
    base = load_base(ModelConfig(name=str(folder / "model")))
    found = ours(base, opened(base, folder / "data"), world, steps)
    if world.rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def opened(base: Base, folder: Path) -> PreparedSplit:
    """The prepared samples."""
    maker = PixelMaker(base.processor.image_processor, base.family, None, ImageLimits())
    index = next(folder.glob("index.*"))
    return open_split(folder, index, "train", maker.decode)


def workers(folder: Path, count: int, steps: int) -> dict[str, float]:
    """`count` processes of `ours`, one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={count}", __file__, "--worker", str(folder)]
    done = subprocess.run(
        [*command, "--steps", str(steps)], capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@click.command()
@click.option("--model-size", type=click.Choice(list(SIZES)), default="small", show_default=True)
@click.option("--samples", default=128, show_default=True)
@click.option("--steps", default=3, show_default=True, help="Measured steps of a repetition.")
@click.option("--repetitions", default=3, show_default=True)
@click.option("--workers", "num_workers", default=1, show_default=True)
@click.option("--worker", "worker_folder", type=click.Path(path_type=Path), hidden=True)
def main(
    model_size: str,
    samples: int,
    steps: int,
    repetitions: int,
    num_workers: int,
    worker_folder: Path | None,
) -> None:
    """Measure in turn; print all figures, medians and ratios to the plain loop."""
    if worker_folder is not None:
        worker(worker_folder, steps)
        return
    torch.set_num_threads(1)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="raytune_vlm-benchmark-") as name:
        folder = Path(name)
        base = load_base(write_model(folder / "model", model_size), device)
        print(f"{sum(p.numel() for p in base.model.parameters()) / 1e6:.1f} M parameters, {device}")
        (folder / "data").mkdir()
        split = write_split(base, folder / "data", samples)
        for _ in range(repetitions):
            ways = {
                "run": ours(base, split, World(device=device), steps),
                "plain": plain(base, split, device, steps),
                "trl": trl(base, split, device, steps) if device != "cpu" else None,
            }
            if num_workers > 1:
                ways["one worker"] = workers(folder, 1, steps)
                ways[f"{num_workers} workers"] = workers(folder, num_workers, steps)
            for way, figures in ways.items():
                if figures is not None:
                    found.setdefault(way, []).append(figures)
    medians = {
        way: {key: statistics.median(entry[key] for entry in entries) for key in entries[0]}
        for way, entries in found.items()
    }
    plain_seconds = medians["plain"]["seconds"]
    ratios = {way: entry["seconds"] / plain_seconds for way, entry in medians.items()}
    print(json.dumps({"all": found, "medians": medians, "ratio_to_plain": ratios}, indent=1))


if __name__ == "__main__":
    main()
