"""Annotations that signatures share; `thunderhead.core.config` checks configured values against them with pydantic."""

from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf
from pydantic import AfterValidator

PositiveInt = Annotated[int, Gt(0), Lt(2**63)]  # torch counts in 64 bits
NonNegativeInt = Annotated[int, Ge(0), Lt(2**63)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
WholeNumber = Annotated[float, Gt(0), MultipleOf(1)]
"""A number that may be written as 2e9."""
Probability = Annotated[float, Ge(0), Lt(1)]
"""A dropout probability: 1 would erase everything."""
Fraction = Annotated[float, Ge(0), Le(1)]

PathText = Annotated[str, MinLen(1)]
"""A path or a URL; an unset variable of the shell (`data.path=$TEXT`) is none, though Python takes it for `.`."""


def _inside(name: str) -> str:
    if any(part in ("", ".", "..") for part in name.replace("\\", "/").split("/")):
        raise ValueError("must name a folder inside of logs/: letters, not '..' or a path that begins with '/'")
    return name


FolderName = Annotated[str, AfterValidator(_inside)]
"""What becomes part of a path below logs/."""

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
