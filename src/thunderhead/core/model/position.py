"""How the order of tokens enters the model. Tables are computed in the forward pass: no buffers to shard or round.

Shape letters: B sequences, T tokens, D model dimensions, H query heads, E dimensions of a head, of which R are rotated.
"""

from typing import Annotated

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn

from thunderhead.core.model.norm import at_least_float32
from thunderhead.core.types import PositiveFloat


class Position(nn.Module):
    """The interface. Each kind overrides what it needs; as it stands, it adds nothing.

    A subclass takes what it needs of d_model, n_heads, context_length and rotary_dim (dimensions of a head that the
    layers let it rotate), by these names and without defaults; after a * come its settings.
    """

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

    Raises ValueError if the rotated dimensions are not a positive even number.
    """

    def __init__(
        self, rotary_dim: int, *, theta: PositiveFloat = 10_000.0, fraction: Annotated[float, Gt(0), Le(1)] = 1.0
    ) -> None:
        super().__init__()
        self.theta = theta
        self.rotated_dim = int(rotary_dim * fraction)
        if rotary_dim and (self.rotated_dim < 2 or self.rotated_dim % 2):
            product = f"{rotary_dim} rotary dimensions a head × position.fraction={fraction:g} = {self.rotated_dim}"
            raise ValueError(f"position=rope rotates pairs of dimensions: {product} must be a positive even number")

    def frequencies(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """Angle a token of each rotated pair, (R/2)."""
        return geometric_frequencies(self.theta, self.rotated_dim, device, dtype)

    def rotation(self, position_ids: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Cos and sin of the angles, the R/2 of them twice over: dimension i is paired with i + R/2."""
        angles = (position_ids[..., None] * self.frequencies(position_ids.device, dtype)).repeat(1, 1, 2)
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
