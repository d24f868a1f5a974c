"""Calls of torch in an optimizer step of packed slots, at the depth of a 3B model.

    python benchmarks/packed_calls.py [--slots 1,2,4,8,16,32] [--dropout 0.05]

Steps on the CPU of a random Qwen2.5-VL with as many layers as that of 3B, and little in them: what
is called does not depend on their width. `packing_table.py` has the slots: rows of random tokens
without images, LoRA on all linear layers of the language model. Views are not counted. On a GPU
every other call launches a kernel or several, and a step cannot take less than their launches,
however few its tokens; but for the update of a slot by itself (`update` and the clipping before
it): there torch updates many matrices in a kernel, and on a CPU one after another.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import torch
from packing_table import Cell, Group, Machine, numbers
from slot_layers import Calls
from train_step import SIZES

from raytune_vlm.packed.host import Host

SIZES["thin"] = {
    "text_config": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": SIZES["3b"]["text_config"]["num_hidden_layers"],
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
    },
    "vision_config": {"out_hidden_size": 128},
}


class Counted(Group):
    """Slots whose steps are counted."""

    def drop(self, dropout: float) -> None:
        """Give the slots to come a dropout."""
        self._recipe = self._recipe.with_recipe({"lora.dropout": dropout})

    def calls(self) -> tuple[int, int, int]:
        """Of a step of a slot alone, of AdamW's update in it, and of a packed step of all."""
        slot, host, begun = self._slots[0], Host(self._base, "fast"), []
        with Calls() as alone:
            hooks = [
                slot.run.optimizer.register_step_pre_hook(lambda *_: begun.append(alone.number)),
                slot.run.optimizer.register_step_post_hook(lambda *_: begun.append(alone.number)),
            ]
            self._alone(slot)
        for hook in hooks:
            hook.remove()
        with Calls() as packed:
            self._packed(host)
        return alone.number, begun[1] - begun[0], packed.number


@click.command(context_settings={"show_default": True})
@click.option("--slots", default="1,2,4,8,16,32", callback=numbers)
@click.option("--dropout", default=0.0, help="Of LoRA.")
def main(slots: list[int], dropout: float) -> None:
    """Print a line for each number of slots."""
    torch.set_num_threads(1)
    machine = Machine("cpu", "one CPU thread", flops=1.0, bandwidth=1.0)
    with tempfile.TemporaryDirectory() as folder:
        group = Counted(Cell("thin", "cpu", False, 8, 1, 64, 1), machine, Path(folder))
        group.drop(dropout)
        for count in slots:
            group.measure(count, repetitions=1)
            alone, update, packed = group.calls()
            click.echo(
                f"{count} slots: {count * alone} calls alone, {count * update} of them AdamW's; "
                f"{packed} packed"
            )


if __name__ == "__main__":
    main()
