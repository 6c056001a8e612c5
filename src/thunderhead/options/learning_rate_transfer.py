"""Learning rates that stay the best ones when a model grows wider: the optimizer's part of muP.

What must not change with width is by how much a step changes what a layer puts out (Yang et al. 2203.03466; as a
condition on norms: Yang, Simon & Bernstein 2310.17813). Vectors, embedding tables and the head (its logits are
scaled by the decoder) need no multiplier for that; hidden matrices do: by how large the optimizer's updates are.
"""

import math
from typing import Any

from lion_pytorch import Lion
from torch.optim import AdamW, Optimizer

from thunderhead.core.model.decoder import Decoder
from thunderhead.core.optim.parameter_groups import holds_matrices
from thunderhead.options.growth import Growth
from thunderhead.options.muon import Muon, update_scale


def transfer_learning_rates(optimizer: Optimizer, decoder: Decoder) -> None:
    """Give a new optimizer the learning-rate multipliers of a decoder that has grown from a base model.

    - AdamW and Lion, whose updates have entries of about lr: 1 / fan_in (2203.03466, table 8).
    - Muon, whose updates have a spectral norm of about lr · `update_scale`: what makes it grow as
      sqrt(fan_out / fan_in), with either `adjust_lr_fn` (2310.17813, condition 1).

    Weight decay takes lr · weight_decay off a parameter at each step; it is divided by the multiplier, so that this
    product stays as well: as `mup.MuAdamW` does, and as transfer needs (Wang & Aitchison 2405.13698; Kosson et al.
    2510.19093).

    A group is split where its parameters need different multipliers; each then has `lr_multiplier`. Without growth, and
    at the base model's sizes, groups and values stay as they are, bit for bit.

    Raises:
        ValueError: the optimizer is another one.
    """
    if not decoder.growth:
        return
    if not isinstance(optimizer, AdamW | Lion | Muon):
        raise ValueError(
            f"parametrization=mup has learning-rate rules for AdamW, Lion and Muon; the updates of "
            f"{type(optimizer).__name__} scale otherwise: use optimizer=adamw, or parametrization=standard"
        )
    grown = {id(p): decoder.growth.get(name) for name, p in decoder.named_parameters()}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        by_multiplier: dict[float, list[Any]] = {}
        for parameter in group["params"]:
            by_multiplier.setdefault(_multiplier(group, optimizer, grown[id(parameter)]), []).append(parameter)
        groups += [
            {
                **group,
                "params": parameters,
                "lr": group["lr"] * multiplier,
                "weight_decay": group["weight_decay"] / multiplier,
                "lr_multiplier": multiplier,
            }
            for multiplier, parameters in by_multiplier.items()
        ]
    optimizer.param_groups = groups


def _multiplier(group: dict[str, Any], optimizer: Optimizer, growth: Growth | None) -> float:
    if growth is None:
        return 1.0
    if isinstance(optimizer, Muon) and holds_matrices(group):
        scale, base_scale = (update_scale(group["adjust_lr_fn"], *shape) for shape in (growth.shape, growth.base_shape))
        return math.sqrt(growth.fan_out / growth.fan_in) * base_scale / scale
    return 1 / growth.fan_in
