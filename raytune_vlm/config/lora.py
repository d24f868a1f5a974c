"""`lora`: the shape of the adapter and where it goes."""

from pydantic import Field, field_validator, model_validator

from raytune_vlm.config.section import Section

SCOPES = ("text", "projector", "vision")


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021) on the linear layers of the chosen scopes."""

    rank: int = Field(default=16, ge=1, le=4096)
    """Inner dimension of the adapters."""
    alpha: float | None = Field(default=None, gt=0)
    """Scale numerator: updates are multiplied by alpha / rank. None: `alpha_ratio` x rank."""
    alpha_ratio: float = Field(default=2.0, gt=0)
    """Alpha as a multiple of the rank, used when `alpha` is None; keeps the scale rank-free."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an input of the adapter while training."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (Kalajdzievski 2023)."""
    dora: bool = False
    """Decompose weights into magnitude and direction (Liu et al. 2024)."""
    scope: str = "text"
    """Parts of the model that get adapters: `text`, `projector`, `vision`, joined by `+`."""

    @field_validator("scope")
    @classmethod
    def _known_scopes(cls, value: str) -> str:
        parts = value.split("+")
        unknown = [part for part in parts if part not in SCOPES]
        if unknown or len(set(parts)) != len(parts):
            raise ValueError(
                f"{value!r} must be distinct names of {', '.join(SCOPES)} joined by '+'"
            )
        return "+".join(scope for scope in SCOPES if scope in parts)

    @model_validator(mode="after")
    def _one_alpha(self) -> "LoraConfig":
        default = type(self).model_fields["alpha_ratio"].default
        if self.alpha is not None and self.alpha_ratio != default:
            raise ValueError(
                f"alpha={self.alpha} and alpha_ratio={self.alpha_ratio} exclude each other: "
                "alpha_ratio is only used when alpha is unset"
            )
        return self

    @property
    def scopes(self) -> tuple[str, ...]:
        """The scopes as a tuple, in the fixed order text, projector, vision."""
        return tuple(self.scope.split("+"))

    @property
    def scale_alpha(self) -> float:
        """The absolute alpha that PEFT wants."""
        return self.alpha if self.alpha is not None else self.alpha_ratio * self.rank
