"""Processors of families that have none in transformers, around the model's own tokenizer.

The processors that are published with such models are code for older releases of transformers and
make float pixels; these make the same sizes, tiles and tokens on transformers' `PilBackend`, so
that pixels are prepared as those of any other family.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raytune_vlm.models.family import Family
from raytune_vlm.models.processors import (
    kimi_vl,
    llava_onevision1_5,
    nemotron_parse,
    nvlm_d,
)

BUILDERS: dict[str, Callable[[Any, dict[str, Any], dict[str, Any]], Any]] = {
    "kimi_vl": kimi_vl.build,
    "NVLM_D": nvlm_d.build,
    "llavaonevision1_5": llava_onevision1_5.build,
    "nemotron_parse": nemotron_parse.build,
}
"""`model_type` -> its processor, from tokenizer, `config.json` and `preprocessor_config.json`."""

GLUE: dict[str, Callable[[Any, Any], None]] = {"NVLM_D": nvlm_d.connect}
"""`model_type` -> what makes a loaded model callable as the others are, given its processor."""


def build_processor(path: str, family: Family, options: dict[str, Any]) -> Any:
    """The processor of a model; `options` are those of `from_pretrained`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    revision = options["revision"]
    if tokenizer.chat_template is None:
        # Where older processors keep it.
        tokenizer.chat_template = _json(path, "chat_template.json", revision).get("chat_template")
    config = _json(path, "config.json", revision)
    preprocessor = _json(path, "preprocessor_config.json", revision)
    return BUILDERS[family.model_type](tokenizer, config, preprocessor)


def _json(path: str, name: str, revision: str | None) -> dict[str, Any]:
    from transformers.utils import cached_file

    file = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    plain: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
    return plain
