"""What a key of the search space is drawn from, and where it is searched at all."""

import itertools
import math
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raytune_vlm.config.section import Section
from raytune_vlm.errors import did_you_mean

Scalar = bool | int | float | str


Condition = Scalar | tuple[Scalar, ...]


class _Distribution(Section):
    when: dict[str, Condition] = Field(default_factory=dict)
    """Searched only where other keys of the search space have these values: dotted key -> value or
    list of values. Elsewhere the key keeps the experiment's own value."""

    def is_active(self, recipe: Mapping[str, Any]) -> bool:
        """Whether the conditions hold in a recipe, which lacks the keys that are not active."""
        return all(key in recipe and recipe[key] in values_of(c) for key, c in self.when.items())


def values_of(condition: Condition) -> tuple[Scalar, ...]:
    """The values that a condition allows."""
    return condition if isinstance(condition, tuple) else (condition,)


class Choice(_Distribution):
    """One of the listed values."""

    type: Literal["choice"]
    values: tuple[Scalar, ...] = Field(min_length=1)
    """The values, each valid for the key on its own."""

    @model_validator(mode="after")
    def _distinct(self) -> "Choice":
        if len(set(self.values)) != len(self.values):  # 4 and 4.0, 1 and true are the same to all
            raise ValueError(f"values must be distinct, got {list(self.values)}")
        return self

    def corners(self) -> list[Scalar]:
        """The values at which the experiment must be valid."""
        return list(self.values)

    def contains(self, value: Any) -> bool:
        """Whether a value can be drawn."""
        return value in self.values

    def describe(self) -> str:
        """The values, for people."""
        return f"one of {list(self.values)}"


class Grid(Choice):
    """Every one of the listed values, for `searcher.type: grid`."""

    type: Literal["grid"]  # type: ignore[assignment]


class _Interval(_Distribution):
    lower: float
    """Smallest value."""
    upper: float
    """Largest value (excluded for `randint`, as in Ray)."""

    @model_validator(mode="after")
    def _ordered(self) -> "_Interval":
        if not self.lower < self.upper:
            raise ValueError(f"lower < upper must hold, got lower={self.lower}, upper={self.upper}")
        return self

    def corners(self) -> list[Scalar]:
        """The end points and a point between, at which the experiment must be valid.

        The one between is no round number, so that a real interval for a whole-number key is found.
        """
        return [self.lower, self.lower + 0.618 * (self.upper - self.lower), self.upper]

    def contains(self, value: Any) -> bool:
        """Whether a value can be drawn."""
        return _is_number(value) and self.lower <= value <= self.upper

    def describe(self) -> str:
        """The interval, for people."""
        return f"from {self.lower} to {self.upper}"


class Uniform(_Interval):
    """A real number, every value equally likely."""

    type: Literal["uniform"]


class LogUniform(_Interval):
    """A positive real number, every order of magnitude equally likely."""

    type: Literal["loguniform"]

    @model_validator(mode="after")
    def _positive(self) -> "LogUniform":
        if self.lower <= 0:
            raise ValueError(f"lower must be above 0 for loguniform, got {self.lower}")
        return self


class QUniform(_Interval):
    """A real number on the grid lower, lower + q, ..., upper."""

    type: Literal["quniform"]
    q: float = Field(gt=0)
    """Distance of the grid's points."""

    @model_validator(mode="after")
    def _whole(self) -> "QUniform":
        steps = (self.upper - self.lower) / self.q
        if not math.isclose(steps, round(steps), abs_tol=1e-9):
            raise ValueError(
                f"upper - lower must be a multiple of q={self.q}, got lower={self.lower}, "
                f"upper={self.upper}"
            )
        return self

    def corners(self) -> list[Scalar]:
        """The end points and the first point after `lower`."""
        return [self.lower, self.lower + self.q, self.upper]

    def contains(self, value: Any) -> bool:
        """Whether a value can be drawn."""
        if not super().contains(value):
            return False
        steps = (value - self.lower) / self.q
        return math.isclose(steps, round(steps), abs_tol=1e-8)

    def describe(self) -> str:
        """The points, for people."""
        return f"{super().describe()} in steps of {self.q}"


class RandInt(_Interval):
    """A whole number from `lower` to `upper` - 1, as in Ray."""

    type: Literal["randint"]
    lower: int
    """Smallest value."""
    upper: int
    """One more than the largest value."""

    def corners(self) -> list[Scalar]:
        """The smallest value, the next one (one of the two is odd) and the largest."""
        return sorted({self.lower, min(self.lower + 1, self.upper - 1), self.upper - 1})

    def contains(self, value: Any) -> bool:
        """Whether a value can be drawn."""
        return isinstance(value, int) and super().contains(value) and value < self.upper

    def describe(self) -> str:
        """The numbers, for people."""
        return f"from {self.lower} to {self.upper - 1}"


Distribution = Annotated[
    Choice | Grid | Uniform | LogUniform | QUniform | RandInt, Field(discriminator="type")
]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


Space = Mapping[str, Distribution]


def ordered(space: Space) -> dict[str, Distribution]:
    """The space with every key after those that its conditions name.

    Raises
    ------
    ValueError
        If a condition names no key of the space, a value that this key never has, or a circle.
    """
    for key, entry in space.items():
        for name, condition in entry.when.items():
            _check_condition(f"search_space.{key}.when.{name}", space, name, condition)
    graph = {key: entry.when.keys() for key, entry in space.items()}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise ValueError(f"search_space: conditions go round in a circle: {circle}") from None
    if not any(entry.when for entry in space.values()):
        order = list(space)
    return {key: space[key] for key in order}


def _check_condition(place: str, space: Space, name: str, condition: Condition) -> None:
    if name not in space:
        raise ValueError(
            f"{place}: {name!r} is not a key of the search space{did_you_mean(name, space)}"
        )
    known = space[name]
    if not isinstance(known, Choice):
        raise ValueError(f"{place}: {name!r} must be of type choice or grid, is {known.type}")
    for value in values_of(condition):
        if value not in known.values:
            raise ValueError(
                f"{place}: {name} is never {value!r}"
                f"{did_you_mean(str(value), map(str, known.values))}"
            )
    if not values_of(condition):
        raise ValueError(f"{place}: the list of values is empty")


def active_keys(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """Of the values of all keys, those of the keys that are active."""
    recipe: dict[str, Any] = {}
    for key, entry in ordered(space).items():
        if key in values and entry.is_active(recipe):
            recipe[key] = values[key]
    return {key: recipe[key] for key in space if key in recipe}


def branches(space: Space) -> Iterator[tuple[dict[str, Scalar], list[str]]]:
    """Every way in which conditions may turn out: values of the keys that they name, and the keys
    that are active then."""
    named = {name for entry in space.values() for name in entry.when}
    for recipe in _combinations({key: space[key] for key in ordered(space) if key in named}):
        others = [key for key in space if key not in named and space[key].is_active(recipe)]
        yield recipe, [*recipe, *others]


def combinations(space: Space) -> list[dict[str, Scalar]]:
    """Every recipe of a space of `grid` and `choice`, the last key changing fastest."""
    found = _combinations(ordered(space))
    return [{key: recipe[key] for key in space if key in recipe} for recipe in found]


def num_combinations(space: Space) -> int:
    """How many recipes `combinations` has, without making them all."""
    found = 0
    for recipe, keys in branches(space):
        found += math.prod(len(space[key].corners()) for key in keys if key not in recipe)
    return found


def _combinations(order: Space) -> list[dict[str, Scalar]]:
    recipes: list[dict[str, Scalar]] = [{}]
    for key, entry in order.items():
        recipes = list(
            itertools.chain.from_iterable(
                [{**recipe, key: value} for value in entry.corners()]
                if entry.is_active(recipe)
                else [recipe]
                for recipe in recipes
            )
        )
    return recipes
