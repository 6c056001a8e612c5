"""Further options of the group `position`: vectors that are added to the embeddings, and ALiBi.

Shape letters: B sequences, T tokens a sequence, D model dimensions, H query heads.
"""

import math

import torch
from torch import Tensor, nn

from thunderhead.core.model.position import Position, geometric_frequencies
from thunderhead.core.types import PositiveFloat


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
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        angles = position_ids[..., None] * geometric_frequencies(self.base, self.d_model, position_ids.device, dtype)
        table_BTD = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)
        return x_BTD * self.embedding_scale + table_BTD.to(x_BTD.dtype)


class AlibiPosition(Position):
    """Scores fall linearly with distance, each head with its own slope (Press et al. 2108.12409).

    n heads: slopes 2^(−8/n), 2^(−16/n), …; when n is no power of two, those of the power of two below it, followed by
    every other slope of the power of two above it (the authors' code, `get_slopes`).
    """

    def slopes(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """The slopes (H)."""

        def geometric(n: int) -> list[float]:
            return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

        below = 2 ** int(math.log2(self.n_heads))
        values = geometric(below) + geometric(2 * below)[::2][: self.n_heads - below]
        return torch.tensor(values, dtype=dtype, device=device)
