"""ZeRO-1 (Rajbhandari et al. 1910.02054): DDP, with the optimizer's state divided among the ranks by whole parameters.

Each rank steps its own parameters and sends them to the others. As it has them whole, any optimizer does that skips
parameters without a gradient, as torch's do; its code and its groups stay, and so do the losses, bit for bit.
torch's ZeroRedundancyOptimizer wants to make the optimizer itself, and gathers whole states on one device.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_map_only


def owners(sizes: Sequence[int], n_ranks: int) -> list[int]:
    """The rank that steps each parameter: the largest go first, each to the rank that has least so far."""
    found, filled = [0] * len(sizes), [0] * n_ranks
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        found[index] = filled.index(min(filled))
        filled[found[index]] += sizes[index]
    return found


def parts_of(parameters: Sequence[Tensor], n_ranks: int) -> list[list[Tensor]]:
    """What each rank steps; of ranks whose parts have the same shapes the first."""
    ranks = owners([parameter.numel() for parameter in parameters], n_ranks)
    parts = [[p for p, rank in zip(parameters, ranks, strict=True) if rank == one] for one in range(n_ranks)]
    return list({str(sorted(tuple(p.shape) for p in part)): part for part in reversed(parts)}.values())


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """In the order in which state_dict() numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class Zero1Strategy(DDPStrategy):
    """DDP in which each rank keeps the optimizer's state of some parameters; checkpoints are a single process'."""

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            self._divide(optimizer)

    def _owners(self, optimizer: Optimizer) -> list[int]:
        return owners([parameter.numel() for parameter in parameters_of(optimizer)], self.world_size)

    def _divide(self, optimizer: Optimizer) -> None:
        """Hide the gradients of others' parameters from a step, and send out what it made of the own ones."""
        owned = list(zip(parameters_of(optimizer), self._owners(optimizer), strict=True))
        others = [parameter for parameter, rank in owned if rank != self.global_rank]
        gradients: list[Tensor | None] = []

        def before(_: Optimizer, arguments: tuple[Any, ...], settings: dict[str, Any]) -> Any:
            assert len(arguments) == 1  # the optimizer
            if (closure := settings.get("closure")) is not None:
                loss = closure()  # makes the gradients, and clips them by the norm of all
                settings = settings | {"closure": lambda: loss}
            gradients[:] = [parameter.grad for parameter in others]
            for parameter in others:
                parameter.grad = None
            return arguments, settings

        def after(*_: Any) -> None:
            for parameter, gradient in zip(others, gradients, strict=True):
                parameter.grad = gradient
            gradients.clear()
            for work in [dist.broadcast(parameter.detach(), rank, async_op=True) for parameter, rank in owned]:
                work.wait()

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """All ranks' parts on rank 0, tensor by tensor, in the host's memory; nothing on other ranks."""
        optimizer = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        own = optimizer.state_dict()
        described = tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), own["state"])
        parts: list[Any] | None = [None] * self.world_size if self.global_rank == 0 else None
        dist.gather_object(described, parts)
        if parts is None:
            for tensor in tree_flatten(own["state"])[0]:
                if isinstance(tensor, Tensor):
                    dist.send(tensor.to(self.root_device).contiguous(), 0)
            return {}

        def received(rank: int, meta: Tensor) -> Tensor:
            tensor = torch.empty_like(meta, device=self.root_device, memory_format=torch.contiguous_format)
            dist.recv(tensor, rank)
            return tensor.cpu()

        state = dict(own["state"])
        for rank in range(1, self.world_size):
            state |= tree_map_only(Tensor, partial(received, rank), parts[rank])
        return {**own, "state": dict(sorted(state.items()))}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each rank takes its parts of a whole state."""
        parts = []
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            rank_of = self._owners(optimizer)
            own = {n: state for n, state in saved["state"].items() if rank_of[n] == self.global_rank}
            parts.append({**saved, "state": own})
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": parts})
