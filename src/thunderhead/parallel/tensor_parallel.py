"""Tensor parallelism: every block's heads and hidden dimensions divided among ranks (Shoeybi et al. 1909.08053).

Branches say how their layers are divided (core.model.division); what is between them is computed alike on all ranks.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

from thunderhead.core.model.decoder import Decoder
from thunderhead.core.model.division import Division
from thunderhead.options.precision import view_parameters


class Stored(ParallelStyle):
    """Parameters stored in one layout, `placement`; the module computes with them whole, as plain tensors.

    `on_shards`: it does so on this rank's heads or dimensions only, so that its gradients are summed over ranks; else
    on what all ranks have alike.
    """

    def __init__(self, placement: Placement, *, on_shards: bool = False) -> None:
        super().__init__()
        self.placement, self.gradients = placement, [Partial()] if on_shards else None

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            stored = distribute_tensor(parameter, device_mesh, [self.placement], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(stored, requires_grad=parameter.requires_grad))

        def whole(parameter: Tensor) -> Tensor:
            # FSDP2, which looks at a parameter while it is sharded over data-parallel ranks, too, must find the thing.
            if isinstance(parameter, DTensor) and parameter.device_mesh == device_mesh:
                here: Tensor = parameter.redistribute(placements=[Replicate()]).to_local(grad_placements=self.gradients)
                return here
            return parameter

        view_parameters(module, whole)
        return module


class IntoShards(ParallelStyle):
    """Gradients of a module's output are summed over ranks, as ColwiseParallel does it for its input."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            whole = DTensor.from_local(output, device_mesh, [Replicate()], run_check=False)
            local: Tensor = whole.to_local(grad_placements=[Partial()])
            return local

        module.register_forward_hook(enter)
        return module


STYLES: dict[Division, Callable[[], ParallelStyle]] = {
    "columns": ColwiseParallel,
    "rows": RowwiseParallel,
    "into_shards": IntoShards,
    "replicated": lambda: Stored(Replicate()),
    "replicated_on_shards": lambda: Stored(Replicate(), on_shards=True),
}


def tensor_parallel(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Divide a decoder on the meta device, with every parameter as a DTensor, over a mesh of one dimension.

    Raises ValueError if it cannot be divided; see `plan_of`.
    """

    def prepare(_branch: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False), *inputs[1:]

    for branch in branches(decoder):
        plan = plan_of(branch, mesh.size())
        parallelize_module(branch, mesh, {name: STYLES[d]() for name, d in plan.items()}, src_data_rank=None)
        if "columns" in plan.values() and "replicated" not in plan.values():
            branch.register_forward_pre_hook(prepare)  # one sum of gradients for all uses of the input
    for module in list(decoder.modules()):
        if any(not isinstance(p, DTensor) for p in module.parameters(recurse=False)):
            table = module is decoder.embedding or module is decoder.head  # each rank stores some of its rows
            parallelize_module(module, mesh, Stored(Shard(0) if table else Replicate()), src_data_rank=None)
    n_heads = decoder.n_heads // mesh.size()
    decoder.local_heads = slice(mesh.get_local_rank() * n_heads, (mesh.get_local_rank() + 1) * n_heads)


def branches(decoder: Decoder) -> Iterator[nn.Module]:
    """Mixer and feed-forward of every block."""
    for block in decoder.blocks:
        yield from (block.attention, block.feedforward)  # type: ignore[misc]


def plan_of(branch: nn.Module, n_ranks: int) -> dict[str, Division]:
    """How a branch's layers are divided.

    Raises ValueError if it has no plan, its sizes cannot be divided, its plan leaves parameters out or knows other
    words, or its dropout would differ.
    """
    name = f"{type(branch).__module__}.{type(branch).__qualname__}"
    if not callable(plan := getattr(branch, "tensor_parallel_plan", None)):
        raise ValueError(f"{name} has no tensor_parallel_plan(n_ranks), so that tensor parallelism cannot divide it")
    if dropout := getattr(branch, "dropout", 0.0):
        raise ValueError(
            f"attention.dropout={dropout:g}: tensor parallelism divides the heads among ranks, which would drop the"
            " same places of different heads: set it to 0"
        )
    divisions: dict[str, Division] = plan(n_ranks)
    for module_name, module in branch.named_modules():
        if next(module.parameters(recurse=False), None) is not None and module_name not in divisions:
            raise ValueError(f"the tensor_parallel_plan of {name} leaves out {module_name or 'its own parameters'}")
    if unknown := sorted({*divisions.values()} - STYLES.keys()):
        raise ValueError(f"the tensor_parallel_plan of {name} says {unknown[0]}: known are {', '.join(STYLES)}")
    return divisions


def share_of_parameters(decoder: Decoder, n_ranks: int) -> float:
    """The part of the parameters that each of n_ranks ranks stores; raises ValueError as `plan_of`."""
    if n_ranks == 1:
        return 1.0
    divided: set[int] = set()
    for branch in branches(decoder):
        for name, division in plan_of(branch, n_ranks).items():
            if not division.startswith("replicated"):
                divided |= {id(parameter) for parameter in branch.get_submodule(name).parameters(recurse=False)}
    for table in (decoder.embedding, decoder.head):
        divided |= {id(parameter) for parameter in table.parameters()} if table is not None else set()
    parameters = list(decoder.parameters())
    stored = sum(p.numel() / (n_ranks if id(p) in divided else 1) for p in parameters)
    return stored / sum(p.numel() for p in parameters)
