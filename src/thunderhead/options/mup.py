"""The parametrization group: what a model's width does to its initial weights and learning rates.

muP (Yang et al. 2203.03466) compares the decoder with the same one at a base width, parameter by parameter, by names
and shapes, as Yang et al.'s package `mup` does. So it reaches any module, also the user's own.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lion_pytorch import Lion
from torch import nn
from torch.optim import AdamW, Optimizer

from thunderhead.core.components import check
from thunderhead.core.config import Config, leaves, set_value, unknown
from thunderhead.core.model.attention import Attention
from thunderhead.core.types import PositiveInt


class Growth(NamedTuple):
    """Of a hidden matrix: its shape, (out, in) as nn.Linear has it, and that of its namesake in the base model."""

    shape: tuple[int, ...]
    base_shape: tuple[int, ...]

    @property
    def fan_in(self) -> float:
        """Inputs of a row, relative to the base model's."""
        return math.prod(self.shape[1:]) / math.prod(self.base_shape[1:])

    @property
    def fan_out(self) -> float:
        """Rows, relative to the base model's."""
        return self.shape[0] / self.base_shape[0]


def entrywise(group: dict[str, Any], growth: Growth) -> float:
    """The multiplier where updates have entries of about lr: 1 / fan_in (2203.03466, table 8)."""
    return 1 / growth.fan_in


MULTIPLIERS: dict[type[Optimizer], Callable[[dict[str, Any], Growth], float]] = {AdamW: entrywise, Lion: entrywise}
"""Of hidden matrices' learning rates, for optimizers that are not ours and have no method `width_multiplier`."""


class Standard:
    """Nothing depends on the width: init_std and learning rates hold as configured."""

    def base(self, config: Config) -> Config | None:
        """Return the configuration of the model to scale from; None: nothing is scaled."""
        return None

    def scale(self, decoder: Any, base: nn.Module) -> None:
        """Scale a new decoder's initial weights from a base model's, which may be on the "meta" device."""

    def scale_learning_rates(self, optimizer: Optimizer, decoder: Any) -> None:
        """Scale a new optimizer's learning rates."""


@dataclass(frozen=True, kw_only=True)
class MaximalUpdate(Standard):
    """muP: init_std and learning rates are those of a base model, and are scaled for the model that is trained.

    - base_d_model: width of the base model. Its n_heads and d_ff follow in proportion, so that heads keep their size.
    - base_values: further values of the base model by config path: of what is given as an absolute number and yet grows
      with the width, as {attention.n_kv_heads: 2}.
    """

    base_d_model: PositiveInt
    base_values: dict[str, Any] | None = None

    def base(self, config: Config) -> Config:
        """The model's configuration in the sizes of the base model; ValueError if it cannot be derived."""
        base = at_width(config, self.base_d_model, self.base_values, "parametrization.base_")
        if problems := check(base):
            raise ValueError(f"parametrization.base_values: {': '.join(problems[0])}")
        return base

    def scale(self, decoder: Any, base: Any) -> None:
        """Scale a decoder from its base model, before `initialize`.

        `decoder.growth` then tells how much larger each hidden matrix is: all but vectors, embedding tables and the
        head. Modules that have `follow_base` set their multipliers. Raises ValueError if more than sizes differ.
        """
        shapes, base_shapes = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (decoder, base))
        odd = sorted(shapes.keys() ^ base_shapes.keys()) or sorted(
            name for name, shape in shapes.items() if len(shape) != len(base_shapes[name])
        )
        if odd:
            differ = "otherwise different: " + ", ".join(odd[:3])
            raise ValueError(f"the base model must have the parameters of the model in other sizes; {differ}")
        modules, base_modules = dict(decoder.named_modules()), dict(base.named_modules())
        others = {"head.weight"} | {f"{name}.weight" for name, m in modules.items() if isinstance(m, nn.Embedding)}
        decoder.growth = {
            name: Growth(shape, base_shapes[name])
            for name, shape in shapes.items()
            if len(shape) >= 2 and name not in others
        }
        # Table 8. Also where only the input grows, as that of the one key head of multi-query attention: the limit of
        # large width asks for 1 / fan_in there, as for an output; at real widths attention fades by it (docs/mup.md).
        decoder.std_factors = {name: 1 / math.sqrt(growth.fan_in) for name, growth in decoder.growth.items()}
        decoder.output_scale = base.embedding.embedding_dim / decoder.embedding.embedding_dim  # of logits
        for name, module in modules.items():
            if isinstance(module, Attention) and module.head_dim != (base_head_dim := base_modules[name].head_dim):
                # q and k that training has aligned have a product that grows like head_dim, not like its root
                module.score_scale = math.sqrt(base_head_dim) / module.head_dim
            if callable(follow := getattr(module, "follow_base", None)):
                follow(base_modules[name])

    def scale_learning_rates(self, optimizer: Optimizer, decoder: Any) -> None:
        """Give a new optimizer the learning rates of a decoder that has grown from its base model.

        What must not change with width is by how much a step changes what a layer puts out (2203.03466; as a condition
        on norms: Yang, Simon & Bernstein 2310.17813). Only hidden matrices need a multiplier for that, by how large the
        optimizer's updates are: it says so by a method `width_multiplier(group, growth)`, or MULTIPLIERS does;
        ValueError if neither.

        Weight decay is divided by the multiplier, so that lr · weight_decay, which a step takes off, stays as well: as
        in `mup.MuAdamW`, and as transfer needs (Wang & Aitchison 2405.13698; Kosson et al. 2510.19093). A group is
        split where its parameters need different multipliers; each part has `lr_multiplier`.
        """
        multiplier = getattr(optimizer, "width_multiplier", MULTIPLIERS.get(type(optimizer)))
        if multiplier is None:
            raise ValueError(
                f"parametrization=mup: {type(optimizer).__name__} does not say how its updates scale, by a method"
                " width_multiplier(group, growth): use optimizer=adamw, lion or muon, or parametrization=standard"
            )
        grown = {id(p): decoder.growth.get(name) for name, p in decoder.named_parameters()}
        groups: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            split: dict[float, list[Any]] = {}
            for parameter in group["params"]:
                growth = grown[id(parameter)]
                split.setdefault(1.0 if growth is None else multiplier(group, growth), []).append(parameter)
            for factor, parameters in split.items():
                decay = {"weight_decay": group["weight_decay"] / factor} if "weight_decay" in group else {}
                scaled = {"params": parameters, "lr": group["lr"] * factor, **decay, "lr_multiplier": factor}
                groups.append(group | scaled)
        optimizer.param_groups = groups


def at_width(config: Config, d_model: int, values: Mapping[str, Any] | None = None, prefix: str = "") -> Config:
    """A model's configuration at another width: heads of the same size, feed-forward layers in proportion.

    `values` are further settings by config path, which come first; `prefix` is what the user writes before `d_model`
    and `values`. Raises ValueError if heads do not fit the width, or a path leads nowhere.
    """
    model, values = config["model"], values or {}
    sizes: Config = {"model.d_model": d_model}
    if model.get("d_ff") is not None:  # match=params solves for any number: the nearest one is a base as good
        sizes["model.d_ff"] = max(1, round(model["d_ff"] * d_model / model["d_model"]))
    if "model.n_heads" not in values:
        heads, rest = divmod(model["n_heads"] * d_model, model["d_model"])
        if rest:
            size = math.lcm(model["d_model"], model["n_heads"]) // model["n_heads"]
            fix = f"use a multiple of {size}, or say {prefix}values={{model.n_heads: …}}"
            raise ValueError(f"{prefix}d_model={d_model} is no whole number of heads of the model's size: {fix}")
        sizes["model.n_heads"] = heads
    known = [path for path, _ in leaves(config)]
    for path, value in {**sizes, **values}.items():
        if path not in known:
            raise ValueError(f"{prefix}values: {path} {unknown(path, known, 'the model')}")
        config = set_value(config, path, value)
    return config
