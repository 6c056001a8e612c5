"""How layers are divided among ranks: what a branch of a block says about itself for tensor parallelism.

A branch of a block (attention, feed-forward) says how its layers are divided by a method

    def tensor_parallel_plan(self, n_ranks: int) -> dict[str, ParallelStyle]

with a style of torch.distributed.tensor.parallel, or one of those below, for every submodule that has parameters ("" is
the branch itself); it raises ValueError, naming the setting, if its sizes cannot be divided by n_ranks. A branch sees
plain tensors: its input whole on each rank, between a ColwiseParallel and a RowwiseParallel layer the rank's own heads
or hidden dimensions, and returns its output whole. Everything between the branches is computed alike on all ranks.
"""

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import PrepareModuleInput
from torch.distributed.tensor.parallel.style import ParallelStyle

from thunderhead.options.precision import view_parameters


class _Stored(ParallelStyle):
    """Parameters stored in one layout; the module computes with them whole, as plain tensors."""

    placement: Placement

    def _whole(self, parameter: DTensor) -> Tensor:
        whole: Tensor = parameter.redistribute(placements=[Replicate()]).to_local()
        return whole

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            stored = distribute_tensor(parameter, device_mesh, [self.placement], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(stored, requires_grad=parameter.requires_grad))

        def whole(parameter: Tensor) -> Tensor:
            # FSDP2, which looks at a parameter while it is sharded over data-parallel ranks, too, must find the thing.
            if isinstance(parameter, DTensor) and parameter.device_mesh == device_mesh:
                return self._whole(parameter)
            return parameter

        view_parameters(module, whole)
        return module


class Replicated(_Stored):
    """Every rank holds the parameters whole.

    - on_shards: the module computes on this rank's heads or dimensions only (norms of queries and keys), so that its
      gradients are summed over ranks; else on what all ranks have alike.
    """

    placement = Replicate()

    def __init__(self, *, on_shards: bool = False) -> None:
        super().__init__()
        self.on_shards = on_shards

    def _whole(self, parameter: DTensor) -> Tensor:
        if not self.on_shards:
            return super()._whole(parameter)
        whole: Tensor = parameter.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        return whole


class RowsGathered(_Stored):
    """Every rank stores some rows (of an embedding or the head), and gathers the others when it computes."""

    placement = Shard(0)


class IntoShards(ParallelStyle):
    """For an nn.Identity whose output, alike on all ranks, enters what each computes for its own heads.

    Its gradients are summed over ranks, as ColwiseParallel does it for its input.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            whole = DTensor.from_local(output, device_mesh, [Replicate()], run_check=False)
            local: Tensor = whole.to_local(grad_placements=[Partial()])
            return local

        module.register_forward_hook(enter)
        return module


def input_of_all(*others: None) -> PrepareModuleInput:
    """The style of a branch ("") all of whose uses of its first input are ColwiseParallel: one sum of gradients."""
    layouts = (Replicate(), *others)
    return PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)


def refuse_uneven(setting: str, count: int, n_ranks: int, values: str | None = None) -> None:
    """Raise ValueError unless n_ranks divides what a setting counts; `values` says what would do."""
    if count % n_ranks:
        below, above = count - count % n_ranks, count + n_ranks - count % n_ranks
        nearest = " or ".join(f"{setting}={n}" for n in (below, above) if n)
        divisors = [n for n in range(1, count + 1) if count % n == 0]
        fitting = ", ".join(str(n) for n in divisors[:12])
        raise ValueError(
            f"{setting}={count} cannot be divided among {n_ranks} tensor-parallel ranks: use "
            f"{values or nearest}, or a tensor_parallel_size of {fitting}"
        )
