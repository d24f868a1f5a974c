"""A stand-in with LLaVA-OneVision-1.5's module names, which Qwen2.5-VL shares."""

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration


class SmallConfig(Qwen2_5_VLConfig):
    model_type = "llavaonevision1_5"


class SmallModel(Qwen2_5_VLForConditionalGeneration):
    config_class = SmallConfig
