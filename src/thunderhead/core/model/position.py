"""How the order of tokens enters the model. Tables are computed in the forward pass: no buffers to shard or round.

Shape letters: B sequences, T tokens a sequence, D model dimensions, H query heads, R rotated dimensions of a head.
"""

import math
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from thunderhead.core.model.norm import at_least_float32
from thunderhead.core.types import PositiveFloat, PositiveInt


class Position(nn.Module):
    """The interface. Each kind overrides what it needs; as it stands, it adds nothing."""

    def __init__(self, d_model: int, n_heads: int, context_length: int, rotary_dim: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.n_heads = n_heads
        self.context_length = context_length
        self.rotary_dim = rotary_dim

    def embed(self, x_BTD: Tensor, position_ids: Tensor) -> Tensor:
        """Add positions, (B or 1, T), to the token embeddings (B, T, D)."""
        return x_BTD

    def rotation(self, position_ids: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor] | None:
        """Cos and sin for queries and keys, each (B or 1, T, R) in dtype, or None. See `rotate`."""
        return None

    def slopes(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """Slopes (H), or None: score(query, key) gets − slope · (distance in tokens) added."""
        return None


class NoPosition(Position):
    """No position information but the causal mask's (NoPE, Kazemnejad et al. 2305.19466)."""


class RotaryPosition(Position):
    """Queries and keys are rotated by angles that grow with position (RoPE, Su et al. 2104.09864).

    - theta: the base of the wavelengths; 10,000 at short context (RoFormer), 500,000 at long (Llama 3).
    - fraction: the share of the rotary dimensions that is rotated, the first ones of each head (Pythia: 0.25).
    - scaling: how to read positions beyond those trained on. All need `factor` = longer / original context, at least 1.
      "linear": positions / factor (Chen et al. 2306.15595).
      "ntk": theta · factor^(R / (R − 2)), which leaves high frequencies alone (NTK-aware, bloc97; used in 2309.00071).
      "llama3": frequencies / factor where the wavelength is above original_context_length / low_freq_factor, unchanged
      below original_context_length / high_freq_factor, interpolated between (Llama 3.1's reference code).
    - low_freq_factor, high_freq_factor, original_context_length: "llama3" only; None = 1, 4 and 8,192, as in Llama 3.1.

    Raises ValueError for a factor without scaling or the reverse, for llama3's settings with another scaling, and if
    the rotated dimensions are not a positive even number.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        context_length: int,
        rotary_dim: int,
        *,
        theta: PositiveFloat = 10_000.0,
        fraction: Annotated[float, Gt(0), Le(1)] = 1.0,
        scaling: Literal["none", "linear", "ntk", "llama3"] = "none",
        factor: Annotated[float, Ge(1)] | None = None,
        low_freq_factor: PositiveFloat | None = None,
        high_freq_factor: PositiveFloat | None = None,
        original_context_length: PositiveInt | None = None,
    ) -> None:
        super().__init__(d_model, n_heads, context_length, rotary_dim)
        self.theta = theta
        self.scaling = scaling
        self.factor = factor
        self.rotated_dim = int(rotary_dim * fraction)
        if (rotary_dim and self.rotated_dim < 2) or self.rotated_dim % 2:
            raise ValueError(
                f"position=rope rotates pairs of dimensions: {rotary_dim} rotary dimensions a head × position.fraction="
                f"{fraction:g} gives {self.rotated_dim}, which must be a positive even number"
            )
        if scaling == "none" and factor is not None:
            raise ValueError(f"position.factor={factor:g} changes nothing with position.scaling=none: set both or none")
        if scaling != "none" and factor is None:
            raise ValueError(f"position.scaling={scaling} needs position.factor (longer context / original context)")
        if scaling == "ntk" and self.rotated_dim == 2:
            raise ValueError("position.scaling=ntk needs more than 2 rotated dimensions a head")
        llama3 = {
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_context_length": original_context_length,
        }
        if scaling != "llama3" and (given := [name for name, value in llama3.items() if value is not None]):
            raise ValueError(f"position.{given[0]} is for position.scaling=llama3 only, not {scaling}")
        self.low_freq_factor = 1.0 if low_freq_factor is None else low_freq_factor
        self.high_freq_factor = 4.0 if high_freq_factor is None else high_freq_factor
        self.original_context_length = original_context_length or 8192
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"position.low_freq_factor={self.low_freq_factor:g} must be below "
                f"position.high_freq_factor={self.high_freq_factor:g}"
            )

    def frequencies(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """Angle a token of each rotated pair, (R/2), after scaling."""
        theta = self.theta
        if self.scaling == "ntk" and self.factor is not None:
            theta *= self.factor ** (self.rotated_dim / (self.rotated_dim - 2))
        frequencies = geometric_frequencies(theta, self.rotated_dim, device, dtype)
        if self.factor is None or self.scaling == "ntk":
            return frequencies
        if self.scaling == "linear":
            return frequencies / self.factor
        turns = self.original_context_length * frequencies / (2 * math.pi)  # full turns within the original context
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor

    def rotation(self, position_ids: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Cos and sin of the angles, the R/2 of them twice over: dimension i is paired with i + R/2."""
        angles = position_ids[..., None] * self.frequencies(position_ids.device, dtype)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def rotate(x_BHTE: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first R dimensions of each head, in float32 at least, by the last T rows of the tables.

    The pairs are (i, i + R/2), the layout of Hugging Face's models, not (2i, 2i + 1) as in the RoFormer paper: the same
    up to the order of rows of the projections.
    """
    cos, sin = (table[:, None, -x_BHTE.shape[2] :] for table in rotation)  # (B or 1, 1, T, R)
    n_rotated = cos.shape[-1]
    x = at_least_float32(x_BHTE[..., :n_rotated])
    first, second = x.chunk(2, dim=-1)
    rotated = (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x_BHTE.dtype)
    return rotated if n_rotated == x_BHTE.shape[-1] else torch.cat((rotated, x_BHTE[..., n_rotated:]), dim=-1)


def geometric_frequencies(base: float, n_dims: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """base^(−2i / n_dims) for i in 0 … n_dims/2 − 1."""
    exponents = torch.arange(0, n_dims, 2, device=device, dtype=dtype) / n_dims
    return 1.0 / base**exponents
