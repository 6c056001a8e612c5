"""The feed-forward branch of a block, ungated and gated.

Shape letters: B sequences, T tokens a sequence, D model dimensions, F hidden dimensions.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from thunderhead.core.model.division import Division, refuse_uneven
from thunderhead.core.model.init import ResidualProjection
from thunderhead.core.types import PositiveFloat, PositiveInt


class FeedForward(nn.Module):
    """Two linear layers with a nonlinearity between: down(f(up(x))).

    - d_ff: the hidden size (model.d_ff); None = hidden_ratio · d_model.
    - activation: "relu" (Vaswani et al. 2017), "gelu" (1606.08415), "silu" (Swish, 1710.05941) or "relu2" (squared
      ReLU, Primer, 2109.08668).
    - beta: of Swish(x) = x · sigmoid(beta · x); "silu" only.
    - approximate: of "gelu": "none" (erf) or "tanh" (GPT-2's; Hugging Face calls it gelu_new).
    - hidden_ratio: None = 4.

    Raises ValueError if both d_ff and hidden_ratio are given, and for beta or approximate with another activation.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int | None,
        bias: bool,
        *,
        activation: Literal["relu", "gelu", "silu", "relu2"],
        beta: PositiveFloat = 1.0,
        approximate: Literal["none", "tanh"] = "none",
        hidden_ratio: Annotated[float, Gt(0), Le(1e4)] | None = None,
    ) -> None:
        super().__init__()
        self.function = _nonlinearity("activation", activation, beta, approximate)
        _refuse_ignored(d_ff, hidden_ratio=hidden_ratio)
        hidden = d_ff or round((hidden_ratio or 4) * d_model)
        self.up_proj = nn.Linear(d_model, hidden, bias=bias)
        self.down_proj = ResidualProjection(hidden, d_model, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD: Tensor = self.down_proj(self.function(self.up_proj(x_BTD)))
        return y_BTD

    def tensor_parallel_plan(self, n_ranks: int) -> dict[str, Division]:
        """Each rank has 1/n_ranks of the hidden dimensions."""
        refuse_uneven("model.d_ff", self.up_proj.out_features, n_ranks)
        return {"up_proj": "columns", "down_proj": "rows"}


class GatedFeedForward(nn.Module):
    """A gated linear unit: down(f(gate(x)) · up(x)) (Shazeer 2002.05202): SwiGLU, GEGLU and ReGLU by `gate`.

    - gate: "silu" (SwiGLU), "gelu" (GEGLU) or "relu" (ReGLU).
    - d_ff, beta, approximate: as of `FeedForward`, but None is rounded up to `multiple_of`.
    - hidden_ratio: None = 8/3, so that three matrices have as many parameters as the two of an ungated 4 · d_model.
    - multiple_of: None = 8 (alignment of tensor cores; under 1 % more parameters from d_model = 256 on). Llama: 256.

    Raises ValueError if d_ff and hidden_ratio or multiple_of are given, and for beta or approximate with another gate.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int | None,
        bias: bool,
        *,
        gate: Literal["silu", "gelu", "relu"],
        beta: PositiveFloat = 1.0,
        approximate: Literal["none", "tanh"] = "none",
        hidden_ratio: Annotated[float, Gt(0), Le(1e4)] | None = None,
        multiple_of: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        self.function = _nonlinearity("gate", gate, beta, approximate)
        _refuse_ignored(d_ff, hidden_ratio=hidden_ratio, multiple_of=multiple_of)
        unit = multiple_of or 8
        # round(): 8/3 of a multiple of three may land just above the whole number in floating point
        hidden = d_ff or math.ceil(round((hidden_ratio or 8 / 3) * d_model, 6) / unit) * unit
        self.gate_proj = nn.Linear(d_model, hidden, bias=bias)
        self.up_proj = nn.Linear(d_model, hidden, bias=bias)
        self.down_proj = ResidualProjection(hidden, d_model, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD: Tensor = self.down_proj(self.function(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return y_BTD

    def tensor_parallel_plan(self, n_ranks: int) -> dict[str, Division]:
        """Each rank has 1/n_ranks of the hidden dimensions."""
        refuse_uneven("model.d_ff", self.up_proj.out_features, n_ranks)
        return {"gate_proj": "columns", "up_proj": "columns", "down_proj": "rows"}


def _refuse_ignored(d_ff: int | None, **settings: float | None) -> None:
    for name, value in settings.items():
        if d_ff is not None and value is not None:
            message = f"fixes the hidden size, activation.{name}={value} would change nothing: give one of them"
            raise ValueError(f"model.d_ff={d_ff} {message}")


def _nonlinearity(kind: str, name: str, beta: float, approximate: str) -> Callable[[Tensor], Tensor]:
    if beta != 1.0 and name != "silu":
        raise ValueError(f"activation.beta={beta:g} is Swish's and needs activation.{kind}=silu, not {name}")
    if approximate != "none" and name != "gelu":
        raise ValueError(f"activation.approximate={approximate} needs activation.{kind}=gelu, not {name}")
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": F.relu,
        "gelu": partial(F.gelu, approximate=approximate),
        "silu": F.silu if beta == 1.0 else partial(_swish, beta=beta),
        "relu2": squared_relu,
    }
    return functions[name]


def _swish(x: Tensor, beta: float) -> Tensor:
    return x * torch.sigmoid(beta * x)


def squared_relu(x: Tensor) -> Tensor:
    """ReLU² (Primer, 2109.08668)."""
    return F.relu(x).square()
