"""Muon for the hidden matrices and AdamW for everything else, as one optimizer."""

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.optim import AdamW, Optimizer
from torch.optim import Muon as MatrixMuon

from thunderhead.core.optim.parameter_groups import holds_matrices
from thunderhead.core.types import NonNegativeFloat, PositiveFloat, PositiveInt, Probability

if TYPE_CHECKING:
    from thunderhead.options.mup import Growth

AdjustLr = Literal["original", "match_rms_adamw"]


def update_scale(adjust_lr_fn: AdjustLr, rows: int, columns: int) -> float:
    """What torch multiplies the update of a (rows, columns) matrix by, whose singular values are all about 1."""
    return math.sqrt(max(1, rows / columns)) if adjust_lr_fn == "original" else 0.2 * math.sqrt(max(rows, columns))


def _divided(groups: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Those of matrices, and the others."""
    return [g for g in groups if holds_matrices(g)], [g for g in groups if not holds_matrices(g)]


class Muon(Optimizer):
    """Muon on the groups of matrices, AdamW on the others (Jordan 2024; Liu et al. 2502.16982).

    Muon's update is the momentum of a matrix with its singular values all set to about 1 (a few Newton–Schulz steps in
    bfloat16); that is meaningless for vectors, and embeddings and the head do better under AdamW. This class holds one
    of each of torch's and lends them its own groups and state, so that from outside there is one `Optimizer`.

    - params: groups as made by `parameter_groups`.
    - lr: peak learning rate, of all groups unless `adamw_lr` is given for those under AdamW.
    - momentum, nesterov: of Muon, an exponential average; look one step of it ahead.
    - ns_steps, ns_coefficients: Newton–Schulz steps, and a, b, c of the quintic a·x + b·x³ + c·x⁵ that is applied to
      the singular values at each.
    - eps: least norm that the momentum is divided by before these steps.
    - adjust_lr_fn: `match_rms_adamw` scales a matrix' update by 0.2·sqrt(max(rows, columns)), so that its RMS is like
      AdamW's and `lr` may be AdamW's (2502.16982); `original` by sqrt(max(1, rows / columns)).
    - adamw_betas, adamw_eps, adamw_fused: of AdamW, as torch has them.

    Raises ValueError without a group of matrices, or for a parameter in one that is not 2-D.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: PositiveFloat = 1e-3,
        weight_decay: NonNegativeFloat = 0.1,
        momentum: Probability = 0.95,
        nesterov: bool = True,
        ns_steps: PositiveInt = 5,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: PositiveFloat = 1e-7,
        adjust_lr_fn: AdjustLr = "match_rms_adamw",
        adamw_lr: PositiveFloat | None = None,
        adamw_betas: tuple[Probability, Probability] = (0.9, 0.95),
        adamw_eps: PositiveFloat = 1e-8,
        adamw_fused: bool | None = None,
    ) -> None:
        groups = [dict(group) for group in params]
        matrices, others = _divided(groups)
        if not matrices:
            names = ", ".join(str(group.get("name")) for group in groups) or "none"
            raise ValueError(f"optimizer: Muon needs a parameter group named matrices and gets {names}: use adamw")
        # Each checks its settings and writes its defaults into the dicts of its groups, which then become our groups.
        settings: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        settings |= {"ns_coefficients": ns_coefficients, "eps": eps, "adjust_lr_fn": adjust_lr_fn}
        self._muon = MatrixMuon(matrices, lr=lr, weight_decay=weight_decay, **settings)
        adamw_lr = lr if adamw_lr is None else adamw_lr
        self._adamw = AdamW(
            others or [{"params": []}], adamw_lr, adamw_betas, adamw_eps, weight_decay, fused=adamw_fused
        )
        super().__init__(groups, defaults={})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        # Lent anew each time, because load_state_dict replaces both objects.
        self._muon.param_groups, self._adamw.param_groups = _divided(self.param_groups)
        self._muon.state = self._adamw.state = self.state
        self._muon.step()  # type: ignore[no-untyped-call]
        self._adamw.step()
        return loss

    def width_multiplier(self, group: dict[str, Any], growth: "Growth") -> float:
        """Return what muP multiplies the learning rate of a grown matrix by.

        Muon's updates have a spectral norm of about lr · `update_scale`; this makes it grow as sqrt(fan_out / fan_in),
        with either `adjust_lr_fn` (2310.17813, condition 1).
        """
        if not holds_matrices(group):
            return 1 / growth.fan_in
        scale, base_scale = (update_scale(group["adjust_lr_fn"], *shape) for shape in (growth.shape, growth.base_shape))
        return math.sqrt(growth.fan_out / growth.fan_in) * base_scale / scale
