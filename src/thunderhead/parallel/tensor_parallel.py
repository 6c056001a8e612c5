"""Tensor parallelism: every block's heads and hidden dimensions divided among ranks (Shoeybi et al. 1909.08053)."""

from typing import cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

from thunderhead.core.model.decoder import Decoder
from thunderhead.parallel.styles import Replicated, RowsGathered


def tensor_parallel(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Divide a decoder on the meta device, with every parameter as a DTensor, over a mesh of one dimension.

    Raises:
        ValueError: it cannot be divided; see `plan_of`.
    """
    for block in decoder.blocks:
        for branch in (block.attention, block.feedforward):
            parallelize_module(
                cast(nn.Module, branch), mesh, plan_of(cast(nn.Module, branch), mesh.size()), src_data_rank=None
            )
    for module in list(decoder.modules()):
        if any(not isinstance(p, DTensor) for p in module.parameters(recurse=False)):
            table = module is decoder.embedding or module is decoder.head
            parallelize_module(module, mesh, RowsGathered() if table else Replicated(), src_data_rank=None)
    n_heads = decoder.n_heads // mesh.size()
    decoder.local_heads = slice(mesh.get_local_rank() * n_heads, (mesh.get_local_rank() + 1) * n_heads)


def plan_of(branch: nn.Module, n_ranks: int) -> dict[str, ParallelStyle]:
    """The styles of a branch's layers.

    Raises:
        ValueError: it has no plan, its sizes cannot be divided, its plan leaves parameters out, or its dropout would
            differ.
    """
    name = f"{type(branch).__module__}.{type(branch).__qualname__}"
    if not callable(plan := getattr(branch, "tensor_parallel_plan", None)):
        raise ValueError(
            f"{name} defines no tensor_parallel_plan(n_ranks), so that tensor parallelism cannot divide it"
        )
    if dropout := getattr(branch, "dropout", 0.0):
        raise ValueError(
            f"attention.dropout={dropout:g}: tensor parallelism divides the heads among ranks, which would drop the"
            " same places of different heads: set it to 0"
        )
    styles: dict[str, ParallelStyle] = plan(n_ranks)
    for module_name, module in branch.named_modules():
        if next(module.parameters(recurse=False), None) is not None and module_name not in styles:
            raise ValueError(f"the tensor_parallel_plan of {name} leaves out {module_name or 'its own parameters'}")
    return styles


def problems_of(decoder: Decoder, n_ranks: int) -> list[str]:
    """Why a decoder cannot be divided among n_ranks, in sentences."""
    if n_ranks == 1:
        return []
    problems = []
    for branch in (decoder.blocks[0].attention, decoder.blocks[0].feedforward):
        try:
            plan_of(cast(nn.Module, branch), n_ranks)
        except ValueError as error:
            problems.append(str(error))
    return problems


def share_of_parameters(decoder: Decoder, n_ranks: int) -> float:
    """The part of the parameters that each of n_ranks ranks stores.

    Raises:
        ValueError: the decoder cannot be divided.
    """
    if n_ranks == 1:
        return 1.0
    stored: dict[int, float] = {}
    for block in decoder.blocks:
        for branch in (cast(nn.Module, block.attention), cast(nn.Module, block.feedforward)):
            for name, style in plan_of(branch, n_ranks).items():
                divided = not isinstance(style, Replicated)
                for parameter in branch.get_submodule(name).parameters(recurse=False):
                    stored[id(parameter)] = parameter.numel() / (n_ranks if divided else 1)
    for table in (decoder.embedding, decoder.head):
        for parameter in table.parameters() if table is not None else ():
            stored[id(parameter)] = parameter.numel() / n_ranks
    parameters = list(decoder.parameters())
    return sum(stored.get(id(p), p.numel()) for p in parameters) / sum(p.numel() for p in parameters)
