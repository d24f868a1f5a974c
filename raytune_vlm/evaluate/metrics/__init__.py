"""The table of metrics. A variant is named `<metric>@<rules>`: other rules are another metric.

To add one: a pure function in a file of its family, `(prediction, answer) -> SampleScore`, or one
that takes the whole `Reference` (see `Metric`); a line here; its direction in
`raytune_vlm.config.evaluation.METRIC_MODES`; a row in `docs/metrics.md`. `tests/test_metrics.py`
then puts it through the conformance tests.
"""

from functools import partial

from raytune_vlm.evaluate.metrics import (
    anls,
    anls_star,
    caption,
    chart,
    choice,
    json_fields,
    mathvista,
    medical,
    mmmu,
    ocrbench,
    text,
    vqa,
)
from raytune_vlm.evaluate.metrics.base import Metric, SampleScore
from raytune_vlm.evaluate.metrics.cord import field_f1, tree_edit_accuracy

_ALL = (
    Metric("nted@donut", "max", tree_edit_accuracy),
    Metric("field_f1@donut", "max", field_f1),
    Metric("exact_match@strip", "max", text.exact_match),
    Metric("exact_match@squad", "max", judge=text.squad_exact_match),
    Metric("token_f1@squad", "max", judge=text.squad_token_f1),
    Metric("cer@micro", "min", text.character_error_rate),
    Metric("wer@micro", "min", text.word_error_rate),
    Metric("vqa@official", "max", judge=vqa.official),
    Metric("vqa@always_normalise", "max", judge=vqa.always_normalise),
    Metric("vqa@m4c", "max", judge=vqa.m4c),
    Metric("vqa@min_k_over_3", "max", judge=vqa.min_k_over_3),
    Metric("anls@rrc", "max", anls.rrc),
    Metric("anls@strict", "max", anls.strict),
    Metric("anls_star@json", "max", judge=anls_star.anls_star_json),
    Metric("anls_star@tags", "max", judge=anls_star.anls_star_tags),
    Metric("relaxed_accuracy@pix2struct", "max", chart.relaxed_accuracy),
    Metric("ocrbench@official", "max", judge=ocrbench.contains, groups=ocrbench.GROUPS),
    Metric("choice@letter", "max", judge=choice.letter_accuracy),
    Metric("choice@vlmevalkit", "max", judge=choice.vlmevalkit_accuracy),
    Metric("ai2d@lmms_eval", "max", judge=choice.ai2d),
    Metric("realworldqa@lmms_eval", "max", judge=choice.realworldqa),
    Metric("mmmu@official", "max", judge=mmmu.mmmu, groups=mmmu.GROUPS),
    Metric("mathvista@rules", "max", judge=mathvista.mathvista),
    Metric("mathvista@judge", "max", judge=mathvista.judged, needs_extraction=True),
    Metric("medical_open@llava_med_recall", "max", judge=medical.open_recall),
    Metric("medical_open@llava_med_f1", "max", judge=medical.open_f1),
    Metric("medical_closed@llava_med", "max", judge=medical.closed_contains),
    Metric("medical_closed@exact", "max", judge=medical.closed_equals),
    Metric("cider@coco", "max", judge_corpus=caption.cider),
    *(
        Metric(
            f"bleu{n}@coco",
            "max",
            judge=partial(caption.bleu, order=n),
            combine=caption.combine_bleu(n),
        )
        for n in range(1, caption.ORDERS + 1)
    ),
    Metric("rouge_l@coco", "max", judge=caption.rouge_l),
    Metric("json_valid@strict", "max", json_fields.is_valid),
    Metric("field_accuracy@json", "max", json_fields.field_accuracy),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}

__all__ = ["METRICS", "Metric", "SampleScore"]
