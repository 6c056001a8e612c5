"""A fitted scaling law: `thunderhead.lab.scaling` fits it, reports write it to a law.json, and budgets read it there.

It lies beside the rings, because options and the lab both know it and neither knows the other.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pydantic

from thunderhead.core.config import first_fault
from thunderhead.core.types import Count, NonNegativeFloat, PositiveFloat

Number = TypeVar("Number", float, npt.NDArray[np.float64])


class Optimum(NamedTuple):
    """The lowest loss that a law allows for a compute budget."""

    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta in nats a token (Hoffmann et al. 2203.15556, section 3.3).

    Training FLOPs a token are flops_coefficient · N^flops_exponent: 6 and 1 are the usual approximation, which leaves
    attention out; small models are far from it. `parameters`, `tokens`, `flops` are the smallest and the largest N, D
    and training compute that it was fitted on; `count` says which parameters N counts.
    """

    count: Count
    E: NonNegativeFloat
    A: PositiveFloat
    B: PositiveFloat
    alpha: PositiveFloat
    beta: PositiveFloat
    flops_coefficient: PositiveFloat
    flops_exponent: PositiveFloat
    parameters: tuple[float, float]
    tokens: tuple[float, float]
    flops: tuple[float, float]

    def loss(self, parameters: Number, tokens: Number) -> Number:
        loss: Number = self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta
        return loss

    def flops_of(self, parameters: float, tokens: float) -> float:
        return float(self.flops_coefficient * parameters**self.flops_exponent * tokens)

    @property
    def exponents(self) -> tuple[float, float]:
        """Of the optimum at a budget C, a and b: N ∝ C^a, D ∝ C^b."""
        total = self.alpha + self.flops_exponent * self.beta
        return self.beta / total, self.alpha / total

    # With D = C / (k N^p), dL/dN = 0 where α A N^-α = p β B D^-β.

    def optimum(self, flops: float) -> Optimum:
        """The N and D with the lowest loss that a training budget allows."""
        ratio = self.alpha * self.A / (self.flops_exponent * self.beta * self.B)
        parameters = (ratio * (flops / self.flops_coefficient) ** self.beta) ** (self.exponents[0] / self.beta)
        tokens = flops / (self.flops_coefficient * parameters**self.flops_exponent)
        return Optimum(parameters, tokens, self.loss(parameters, tokens))

    def optimal_tokens(self, parameters: float) -> float:
        """Return the D for which a model of N parameters is the best use of its training compute."""
        ratio = self.flops_exponent * self.beta * self.B / (self.alpha * self.A)
        return float((ratio * parameters**self.alpha) ** (1 / self.beta))

    def extrapolation(self, **quantities: float) -> str:
        """Say how far `parameters`, `tokens` or `flops` lie outside of what was fitted, by more than a tenth; or ""."""
        parts = []
        for name, value in quantities.items():
            low, high = getattr(self, name)
            if value > 1.1 * high:
                parts.append(f"{value / high:.3g} × the most {name}")
            elif value < low / 1.1:
                parts.append(f"{value / low:.2g} × the fewest {name}")
        return f"an extrapolation: {' and '.join(parts)} that the law was fitted on" if parts else ""


class _File(pydantic.BaseModel):
    """What of a law.json is read back; the rest is for people."""

    law: Law


def read_law(path: str | Path) -> Law:
    """Read the law in a law.json; ValueError if there is none."""
    try:
        return _File.model_validate_json(Path(path).read_bytes()).law
    except OSError as error:
        made = "experiment=scaling_law or compare.py scaling=total"
        raise ValueError(f"{path} cannot be read ({error.strerror}): give a law.json, which {made} makes") from error
    except pydantic.ValidationError as error:
        raise ValueError(f"{path} is no fitted law: {first_fault(error)}") from error
