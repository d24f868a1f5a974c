"""Answers of every family: the same in a batch, padded on the left, as one by one."""

from __future__ import annotations

import pytest
from made import experiment

from raytune_vlm.config.data import ImageLimits
from raytune_vlm.evaluate.controls import ControlSkipped, control_prompts
from raytune_vlm.evaluate.generate import generate
from raytune_vlm.models.families import FAMILIES
from raytune_vlm.models.tiny import BUILDERS


@pytest.mark.parametrize("model_type", sorted(BUILDERS))
def test_answers_in_a_batch_are_those_of_the_prompts_alone(model_type, tiny_base, tiny_prompts):
    base, split = tiny_base(model_type), tiny_prompts(model_type)
    answers = []
    for size in (1, 4):
        config = experiment(
            evaluation={"metrics": ["cer@micro"], "max_new_tokens": 8, "batch_size": size}
        ).evaluation
        found = generate(base.model, base, split, [0, 5, 1, 2, 9], config)
        assert [entry.sample_id for entry in found] == ["s0", "s5", "s1", "s2", "s9"]
        answers.append([(entry.text, entry.num_tokens, entry.truncated) for entry in found])
    assert answers[0] == answers[1]
    assert any(tokens for _, tokens, _ in answers[0])


@pytest.mark.parametrize("model_type", sorted(BUILDERS))
def test_every_control_is_answered_or_says_why_not(model_type, tiny_base, tiny_prompts):
    base, split = tiny_base(model_type), tiny_prompts(model_type)
    config = experiment(evaluation={"max_new_tokens": 2, "batch_size": 3}).evaluation
    for control in ("blank_image", "shuffled_image", "text_only"):
        try:
            prompts, rows = control_prompts(
                control, base, split, [0, 6, 1], limits=ImageLimits(), seed=0
            )
        except ControlSkipped as error:
            assert control == "text_only" and FAMILIES[model_type].prompt != "chat"
            assert model_type in error.message
            continue
        found = generate(base.model, base, prompts, rows, config)
        assert [entry.sample_id for entry in found] == ["s0", "s6", "s1"]
        images = 0 if control == "text_only" else 1
        assert prompts.num_images[rows].tolist() == [images] * 3
