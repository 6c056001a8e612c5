"""Annotations that signatures share; `thunderhead.core.config` checks configured values against them with pydantic."""

from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge, Gt, Le, Lt, MultipleOf

PositiveInt = Annotated[int, Gt(0)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
WholeNumber = Annotated[float, Gt(0), MultipleOf(1)]
"""A number that may be written as 2e9."""
Probability = Annotated[float, Ge(0), Lt(1)]
"""A dropout probability: 1 would erase everything."""
Fraction = Annotated[float, Ge(0), Le(1)]

Count = Literal["total", "non_embedding"]


def counted(parameters: dict[str, int], count: Count) -> int:
    """The parameters that are counted: all, or without token and position tables and an untied output head."""
    return parameters["total"] - (
        0 if count == "total" else sum(parameters[part] for part in ("embedding", "position", "head"))
    )


class Problem(NamedTuple):
    """One thing wrong with the configuration: where, and what with the nearest thing that works."""

    path: str
    message: str
