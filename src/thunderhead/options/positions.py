"""Further options of the group `position`: scaled rotation, vectors that are added to the embeddings, and ALiBi.

Shape letters: B sequences, T tokens a sequence, D model dimensions, H query heads.
"""

import math
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from thunderhead.core.model.position import Position, RotaryPosition, geometric_frequencies
from thunderhead.core.types import PositiveFloat, PositiveInt


class ScaledRotaryPosition(RotaryPosition):
    """Rotary positions that can be read beyond those trained on.

    - theta, fraction: see `RotaryPosition`.
    - scaling: "none", or, with `factor` = longer / original context, at least 1:
      "linear": positions / factor (Chen et al. 2306.15595).
      "ntk": theta · factor^(R / (R − 2)), which leaves high frequencies alone (NTK-aware, bloc97; used in 2309.00071).
      "llama3": frequencies / factor where the wavelength is above original_context_length / low_freq_factor, unchanged
      below original_context_length / high_freq_factor, interpolated between (Llama 3.1's reference code).
    - low_freq_factor, high_freq_factor, original_context_length: "llama3" only; None = 1, 4 and 8,192, as in Llama 3.1.

    Raises ValueError for settings that the scaling has no use for or lacks, and as `RotaryPosition` does.
    """

    def __init__(
        self,
        rotary_dim: int,
        *,
        theta: PositiveFloat = 10_000.0,
        fraction: Annotated[float, Gt(0), Le(1)] = 1.0,
        scaling: Literal["none", "linear", "ntk", "llama3"] = "none",
        factor: Annotated[float, Ge(1), Le(1e6)] | None = None,
        low_freq_factor: PositiveFloat | None = None,
        high_freq_factor: PositiveFloat | None = None,
        original_context_length: PositiveInt | None = None,
    ) -> None:
        super().__init__(rotary_dim, theta=theta, fraction=fraction)
        self.scaling = scaling
        if scaling == "none" and factor is not None:
            raise ValueError(f"position.factor={factor:g} changes nothing with position.scaling=none: set both or none")
        if scaling != "none" and factor is None:
            raise ValueError(f"position.scaling={scaling} needs position.factor (longer context / original context)")
        if scaling == "ntk" and self.rotated_dim == 2:
            raise ValueError("position.scaling=ntk needs more than 2 rotated dimensions a head")
        if scaling != "llama3" and (low_freq_factor or high_freq_factor or original_context_length):
            llama3 = "position.low_freq_factor, high_freq_factor and original_context_length"
            raise ValueError(f"{llama3} are for position.scaling=llama3 only, not {scaling}")
        self.factor = factor or 1.0
        self.low_freq_factor, self.high_freq_factor = low_freq_factor or 1.0, high_freq_factor or 4.0
        self.original_context_length = original_context_length or 8192
        if self.low_freq_factor >= self.high_freq_factor:
            limits = f"position.low_freq_factor={self.low_freq_factor:g} must be below position.high_freq_factor"
            raise ValueError(f"{limits}={self.high_freq_factor:g}")

    def frequencies(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """Angle a token of each rotated pair, (R/2), after scaling."""
        if self.scaling == "ntk":
            theta = self.theta * self.factor ** (self.rotated_dim / (self.rotated_dim - 2))
            return geometric_frequencies(theta, self.rotated_dim, device, dtype)
        frequencies = super().frequencies(device, dtype)
        if self.scaling == "linear":
            return frequencies / self.factor
        if self.scaling == "none":
            return frequencies
        turns = self.original_context_length * frequencies / (2 * math.pi)  # full turns within the original context
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


class LearnedPosition(Position):
    """A learned vector for each of `context_length` positions, added to the embeddings (GPT-2)."""

    def __init__(self, d_model: int, context_length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(context_length, d_model)

    def embed(self, x_BTD: Tensor, position_ids: Tensor) -> Tensor:
        embedded: Tensor = self.embedding(position_ids)
        return x_BTD + embedded


class SinusoidalPosition(Position):
    """Sines (even dimensions) and cosines (odd) of geometric frequencies, added (Vaswani et al. 1706.03762, 3.5).

    - base: the longest wavelength is 2π · base.
    - scale_embedding: multiply the token embeddings by sqrt(d_model) first, as the paper does (3.4); without, the
      sinusoids (root mean square 0.7) drown embeddings of standard deviation 0.02 at the start.

    Raises ValueError if d_model is odd.
    """

    def __init__(self, d_model: int, *, base: PositiveFloat = 10_000.0, scale_embedding: bool = True) -> None:
        super().__init__()
        if d_model % 2:
            raise ValueError(f"position=sinusoidal pairs dimensions: model.d_model={d_model} must be even")
        self.d_model, self.base = d_model, base
        self.embedding_scale = math.sqrt(d_model) if scale_embedding else 1.0

    def follow_base(self, base: "SinusoidalPosition") -> None:
        """Maximal update parametrization: embeddings enter the model at one size, whatever the width."""
        self.embedding_scale = base.embedding_scale

    def embed(self, x_BTD: Tensor, position_ids: Tensor) -> Tensor:
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        angles = position_ids[..., None] * geometric_frequencies(self.base, self.d_model, position_ids.device, dtype)
        table_BTD = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)
        return x_BTD * self.embedding_scale + table_BTD.to(x_BTD.dtype)


class AlibiPosition(Position):
    """Scores fall linearly with distance, each head with its own slope (Press et al. 2108.12409).

    n heads: slopes 2^(−8/n), 2^(−16/n), …; when n is no power of two, those of the power of two below it, followed by
    every other slope of the power of two above it (the authors' code, `get_slopes`).
    """

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def slopes(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        def geometric(n: int) -> list[float]:
            return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

        below = 2 ** int(math.log2(self.n_heads))
        values = geometric(below) + geometric(2 * below)[::2][: self.n_heads - below]
        return torch.tensor(values, dtype=dtype, device=device)
