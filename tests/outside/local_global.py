"""Local layers with rotary positions, and every n-th layer global without positions (Command A, 2504.00698)."""

from torch import Tensor

from thunderhead.core.model.attention import GroupedQueryAttention
from thunderhead.core.model.context import SequenceContext
from thunderhead.core.types import PositiveInt


class LocalGlobalAttention(GroupedQueryAttention):
    """Grouped-query attention that sees the last `window` tokens, or in every n-th layer all tokens.

    - window: of the local layers, in tokens.
    - global_every: n; the last of every n layers is global, and is told no positions.
    - n_kv_heads: see `GroupedQueryAttention`.
    """

    def __init__(
        self, d_model: int, n_heads: int, context_length: int, bias: bool, layer_index: int,
        *, window: PositiveInt = 64, global_every: PositiveInt = 4, n_kv_heads: int | float | None = None,
    ) -> None:  # fmt: skip
        self.is_global = (layer_index + 1) % global_every == 0
        super().__init__(
            d_model, n_heads, context_length, bias, n_kv_heads=n_kv_heads, window=None if self.is_global else window
        )

    def forward(self, x_BTD: Tensor, context: SequenceContext) -> Tensor:
        return super().forward(x_BTD, context._replace(rotation=None) if self.is_global else context)
