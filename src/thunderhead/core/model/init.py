"""Initial weights: which distribution, and how they come out the same on any device, sharding and model around them."""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.weak import WeakIdKeyDictionary

BLOCK = 1 << 20
"""Numbers that are drawn at once."""


class ResidualProjection(nn.Linear):
    """A linear layer whose output is added to the residual stream; `initialize` scales its weights down with depth."""

    adds_to_residual = True  # what `initialize` looks for: other classes may take this one's place (float8)


@torch.no_grad()
def initialize(  # noqa: PLR0917 - of the model's own settings, in their order
    model: nn.Module,
    seed: int,
    std: float,
    n_layers: int,
    scale_residual: bool,
    std_factors: Mapping[str, float] | None = None,
) -> None:
    """Draw all parameters of `model` anew. Right after building, or after `without_parameters` and `give_storage`.

    - nn.Linear, nn.Embedding: normal(0, std) cut at ±3 std (GPT-2's std is 0.02; the cut as in torchtitan); biases 0.
    - ResidualProjection: std / sqrt(2 · n_layers) if `scale_residual`, so that the variance of the residual stream does
      not grow with depth (Radford et al. 2019, section 2.3: two branches a layer).
    - `std_factors`: of parameters by name, multiply the std.
    - any other module with parameters of its own: by its own `reset_parameters()`.

    What is drawn depends on seed, name of the parameter and coordinates only: a module added elsewhere does not shift
    the others, a wider or narrower model has what both have room for in common, so that runs of one seed stay a pair,
    and a sharded parameter gets its slice of the same full tensor.

    Raises ValueError, naming the module, if a module has parameters and neither rule reaches all of them.
    """
    refuse_without_rule(model)
    for module_name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        if isinstance(module, nn.Linear | nn.Embedding):
            scaled = scale_residual and getattr(module, "adds_to_residual", False)
            weight_std = std / math.sqrt(2 * n_layers) if scaled else std
            for name, parameter in own.items():
                if name == "weight":
                    path = f"{module_name}.{name}"
                    full = _draw(parameter.shape, seed, path).mul_(weight_std * (std_factors or {}).get(path, 1.0))
                else:
                    full = torch.zeros(parameter.shape, dtype=torch.float32)
                _copy_in(parameter, full)
        else:
            _reset(module, module_name, own, seed)


def refuse_without_rule(model: nn.Module) -> None:
    """Raise ValueError for the first module whose parameters `initialize` has no rule for; "meta" will do."""
    for name, module in model.named_modules():
        own = [own for own, _ in module.named_parameters(recurse=False)]
        has_rule = isinstance(module, nn.Linear | nn.Embedding) or callable(getattr(module, "reset_parameters", None))
        if own and not has_rule:
            what = f"{name} ({type(module).__name__}): it has parameters ({', '.join(own)})"
            raise ValueError(f"cannot initialise {what} and no reset_parameters()")


@contextlib.contextmanager
def without_parameters() -> Iterator[None]:
    """Build modules within it with parameters on "meta", which take no memory, and with all other tensors as they are.

    Those are buffers, whose values nobody else knows.
    """
    register, on_meta = nn.Module.register_parameter, WeakIdKeyDictionary()  # shared ones stay shared

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            if parameter not in on_meta:
                on_meta[parameter] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            parameter = on_meta[parameter]
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def give_storage(model: nn.Module, device: torch.device) -> None:
    """Give what is on "meta" storage on a device, its values as yet unknown."""

    def given(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor

    model._apply(given)  # type: ignore[no-untyped-call]


@torch.no_grad()
def copy_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a model, divided among ranks or not, weights by parameter name: whole tensors on the CPU."""
    for name, parameter in model.named_parameters():
        _copy_in(parameter, weights[name])


def _reset(module: nn.Module, module_name: str, own: dict[str, nn.Parameter], seed: int) -> None:
    """Run the module's own reset_parameters on full CPU tensors and copy these in."""
    where = f"{module_name} ({type(module).__name__})"
    # It acts on a twin, as the parameters themselves may be parts of sharded ones, which others hold on to.
    twin: Any = object.__new__(type(module))
    fresh = {name: nn.Parameter(torch.full(parameter.shape, math.nan)) for name, parameter in own.items()}
    twin.__dict__ = module.__dict__ | {"_parameters": module._parameters | fresh}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed_of(seed, module_name))
        twin.reset_parameters()
    for name, parameter in own.items():
        if twin._parameters[name].isnan().any():
            raise ValueError(f"cannot initialise {where}: its reset_parameters() leaves {name!r} unset")
        _copy_in(parameter, twin._parameters[name])


def _draw(shape: torch.Size, seed: int, path: str) -> Tensor:
    """normal(0, 1) cut at ±3, (rows, columns), float32: the numbers of row i begin at 2⁶⁴ i of a stream of its own.

    Philox' raw numbers stay the same for ever (NEP 19).
    """
    rows, columns = shape
    key, of_row = _seed_of(seed, path), (columns + 1) // 2  # 64 bits are two numbers
    drawn, block = torch.empty(shape, dtype=torch.float32), max(1, BLOCK // columns)
    for first in range(0, rows, block):
        some = range(first, min(first + block, rows))
        raw = np.stack([np.random.Philox(key=key, counter=row << 64).random_raw(of_row) for row in some])
        bits_23 = raw.astype("<u8", copy=False).view("<u4")[:, :columns] >> np.uint32(9)
        drawn[first : some.stop] = torch.from_numpy(bits_23.astype(np.float32))
    drawn.add_(0.5).mul_(2.0**-22).sub_(1)  # uniform, without ±1 and exact
    return drawn.mul_(math.erf(3 / math.sqrt(2))).erfinv_().mul_(math.sqrt(2))


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]) >> 1  # 63 bits: a non-negative int64


def _copy_in(parameter: Tensor, full: Tensor) -> None:
    """Copy a full CPU tensor into a parameter; of a sharded one, into this rank's slice without communication."""
    if isinstance(parameter, DTensor):
        full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
        parameter = parameter.to_local()
    parameter.copy_(full)
