"""`lora`: the shape of the adapter and where it goes."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from raytune_vlm.config.section import Section

SCOPES = ("text", "projector", "vision")


class RankByScope(Section):
    """Ranks of single scopes; a scope without one has `lora.rank`."""

    text: int | None = Field(default=None, ge=1, le=4096)
    """Rank of the language model's adapters."""
    projector: int | None = Field(default=None, ge=1, le=4096)
    """Rank of the adapters between vision tower and language model."""
    vision: int | None = Field(default=None, ge=1, le=4096)
    """Rank of the vision tower's adapters."""


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021) on the linear layers of the chosen scopes."""

    rank: int = Field(default=16, ge=1, le=4096)
    """Inner dimension of the adapters."""
    rank_by_scope: RankByScope = RankByScope()
    """Other ranks for single scopes: `rank_by_scope: {vision: 8}`."""
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
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = "default"
    """Where the adapter starts, as PEFT does it: `default` (A uniform, B zero), `gaussian` (A
    normal, B zero), `orthogonal` (even ranks), `pissa` (the weight's largest singular vectors, by
    16 subspace iterations: Meng et al. 2024), `olora` (its QR decomposition: Buyukakyuz 2024). The
    last two are saved with twice the rank, so that they fit the unchanged base model."""
    loraplus_ratio: float = Field(default=1.0, ge=1, le=1024)
    """Learning rate of the B matrices (and of DoRA's magnitudes) as a multiple of that of the A
    matrices (LoRA+, Hayou et al. 2024)."""
    scope: str = "text"
    """Parts of the model that get adapters: `text`, `projector`, `vision`, joined by `+`."""
    modules_to_save: str | None = None
    """Scopes that are trained in full instead, joined by `+`: `projector`. Their copies are trained
    and saved in float32."""

    @field_validator("scope", "modules_to_save")
    @classmethod
    def _known_scopes(cls, value: str | None) -> str | None:
        if value is None:
            return None
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

    @model_validator(mode="after")
    def _full_or_adapted(self) -> "LoraConfig":
        for scope in self.full_scopes:
            if scope in self.scopes:
                raise ValueError(
                    f"modules_to_save={self.modules_to_save} and scope={self.scope} exclude each "
                    f"other: {scope!r} is either trained in full or adapted"
                )
        return self

    @model_validator(mode="after")
    def _init_fits(self) -> "LoraConfig":
        if self.dora and self.init in ("pissa", "olora"):
            raise ValueError(
                f"dora=true and init={self.init} exclude each other: PEFT cannot save that adapter "
                "for the unchanged base model"
            )
        odd = [scope for scope in self.scopes if self.rank_of(scope) % 2]
        if self.init == "orthogonal" and odd:
            raise ValueError(
                f"init=orthogonal needs an even rank, but {odd[0]} has rank {self.rank_of(odd[0])}"
            )
        return self

    @property
    def scopes(self) -> tuple[str, ...]:
        """The scopes with adapters as a tuple, in the fixed order text, projector, vision."""
        return tuple(self.scope.split("+"))

    @property
    def full_scopes(self) -> tuple[str, ...]:
        """The scopes that are trained in full, in the same order."""
        return tuple(self.modules_to_save.split("+")) if self.modules_to_save else ()

    @property
    def leaves_towers(self) -> bool:
        """Whether images have the same features as without the adapter."""
        return {*self.scopes, *self.full_scopes} == {"text"}

    @property
    def reads_weights(self) -> bool:
        """Whether the adapter's start depends on the base's weights."""
        return self.dora or self.init in ("pissa", "olora")

    def rank_of(self, scope: str) -> int:
        """The rank of a scope's adapters."""
        own: int | None = getattr(self.rank_by_scope, scope)
        return self.rank if own is None else own

    def alpha_of(self, scope: str) -> float:
        """The absolute alpha of a scope that PEFT wants."""
        return self.alpha if self.alpha is not None else self.alpha_ratio * self.rank_of(scope)
