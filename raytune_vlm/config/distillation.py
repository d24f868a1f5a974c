"""`train.distillation`: a teacher model whose distribution over the next token is a second target.

Hinton, Vinyals and Dean 2015, Distilling the knowledge in a neural network (arXiv 1503.02531).
"""

from pydantic import Field, model_validator

from raytune_vlm.config.section import Section


class DistillationConfig(Section):
    """What is minimised with a teacher, per labelled token, its logits and the student's over the
    temperature T: (1 - weight) * cross-entropy + weight * T^2 * KL(teacher || student)."""

    teacher: str | None = None
    """The teacher: what `model.name` takes, of the same family, with the same tokenizer and image
    processor, loaded once an executor in the same `dtype`. It may be the student's own base, with
    an `adapter`. None: labels alone."""
    revision: str | None = None
    """Commit or tag of the teacher on the hub; None takes the default branch."""
    adapter: str | None = None
    """Folder of an adapter in PEFT's format that the teacher has on."""
    weight: float = Field(default=0.5, ge=0, le=1)
    """Share of the teacher; 1: no labels. 0, of use in a search: a trial as without a teacher."""
    temperature: float = Field(default=1.0, gt=0, le=100)
    """Both logits are divided by it before they are compared; above 1, what the teacher thinks of
    unlikely tokens counts for more."""
    chunk_tokens: int = Field(default=256, ge=1)
    """Labelled tokens whose logits over the vocabulary are in memory at one time, the teacher's and
    the student's; results do not depend on it."""

    @model_validator(mode="after")
    def _has_a_teacher(self) -> "DistillationConfig":
        changed = self.model_dump(exclude_defaults=True)
        if self.teacher is None and changed:
            key, value = next(iter(changed.items()))
            raise ValueError(f"{key}={value} has no effect without distillation.teacher")
        return self

    @property
    def is_on(self) -> bool:
        """Whether a teacher is asked at all."""
        return self.teacher is not None and self.weight > 0
