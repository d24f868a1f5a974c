"""One trial as a process of its own with transformers' `Trainer`, or TRL's `SFTTrainer`.

    python benchmarks/makespan_trainer.py INPUTS.json RECIPE.json

`makespan.py` runs these in sequence. The batches are those of our plan, collated as ours, so that
the trainers see the same samples in the same order; loop, optimizer and schedule are their own.
Prints the loss of the last step, the score and the trainer's name.
"""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

from datasets import Dataset
from sweep_plain import Inputs, Plain


def trainer_class() -> tuple[Any, Any, dict[str, Any]]:
    """The trainer, its settings' class, and settings of its own."""
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError:
        from transformers import Trainer, TrainingArguments

        return Trainer, TrainingArguments, {}
    own = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
    return SFTTrainer, SFTConfig, own


def main(inputs_file: str, recipe_file: str) -> None:
    """Load, train, save, score."""
    with open(recipe_file) as stream:  # noqa: PTH123
        recipe = json.load(stream)
    plain = Plain(Inputs.read(inputs_file))
    run = plain.begin(recipe)
    config = run.config
    batches = []
    for step in range(config.max_steps):
        for entry in run.batches.step(step):
            batch, labels = run.batches.on_device(entry.arrays, entry.rows)
            kept = {key: value for key, value in batch.items() if key != "use_cache"}
            batches.append({**kept, "labels": labels})
    per_step = len(batches) // config.max_steps
    base, settings_class, own = trainer_class()

    class Fed(base):  # type: ignore[misc,valid-type]
        def get_train_dataloader(self) -> Any:
            return batches

    with tempfile.TemporaryDirectory() as folder:
        settings = settings_class(
            output_dir=folder,
            max_steps=config.max_steps,
            per_device_train_batch_size=config.micro_batch_size or config.batch_size,
            gradient_accumulation_steps=per_step,
            learning_rate=config.learning_rate,
            warmup_steps=config.warmup_steps,
            lr_scheduler_type=config.schedule,
            weight_decay=config.weight_decay,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            remove_unused_columns=False,
            gradient_checkpointing=False,
            **own,
        )
        # Only asked what kind of data it is: the batches are fed below it.
        rows = Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]})
        trainer = Fed(
            model=run.model,
            args=settings,
            train_dataset=rows,
            processing_class=plain.base.processor,
        )
        trainer.train()
        run.model.save_pretrained(folder)
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        score = plain.score(run.model)
    print(json.dumps({"trainer": base.__name__, "loss": float(losses[-1]), "score": score}))


if __name__ == "__main__":
    main(*sys.argv[1:])
