"""Answers of every family: the same in a batch, padded on the left, as one by one."""

from __future__ import annotations

import pytest
from made import experiment

from raytune_vlm.evaluate.generate import generate
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
