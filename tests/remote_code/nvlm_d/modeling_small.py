"""A stand-in with NVLM-D's module names, `extract_feature`, and a `forward` that is in the way."""

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM


class SmallConfig(PretrainedConfig):
    model_type = "NVLM_D"
    sub_configs = {"llm_config": Qwen2Config}  # noqa: RUF012

    def __init__(self, llm_config=None, **kwargs):
        self.llm_config = (
            llm_config if isinstance(llm_config, Qwen2Config) else Qwen2Config(**llm_config or {})
        )
        super().__init__(**kwargs)


class Tower(nn.Module):
    def __init__(self, width, patch):
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        self.mix = nn.Linear(width, width)

    def forward(self, pixels):
        return torch.tanh(self.mix(self.embed(pixels).permute(0, 2, 3, 1)))


class SmallModel(PreTrainedModel):
    config_class = SmallConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        wide = config.llm_config.hidden_size
        self.vision_model = Tower(16, config.patch_size)
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(64), nn.Linear(64, wide), nn.GELU(), nn.Linear(wide, wide)
        )
        self.language_model = Qwen2ForCausalLM(config.llm_config)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            nn.init.normal_(module.weight, std=0.2)

    def extract_feature(self, pixel_values):
        cells = self.vision_model(pixel_values)
        tiles, rows, columns, width = cells.shape
        cells = cells.view(tiles, rows // 2, 2, columns // 2, 2, width).transpose(2, 3)
        return self.mlp1(cells.reshape(tiles, -1, 4 * width))

    def forward(self, pixel_values, input_ids, attention_mask, image_flags, labels=None):
        raise RuntimeError("wants flags of images and a process group")
