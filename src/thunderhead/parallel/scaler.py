"""The scaler of fp16-mixed's loss for several ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class AgreeingGradScaler(torch.amp.GradScaler):
    """Leaves a step out on every rank if a gradient overflows on one.

    torch 2.13 lets ranks with parts of a gradient agree by the placements of the first gradient alone
    (`found_inf_reduce_handler` in torch/distributed/tensor/_dispatch.py): where that one is replicated and another is
    not, one rank would leave out a step that another takes.
    """

    def _unscale_grads_(self, *arguments: Any) -> dict[torch.device, Tensor]:
        found: dict[torch.device, Tensor] = super()._unscale_grads_(*arguments)
        if dist.is_available() and dist.is_initialized():
            for found_inf in found.values():
                dist.all_reduce(found_inf, dist.ReduceOp.MAX)
        return found
