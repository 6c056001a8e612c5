"""How much wider a decoder is than a base decoder, parameter by parameter: what muP (2203.03466) starts from.

The comparison is by names and shapes, as in Yang et al.'s package `mup` (`set_base_shapes`), so that it reaches any
module that was ever put into a decoder: grouped heads, low-rank projections, an attention of the user's own.
"""

import math
from typing import Any, NamedTuple

from torch import nn


class Growth(NamedTuple):
    """Of a hidden matrix: its shape, (out, in) as nn.Linear has it, and that of its namesake in the base model."""

    shape: tuple[int, ...]
    base_shape: tuple[int, ...]

    @property
    def fan_in(self) -> float:
        """Inputs of a row, relative to the base model's."""
        return math.prod(self.shape[1:]) / math.prod(self.base_shape[1:])

    @property
    def fan_out(self) -> float:
        """Rows, relative to the base model's."""
        return self.shape[0] / self.base_shape[0]

    @property
    def init_factor(self) -> float:
        """Of the initial standard deviation: 1 / sqrt(fan_in) (Yang et al. 2203.03466, table 8).

        Also where only the input grows, as that of the one key head of multi-query attention. The limit of large width
        asks for 1 / fan_in there, as for an output; at real widths attention fades by it (measured in docs/mup.md).
        """
        return 1 / math.sqrt(self.fan_in)


def growth(model: nn.Module, base: nn.Module) -> dict[str, Growth]:
    """The growth of every hidden matrix of a decoder: of all but vectors, embedding tables and the head.

    Raises:
        ValueError: the two have not the same parameters, or not of the same number of dimensions; names them.
    """
    shapes, base_shapes = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (model, base))
    odd = sorted(shapes.keys() ^ base_shapes.keys()) or sorted(
        name for name, shape in shapes.items() if len(shape) != len(base_shapes[name])
    )
    if odd:
        raise ValueError(
            f"the base model must have the parameters of the model in other sizes, and {', '.join(odd[:3])} "
            f"{'differs' if len(odd) == 1 else 'differ'} otherwise"
        )
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    left_out = tables | {"head.weight"}
    return {
        name: Growth(shape, base_shapes[name])
        for name, shape in shapes.items()
        if len(shape) >= 2 and name not in left_out
    }


def grow_from(model: Any, base: nn.Module) -> None:
    """Scale a decoder as the maximal update parametrization asks for, which makes `base` its base model.

    `model.growth` then tells the scale of the initial weights and, to `learning_rate_transfer.py`, the learning rates;
    and each module that has `follow_base(module of the base model)` is asked to set its multipliers by that.

    Call it before `initialize`. The base model may be on the "meta" device.

    Raises:
        ValueError: the two differ in more than sizes.
    """
    model.growth = growth(model, base)
    modules = dict(base.named_modules())
    for name, module in model.named_modules():
        if callable(follow := getattr(module, "follow_base", None)):
            follow(modules[name])
