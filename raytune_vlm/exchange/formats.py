"""What other trainers read: a row of each, and the file that lists the files where one is wanted.

Every row also holds `group_id`, which these trainers pass over and our sources read. What the
readers do was read in their source: LLaMA-Factory 0.9.5, TRL 1.16 with datasets 5.2, ms-swift 4.6,
NeMo Automodel 0.7.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from raytune_vlm.errors import DataError
from raytune_vlm.json_files import write_json
from raytune_vlm.records import Sample
from raytune_vlm.sources.base import PLACEHOLDER

Row = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """How samples are written for one trainer."""

    peer: str
    """The trainer's name."""
    row: Callable[[Sample, list[str]], Row]
    """A sample and the names of its image files, relative to the rows' file -> a row. Raises
    DataError for what a row of the format cannot say."""
    load: str
    """How the trainer reads the export: `{folder}`, `{split}`."""
    source: Mapping[str, str]
    """The keys of `data.sources` that read it back, `path` relative to the export."""
    rows_file: str = "{split}.jsonl"
    """Name of a split's file; `images/` lies beside it."""
    index: Callable[[Path, Path, Sequence[str]], None] | None = None
    """Write what lists the files: (where to write, where it will lie, splits)."""
    joins_texts: bool = True
    """A turn is one text: neighbouring text parts become one."""


def joins(sample: Sample) -> bool:
    """Whether a turn has neighbouring text parts, which a turn of one text does not keep apart."""
    return any(
        one["type"] == other["type"] == "text"
        for turn in sample.messages
        for one, other in pairwise(turn["content"])
    )


def _flat(sample: Sample, reserved: re.Pattern[str]) -> list[tuple[str, str]]:
    """Role and text of each turn, `<image>` where an image stands.

    `reserved` are the words that the trainer takes for something else than text.
    """
    if sample.tools or any(turn.get("tool_calls") for turn in sample.messages):
        raise DataError(
            "tool calls, which this format has in another form: --format trl keeps them"
        )
    for turn in sample.messages:
        for part in turn["content"]:
            found = reserved.search(part.get("text", ""))
            if found is not None:
                raise DataError(
                    f"the text holds '{found.group()}', which this format takes for a "
                    "placeholder: --format trl keeps it"
                )
    return [
        (turn["role"], "".join(part.get("text", PLACEHOLDER) for part in turn["content"]))
        for turn in sample.messages
    ]


_LLAMAFACTORY_ROLES = {"system": "system", "user": "human", "assistant": "gpt"}
_LLAMAFACTORY_WORDS = re.compile("<image>|<video>|<audio>")


def _llamafactory(sample: Sample, names: list[str]) -> Row:
    """sharegpt: `conversations` of `{from, value}`, a first turn `system`, `images`.

    `SharegptDatasetConverter` (llamafactory/data/converter.py) takes user and assistant in turn,
    and looks for images under `media_dir`, which is `dataset_dir` by default. The placeholders are
    counted in every turn (`_validate_messages`, data/mm_plugin.py).
    """
    turns = _flat(sample, _LLAMAFACTORY_WORDS)
    return {
        "conversations": [{"from": _LLAMAFACTORY_ROLES[r], "value": text} for r, text in turns],
        "images": names,
        "group_id": sample.group_id,
    }


def _dataset_info(folder: Path, _: Path, splits: Sequence[str]) -> None:
    """`dataset_info.json` (`get_dataset_list`, llamafactory/data/parser.py), an entry a split."""
    columns = {"messages": "conversations", "images": "images"}
    entries = {
        split: {"file_name": f"{split}.jsonl", "formatting": "sharegpt", "columns": columns}
        for split in splits
    }
    write_json(folder / "dataset_info.json", entries)


def _trl(sample: Sample, names: list[str]) -> Row:
    """`messages` with typed parts, the images in a column, `tools` as JSON.

    `prepare_multimodal_messages` (trl/data_utils.py) fills the parts `{"type": "image"}` with the
    entries of `images` in order; `SFTTrainer` parses `tools` where it is a text. A list of names in
    `images_file_names` is what the `imagefolder` builder of datasets (`folder_based_builder.py`)
    turns into the column `images` of decoded pictures, wherever the folder lies.
    """
    row: Row = {
        "messages": sample.messages,
        "images_file_names": names,
        "group_id": sample.group_id,
    }
    if sample.tools:
        row["tools"] = json.dumps(sample.tools, ensure_ascii=False)
    return row


_SWIFT_WORDS = re.compile(
    "<image>|<video>|<audio>|<bbox>|<ref-object>|<cot-process>|<start-image>|<img>"
)


def _ms_swift(sample: Sample, names: list[str]) -> Row:
    """`messages` of `{role, content}` with `<image>` in the text, `images`.

    `RowPreprocessor` (swift/dataset/preprocessor/core.py) keeps role and content, both texts;
    `Template` (swift/template/base.py) splits the text at its `special_tokens`. Relative names are
    looked up from the working folder, then from ROOT_IMAGE_DIR (swift/template/vision_utils.py).
    """
    turns = _flat(sample, _SWIFT_WORDS)
    return {
        "messages": [{"role": role, "content": text} for role, text in turns],
        "images": names,
        "group_id": sample.group_id,
    }


_AUTOMODEL_WORDS = re.compile("<image>|<video>", re.IGNORECASE)


def _automodel(sample: Sample, names: list[str]) -> Row:
    """`messages` of `{role, content}` with `<image>` in the user's text, `images`.

    `make_meta_dataset` (nemo_automodel/components/datasets/vlm/datasets.py) is what reads files; it
    makes a `conversation` of typed parts out of each row (`convert_sharegpt_to_conversation`),
    without the blanks around the user's texts.
    """
    turns = _flat(sample, _AUTOMODEL_WORDS)
    return {
        "messages": [{"role": role, "content": text} for role, text in turns],
        "images": names,
        "group_id": sample.group_id,
    }


def _meta(folder: Path, place: Path, splits: Sequence[str]) -> None:
    """`meta.json` of `make_meta_dataset`, an entry a split.

    `media_dir` is taken as it stands, from the working folder: hence the absolute path.
    """
    entries = {
        split: {
            "file_name": f"{split}.jsonl",
            "columns": {"messages": "messages", "images": "images"},
            "media_dir": str(place),
        }
        for split in splits
    }
    write_json(folder / "meta.json", entries)


FORMATS: dict[str, Format] = {
    "llamafactory": Format(
        peer="LLaMA-Factory",
        row=_llamafactory,
        load="dataset_dir: {folder}, dataset: {split}",
        source={"type": "llamafactory", "path": "dataset_info.json", "dataset": "{split}"},
        index=_dataset_info,
    ),
    "trl": Format(
        peer="TRL",
        row=_trl,
        load='load_dataset("imagefolder", data_dir="{folder}/{split}", split="train")',
        source={
            "type": "messages",
            "path": "{split}/metadata.jsonl",
            "images_column": "images_file_names",
        },
        rows_file="{split}/metadata.jsonl",
        joins_texts=False,
    ),
    "ms_swift": Format(
        peer="ms-swift",
        row=_ms_swift,
        load="ROOT_IMAGE_DIR={folder} swift sft --dataset {folder}/{split}.jsonl",
        source={"type": "messages", "path": "{split}.jsonl"},
    ),
    "automodel": Format(
        peer="NeMo Automodel",
        row=_automodel,
        load='make_meta_dataset("{folder}/meta.json", dataset_names=["{split}"])',
        source={"type": "messages", "path": "{split}.jsonl"},
        index=_meta,
    ),
}
