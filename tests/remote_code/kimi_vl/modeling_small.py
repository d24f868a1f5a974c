"""A stand-in with Kimi-VL's module names and inputs: patches, groups of four, a language model."""

import torch
from torch import nn
from transformers import GenerationMixin, LlamaForCausalLM, PreTrainedModel

from .configuration_small import SmallConfig


class Tower(nn.Module):
    def __init__(self, width, patch):
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        self.mix = nn.Linear(width, width)

    def forward(self, pixels, grids):
        patches = torch.tanh(self.mix(self.embed(pixels).flatten(1)))
        groups = []
        for part, (rows, columns) in zip(
            patches.split([r * c for r, c in grids.tolist()]), grids.tolist(), strict=True
        ):
            cells = part.view(rows // 2, 2, columns // 2, 2, -1).permute(0, 2, 1, 3, 4)
            groups.append(cells.flatten(2).flatten(0, 1))
        return torch.cat(groups)


class Projector(nn.Module):
    def __init__(self, width, wide):
        super().__init__()
        self.linear_1 = nn.Linear(4 * width, wide)
        self.linear_2 = nn.Linear(wide, wide)

    def forward(self, groups):
        return self.linear_2(torch.tanh(self.linear_1(groups)))


class SmallModel(PreTrainedModel, GenerationMixin):
    config_class = SmallConfig
    _no_split_modules = ["Tower"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.vision_tower = Tower(config.width, config.patch)
        self.multi_modal_projector = Projector(config.width, config.text_config.hidden_size)
        self.language_model = LlamaForCausalLM(config.text_config)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            nn.init.normal_(module.weight, std=0.2)

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def forward(self, input_ids=None, pixel_values=None, image_grid_hws=None, **more):
        embeds = self.get_input_embeddings()(input_ids)
        there = (input_ids == self.config.media_token_id).unsqueeze(-1).expand_as(embeds)
        if pixel_values is not None and there.any():
            found = self.multi_modal_projector(self.vision_tower(pixel_values, image_grid_hws))
            embeds = embeds.masked_scatter(there, found)
        return self.language_model(inputs_embeds=embeds, **more)
