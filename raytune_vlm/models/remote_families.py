"""Families without a class in transformers: their models bring code, which has to be trusted.

See `models/trust.py` for how. The entries are written from published code; nothing of it is here.
None has been run on its real weights: the module names, the processors of `models/processors` and
the way in which they meet the code of a model are tested on small stand-ins (`tests/remote_code`).
Code that was published for transformers 4 may not run under the transformers in use at all.

`kimi_vl` (moonshotai/Kimi-VL)
    Sources: vllm-project/vllm, vllm/model_executor/models/kimi_vl.py (prompt, sizes, tensors);
    NVIDIA-NeMo/Automodel, nemo_automodel/components/models/kimivl/model.py (names in the
    checkpoint). Experts are linear layers, so the scope `text` adapts them too.
    Not verified: that its mixture of experts trains; its chat template.
`NVLM_D` (nvidia/NVLM-D-72B)
    Sources: vllm-project/vllm, vllm/model_executor/models/nvlm_d.py and internvl.py (prompt,
    tiling); the published `NVLM_D_Model` (module names, `extract_feature`, no `GenerationMixin`).
    Not verified: whether its projector's layers have biases, and the system prompt that it was
    tuned with: the chat template of its tokenizer decides.
`llavaonevision1_5` (lmms-lab/LLaVA-OneVision-1.5)
    Source: NVIDIA-NeMo/Automodel, nemo_automodel/components/models/llava_onevision/ (names,
    patches of one frame) and components/datasets/vlm/collate_fns.py (prompt): sizes, patches and
    tokens are Qwen2-VL's.
    Not verified: names under which its own code keeps modules, other than from the conversion of
    its checkpoint.
`nemotron_parse` (nvidia/NVIDIA-Nemotron-Parse)
    Sources: NVIDIA-NeMo/Automodel, nemo_automodel/components/models/nemotron_parse/model.py and
    components/datasets/vlm/collate_fns.py (names, task prompt); vllm-project/vllm,
    vllm/model_executor/models/nemotron_parse.py (sizes, decoder's tokens). Its own configuration
    loads the code of a second repository (nvidia/C-RADIOv2-H) whose revision nothing pins.
    Its own loss weighs coordinates ten times and has extra heads; here all labelled tokens count
    alike and extra heads are not trained.
    Not verified: generation with its own cache; padding on the left, so it is not used.
"""

from __future__ import annotations

from raytune_vlm.models.family import Family, scopes

REMOTE_FAMILIES = (
    Family(
        model_type="kimi_vl",
        scopes=scopes("language_model.", "multi_modal_projector.", "vision_tower."),
        media={"pixel_values": "concatenate", "image_grid_hws": "concatenate"},
        model_class="AutoModelForCausalLM",
        remote_code=True,
        own_processor=True,
    ),
    Family(
        model_type="NVLM_D",
        scopes=scopes("language_model.", "mlp1.", "vision_model."),
        model_class="AutoModel",
        remote_code=True,
        own_processor=True,
    ),
    Family(
        model_type="llavaonevision1_5",
        scopes=scopes("model.language_model.", "model.visual.merger.", "model.visual."),
        media={"pixel_values": "concatenate", "image_grid_thw": "concatenate"},
        channels="patches",
        model_class="AutoModelForCausalLM",
        remote_code=True,
        own_processor=True,
    ),
    Family(
        model_type="nemotron_parse",
        scopes=scopes(
            "decoder.",
            "encoder.conv encoder.sum_proj encoder.layer_norm",
            "encoder.model_encoder.",
        ),
        prompt="image-encoder",
        model_class="AutoModel",
        max_images=1,
        left_padding=False,
        remote_code=True,
        own_processor=True,
        decoder_start=("eos", "bos"),
    ),
)
