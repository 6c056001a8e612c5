"""SOAP (Vyas et al. 2409.11321, algorithm 3), written by someone who knows of us only the parameter groups' names."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class SOAP(torch.optim.Optimizer):
    """Adam in the eigenbasis of Shampoo's preconditioners.

    Args:
        params: groups of parameters; those whose name begins with `embeddings` have a learning rate of their own.
        lr: peak learning rate.
        embedding_lr: of the embeddings; None is `lr`.
        betas: of the first moment, and of the second and Shampoo's statistics.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        precondition_frequency: steps between two updates of the basis.
        max_precondition_size: a side of a matrix that is longer than this keeps its own basis.

    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float = 3e-3,
        embedding_lr: float | None = None,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precondition_size: int = 10_000,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "precondition_frequency": precondition_frequency,
            "max_precondition_size": max_precondition_size,
        }
        groups = [dict(group) for group in params]
        for group in groups:
            if str(group.get("name")).startswith("embeddings") and embedding_lr is not None:
                group["lr"] = embedding_lr
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; the first only begins the preconditioners."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _update(parameter, parameter.grad, self.state[parameter], group)
        return loss


def _update(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    if not state:
        sides = [n if gradient.ndim > 1 and n <= group["max_precondition_size"] else None for n in gradient.shape]
        shampoo = [None if n is None else gradient.new_zeros(n, n) for n in sides]
        state["step"], state["shampoo"] = 0, {"statistics": shampoo, "basis": []}
        _observe(gradient, shampoo, beta2)
        state["shampoo"]["basis"] = [None if s is None else torch.linalg.eigh(s)[1].flip(1) for s in shampoo]
        return
    statistics, basis = state["shampoo"]["statistics"], state["shampoo"]["basis"]
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    state["step"] += 1
    first, second = state["exp_avg"], state["exp_avg_sq"]
    first.lerp_(gradient, 1 - beta1)
    second.lerp_(_rotate(gradient, basis).square(), 1 - beta2)
    back = [None if q is None else q.mT for q in basis]
    direction = _rotate(_rotate(first, basis) / (second.sqrt() + group["eps"]), back)
    corrected = (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
    parameter.sub_(direction, alpha=group["lr"] * corrected)
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    _observe(gradient, statistics, beta2)
    if state["step"] % group["precondition_frequency"] == 0:
        for side, (matrix, q) in enumerate(zip(statistics, basis, strict=True)):
            if matrix is not None:  # one step of power iteration; the second moment follows the order of the basis
                order = (q.mT @ matrix @ q).diagonal().argsort(descending=True)
                state["exp_avg_sq"] = state["exp_avg_sq"].index_select(side, order)
                basis[side] = torch.linalg.qr(matrix @ q[:, order])[0]


def _observe(gradient: Tensor, statistics: list[Tensor | None], beta: float) -> None:
    """Move Shampoo's statistics towards G·Gᵀ of each side."""
    for side, matrix in enumerate(statistics):
        if matrix is not None:
            rows = gradient.movedim(side, 0).flatten(1)
            matrix.lerp_(rows @ rows.mT, 1 - beta)


def _rotate(tensor: Tensor, basis: list[Tensor | None]) -> Tensor:
    """Go into a basis, side by side."""
    for side, q in enumerate(basis):
        if q is not None:
            tensor = torch.tensordot(q, tensor.movedim(side, 0), dims=([0], [0])).movedim(0, side)
    return tensor
