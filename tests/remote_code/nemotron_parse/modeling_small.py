"""A stand-in with Nemotron-Parse's module names: an encoder with a neck, a decoder, a head."""

import torch
from torch import nn
from transformers import GenerationMixin, MBartConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.mbart.modeling_mbart import MBartDecoder


class SmallConfig(PretrainedConfig):
    model_type = "nemotron_parse"
    sub_configs = {"decoder": MBartConfig}  # noqa: RUF012

    def __init__(self, decoder=None, is_encoder_decoder=True, **kwargs):
        self.decoder = decoder if isinstance(decoder, MBartConfig) else MBartConfig(**decoder or {})
        super().__init__(is_encoder_decoder=is_encoder_decoder, **kwargs)


class Encoder(nn.Module):
    main_input_name = "pixel_values"

    def __init__(self, wide):
        super().__init__()
        self.model_encoder = nn.Sequential(nn.Conv2d(3, 16, 8, stride=8), nn.Flatten(2))
        self.model_encoder.append(nn.Linear(64, 64))
        self.conv1 = nn.Conv1d(16, wide, 1)
        self.sum_proj = nn.Linear(16, wide)

    def forward(self, pixel_values, **_):
        cells = torch.tanh(self.model_encoder(pixel_values))
        summary = self.sum_proj(cells.mean(-1)).unsqueeze(1)
        states = torch.cat([self.conv1(cells).transpose(1, 2), summary], dim=1)
        return BaseModelOutput(last_hidden_state=states)


class SmallModel(PreTrainedModel, GenerationMixin):
    config_class = SmallConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.encoder = Encoder(config.decoder.d_model)
        self.decoder = MBartDecoder(config.decoder)
        self.lm_head = nn.Linear(config.decoder.d_model, config.decoder.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv1d | nn.Embedding):
            nn.init.normal_(module.weight, std=0.2)

    def get_encoder(self, modality=None):
        return self.encoder

    def get_decoder(self):
        return self.decoder

    def get_input_embeddings(self):
        return self.decoder.embed_tokens

    def forward(
        self,
        pixel_values=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        encoder_outputs=None,
        past_key_values=None,
        use_cache=None,
        **_,
    ):
        if encoder_outputs is None:
            encoder_outputs = self.encoder(pixel_values)
        made = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs[0],
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        return Seq2SeqLMOutput(
            logits=self.lm_head(made.last_hidden_state), past_key_values=made.past_key_values
        )
