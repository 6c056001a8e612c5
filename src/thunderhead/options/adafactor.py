"""Adafactor for parameters of any kind: plain or sharded, in float32 or below."""

from collections.abc import Callable, Iterable
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from thunderhead.core.types import NonNegativeFloat, PositiveFloat


class Adafactor(Optimizer):
    """Adafactor (Shazeer & Stern 1804.04235) without momentum, step for step as `torch.optim.Adafactor` computes it.

    The second moment of an (m, n) matrix is kept as m row means and n column means, and the step is relative to the
    parameter's own RMS. Unlike torch's class, whose state_dict it shares, it works out of place, because in-place
    operations on the norms of a DTensor fail, and in float32 at least, also for bfloat16 parameters.

    - lr: relative step size, capped by 1/sqrt(t) at step t.
    - beta2_decay: exponent c of the second moment's decay rate, 1 - t^c.
    - eps: the least root of the second moment (None: the machine epsilon of the arithmetic) and the least RMS of a
      parameter for the relative step.
    - d: an update whose RMS is above d is scaled down to it.
    - weight_decay: decoupled: lr·weight_decay of the parameter is taken off at each step.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: PositiveFloat = 1e-2,
        beta2_decay: Annotated[float, Le(0)] = -0.8,
        eps: tuple[NonNegativeFloat | None, NonNegativeFloat] = (None, 1e-3),
        d: Annotated[float, Ge(1)] = 1.0,
        weight_decay: NonNegativeFloat = 0.0,
    ) -> None:
        defaults = {"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _update(parameter, self.state[parameter], group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; unlike torch's own method without rounding it to the parameters' dtype."""
        super().load_state_dict(state_dict)
        saved = (number for group in state_dict["param_groups"] for number in group["params"])
        loaded = (parameter for group in self.param_groups for parameter in group["params"])
        for number, parameter in zip(saved, loaded, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                self.state[parameter][key] = value if key == "step" else value.to(parameter.device)


def _update(parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """One step of algorithm 4 (factored) or 5 (vectors), with update clipping and relative step size."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    value, gradient = parameter.to(dtype), parameter.grad.to(dtype)  # type: ignore[union-attr]
    square = gradient.square()
    factored = gradient.ndim > 1
    means = {"row_var": _mean(square, -1), "col_var": _mean(square, -2)} if factored else {"variance": square}

    t = float(state.get("step", 0.0)) + 1  # on the CPU, so that no step waits for the device
    state["step"] = torch.tensor(t)
    new_share = t ** group["beta2_decay"]  # 1 - beta2; 1 at the first step, whatever was there
    for key, mean in means.items():
        state[key] = mean if t == 1 else state[key] + new_share * (mean - state[key])

    floor, least_scale = group["eps"]
    floor = torch.finfo(dtype).eps if floor is None else floor
    if factored:
        variance = state["row_var"] * state["col_var"] / _mean(state["row_var"], -2).clamp(min=floor)
    else:
        variance = state["variance"]
    update = gradient * variance.clamp(min=floor**2).rsqrt()

    step_size = min(group["lr"], t**-0.5) * _rms(value).clamp(min=least_scale)
    step_size = step_size / (_rms(update) / group["d"]).clamp(min=1.0)
    parameter.copy_(value * (1 - group["lr"] * group["weight_decay"]) - step_size * update)


def _mean(tensor: Tensor, dim: int) -> Tensor:
    """Mean over `dim`, which stays as 1. For a DTensor summed over its shards, so that state holds no partial sums."""
    total = tensor.sum(dim, keepdim=True)
    if isinstance(total, DTensor):
        total = total.redistribute(placements=[Replicate() if p.is_partial() else p for p in total.placements])
    return total / tensor.size(dim)


def _rms(tensor: Tensor) -> Tensor:
    return (tensor.square().sum() / tensor.numel()).sqrt()
