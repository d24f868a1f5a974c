"""Tiny Florence-2 and Donut: encoder-decoders without a chat template."""

from __future__ import annotations

from typing import Any

from raytune_vlm.models.tiny.parts import tokenizer


def florence2() -> tuple[Any, Any]:
    """`florence2`."""
    from transformers import (
        BartConfig,
        CLIPImageProcessorPil,
        Florence2Config,
        Florence2ForConditionalGeneration,
        Florence2Processor,
        Florence2VisionConfig,
    )

    tokens = tokenizer(
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False)
    images.image_seq_length = 5
    processor = Florence2Processor(image_processor=images, tokenizer=tokens)
    config = Florence2Config(
        text_config=BartConfig(
            vocab_size=len(tokens),
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            max_position_embeddings=2048,
            dropout=0.0,
            pad_token_id=tokens.pad_token_id,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            decoder_start_token_id=tokens.eos_token_id,
            forced_eos_token_id=tokens.eos_token_id,
        ).to_dict(),
        vision_config=Florence2VisionConfig(
            depths=[1, 1],
            patch_size=[7, 3],
            patch_stride=[8, 4],
            patch_padding=[3, 1],
            patch_prenorm=[False, True],
            embed_dim=[16, 32],
            num_heads=[2, 2],
            num_groups=[2, 2],
            window_size=4,
            projection_dim=64,
            drop_path_rate=0.0,
        ).to_dict(),
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
    )
    return Florence2ForConditionalGeneration(config), processor


def donut() -> tuple[Any, Any]:
    """`vision-encoder-decoder`: Donut."""
    from transformers import (
        DonutImageProcessorPil,
        DonutProcessor,
        DonutSwinConfig,
        MBartConfig,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
    )

    tokens = tokenizer(
        "<s_answer>", "</s_answer>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    encoder = DonutSwinConfig(
        image_size=[64, 64],
        patch_size=4,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
        drop_path_rate=0.0,
    )
    decoder = MBartConfig(
        vocab_size=len(tokens),
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=48,
        max_position_embeddings=2048,
        dropout=0.0,
        is_decoder=True,
        is_encoder_decoder=False,
        add_cross_attention=True,
        pad_token_id=tokens.pad_token_id,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        scale_embedding=True,
        add_final_layer_norm=True,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id = tokens.bos_token_id
    config.pad_token_id = tokens.pad_token_id
    config.eos_token_id = tokens.eos_token_id
    processor = DonutProcessor(
        image_processor=DonutImageProcessorPil(size={"height": 64, "width": 64}), tokenizer=tokens
    )
    return VisionEncoderDecoderModel(config), processor
