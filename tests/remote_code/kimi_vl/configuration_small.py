"""A configuration that transformers does not know."""

import os
from pathlib import Path

from transformers import LlamaConfig, PretrainedConfig

if "MARK_CODE_THAT_RAN" in os.environ:
    Path(os.environ["MARK_CODE_THAT_RAN"]).touch()


class SmallConfig(PretrainedConfig):
    model_type = "kimi_vl"
    sub_configs = {"text_config": LlamaConfig}  # noqa: RUF012

    def __init__(self, text_config=None, width=16, patch=14, media_token_id=0, **kwargs):
        self.text_config = (
            text_config
            if isinstance(text_config, LlamaConfig)
            else LlamaConfig(**text_config or {})
        )
        self.width, self.patch, self.media_token_id = width, patch, media_token_id
        super().__init__(**kwargs)
