"""The base of every config section: strict, frozen, documented by docstrings under its fields."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A mapping of the experiment file. Unknown keys are errors, values do not change once read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
