"""How the order of tokens enters the model. Tables are computed in the forward pass: no buffers to shard or round.

Shape letters: B sequences, T tokens a sequence, D model dimensions, H query heads, R rotated dimensions of a head.
"""

import math
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

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

    def rotation(self, position_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cos and sin for queries and keys, each (B or 1, T, R) in float32, or None. See `rotate`."""
        return None

    def slopes(self, device: torch.device) -> Tensor | None:
        """Slopes (H) in float32, or None: score(query, key) gets − slope · (distance in tokens) added."""
        return None


class NoPosition(Position):
    """No position information but the causal mask's (NoPE, Kazemnejad et al. 2305.19466)."""


class LearnedPosition(Position):
    """A learned vector for each of `context_length` positions, added to the embeddings (GPT-2)."""

    def __init__(self, d_model: int, n_heads: int, context_length: int, rotary_dim: int) -> None:
        super().__init__(d_model, n_heads, context_length, rotary_dim)
        self.embedding = nn.Embedding(context_length, d_model)

    def embed(self, x_BTD: Tensor, position_ids: Tensor) -> Tensor:
        """Add the learned vectors."""
        embedded: Tensor = self.embedding(position_ids)
        return x_BTD + embedded


class SinusoidalPosition(Position):
    """Sines (even dimensions) and cosines (odd) of geometric frequencies, added (Vaswani et al. 1706.03762, 3.5).

    - base: the longest wavelength is 2π · base.
    - scale_embedding: multiply the token embeddings by sqrt(d_model) first, as the paper does (3.4); without, the
      sinusoids (root mean square 0.7) drown embeddings of standard deviation 0.02 at the start.

    Raises ValueError if d_model is odd.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        context_length: int,
        rotary_dim: int,
        *,
        base: PositiveFloat = 10_000.0,
        scale_embedding: bool = True,
    ) -> None:
        super().__init__(d_model, n_heads, context_length, rotary_dim)
        if d_model % 2:
            raise ValueError(f"position=sinusoidal pairs dimensions: model.d_model={d_model} must be even")
        self.base = base
        self.embedding_scale = math.sqrt(d_model) if scale_embedding else 1.0

    def follow_base(self, base: "SinusoidalPosition") -> None:
        """Maximal update parametrization: embeddings enter the model at one size, whatever the width."""
        self.embedding_scale = base.embedding_scale

    def embed(self, x_BTD: Tensor, position_ids: Tensor) -> Tensor:
        """Add the sinusoids."""
        angles = _angles(position_ids, _frequencies(self.base, self.d_model, position_ids.device))
        table_BTD = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)
        return x_BTD * self.embedding_scale + table_BTD.to(x_BTD.dtype)


class AlibiPosition(Position):
    """Scores fall linearly with distance, each head with its own slope (Press et al. 2108.12409).

    n heads: slopes 2^(−8/n), 2^(−16/n), …; when n is no power of two, those of the power of two below it, followed by
    every other slope of the power of two above it (the authors' code, `get_slopes`).
    """

    def slopes(self, device: torch.device) -> Tensor:
        """The slopes (H)."""

        def geometric(n: int) -> list[float]:
            return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

        below = 2 ** int(math.log2(self.n_heads))
        values = geometric(below) + geometric(2 * below)[::2][: self.n_heads - below]
        return torch.tensor(values, dtype=torch.float32, device=device)


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
        if self.rotated_dim < 2 or self.rotated_dim % 2:
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

    def frequencies(self, device: torch.device) -> Tensor:
        """Angle a token of each rotated pair, (R/2) in float32, after scaling."""
        if self.factor is None:
            return _frequencies(self.theta, self.rotated_dim, device)
        if self.scaling == "ntk":
            theta = self.theta * self.factor ** (self.rotated_dim / (self.rotated_dim - 2))
            return _frequencies(theta, self.rotated_dim, device)
        frequencies = _frequencies(self.theta, self.rotated_dim, device)
        if self.scaling == "linear":
            return frequencies / self.factor
        turns = self.original_context_length * frequencies / (2 * math.pi)  # full turns within the original context
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor

    def rotation(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and sin of the angles, the R/2 of them twice over: dimension i is paired with i + R/2."""
        angles = _angles(position_ids, self.frequencies(position_ids.device))
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def rotate(x_BHTE: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first R dimensions of each head; in float32, whatever the dtype of x. The pairs are (i, i + R/2),
    the layout of Hugging Face's models, not (2i, 2i + 1) as in the RoFormer paper: the same up to the order of rows of
    the projections.
    """
    cos, sin = (table[:, None] for table in rotation)  # (B or 1, 1, T, R)
    n_rotated = cos.shape[-1]
    x = x_BHTE[..., :n_rotated].float()
    first, second = x.chunk(2, dim=-1)
    rotated = (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x_BHTE.dtype)
    return rotated if n_rotated == x_BHTE.shape[-1] else torch.cat((rotated, x_BHTE[..., n_rotated:]), dim=-1)


def _frequencies(base: float, n_dims: int, device: torch.device) -> Tensor:
    """base^(−2i / n_dims) for i in 0 … n_dims/2 − 1, in float32."""
    exponents = torch.arange(0, n_dims, 2, device=device, dtype=torch.float32) / n_dims
    return 1.0 / base**exponents


def _angles(position_ids: Tensor, frequencies: Tensor) -> Tensor:
    """Position × frequency, (…, T, n_frequencies), in float32."""
    return position_ids[..., None].float() * frequencies
