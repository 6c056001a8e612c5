"""`python coordinate_check.py`: whether a few steps change activations by the same amount at every width.

If they do, the best learning rate of a small model is that of a large one (Yang et al. 2203.03466, appendix D.1, where
this check is from). What is measured is the mean absolute change, over all coordinates, of what a layer puts out, from
before the first step to after the last one, on the batch that is trained on. Of the logits it is that of the targets,
against the mean logit: all others' holds what random initial weights of the head make of a change, and that part falls
as 1 / sqrt(width) by design.

Shape letters: B sequences, T tokens a sequence.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor

from thunderhead import command_line
from thunderhead.core import components
from thunderhead.core import config as configuration
from thunderhead.core.config import Config, ConfigError, Problem, first_line
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.model.loss import with_terms
from thunderhead.core.model_spec import COMPONENTS, build_decoder, build_optimizer
from thunderhead.core.types import NonNegativeInt, PositiveFloat, PositiveInt
from thunderhead.lab.arms import option_of
from thunderhead.lab.looks import STYLE, look, panels
from thunderhead.terminal import Console, say

Changes = dict[str, dict[int, float]]
"""Mean absolute change, by layer and width."""
Resize = Callable[[Config, int, Mapping[str, Any] | None], Config]
"""Gives a model's configuration at another width, with further values: `at_width` of the parametrizations."""


def settings(
    *,
    widths: list[PositiveInt],
    steps: PositiveInt,
    sequences: PositiveInt,
    vocab_size: PositiveInt,
    seeds: list[NonNegativeInt],
    tolerance: PositiveFloat,
    values: dict[str, Any] | None = None,
) -> None:
    """The top-level settings, for the check: see conf/coordinate_check.yaml."""


def check_coordinates(config: DictConfig, resize: Resize) -> None:
    """Measure, print a table, draw coordinates.png; exit status 1 if the parametrization does not keep its promise.

    ConfigError if the configuration is refused, at some width.
    """
    folder = command_line.output_dir()
    resolved = configuration.plain(config)
    try:
        if problems := components.check(resolved, settings):
            raise ConfigError(problems)
        if len(set(resolved["widths"])) < 2:
            raise ConfigError([Problem("widths", "needs two widths or more: widths=[64,128,256]")])
        standard = configuration.read_yaml(configuration.CONF_DIR / "parametrization" / "standard.yaml")
        compared = {"standard": standard, option_of("parametrization", resolved): resolved["parametrization"]}
        names = ("widths", "values", "steps", "sequences", "vocab_size", "seeds")
        measured = {
            name: changes({**resolved, "parametrization": node}, resize, **{n: resolved[n] for n in names})
            for name, node in compared.items()
        }
    except (ConfigError, ValueError) as error:
        command_line.remove_if_empty(folder)
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([Problem("", first_line(error))]) from error
    picture = folder / "coordinates.png"
    with mpl.rc_context(STYLE):
        draw(measured).savefig(picture, dpi=110)
    name, found = list(measured.items())[-1]
    _show(name, found)
    off = {layer: slope for layer, slope in slopes(found).items() if not abs(slope) <= resolved["tolerance"]}
    say(f"figure  {picture}")
    if off:
        told = ", ".join(f"{layer} as width^{slope:+.2f}" for layer, slope in off.items())
        say(f"not kept: the change depends on the width beyond ±{resolved['tolerance']:g}: {told}")
        sys.exit(1)
    say(f"kept: no change grows or shrinks faster than width^±{resolved['tolerance']:g}")


def changes(
    config: Config,
    resize: Resize,
    widths: Sequence[int],
    values: Mapping[str, Any] | None,
    *,
    steps: int,
    sequences: int,
    vocab_size: int,
    seeds: Sequence[int],
) -> Changes:
    """Train the configured model at each width, resized, and see how much its activations change.

    It makes `steps` of the optimizer at its peak learning rate on one batch of `sequences`, without dropout, whose
    tokens are drawn by Zipf's law; the mean over `seeds` (of weights and tokens) counts. `values` are further settings
    by config path at every width.

    ValueError if a model or optimizer cannot be built at a width, or the attention cannot train on a CPU.
    """
    found: Changes = {}
    for width in widths:
        sized = {**config, **resize({n: config[n] for n in ("model", *COMPONENTS)}, width, values)}
        for seed in seeds:
            decoder = build_decoder(sized, vocab_size, 0)
            if any(getattr(mixer, "needs_flex", False) for mixer in decoder.mixers):
                raise ValueError(
                    "attention.logit_softcap and attention.backend=flex need flex_attention, which trains on CUDA only:"
                    " check with attention.logit_softcap=null and attention.backend=auto"
                )
            decoder.initialize(seed)
            decoder.eval()
            optimizer = build_optimizer(sized, decoder)
            by_rank, generator = 1 / torch.arange(1, vocab_size + 1), torch.Generator().manual_seed(seed)
            n_tokens = sequences * (decoder.context_length + 1)
            tokens_BT1 = torch.multinomial(by_rank, n_tokens, True, generator=generator).view(sequences, -1)
            inputs_BT, targets_BT = tokens_BT1[:, :-1], tokens_BT1[:, 1:]
            before = _activations(decoder, inputs_BT, targets_BT)
            for _ in range(steps):
                optimizer.zero_grad()
                decoder(inputs_BT, targets_BT).loss.backward()
                optimizer.step()
            for layer, after in _activations(decoder, inputs_BT, targets_BT).items():
                change = float((after - before[layer]).abs().mean()) / len(seeds)
                by_width = found.setdefault(layer, {})
                by_width[width] = by_width.get(width, 0.0) + change
    return found


@torch.no_grad()
def _activations(decoder: Decoder, inputs_BT: Tensor, targets_BT: Tensor) -> dict[str, Tensor]:
    """What the layers put out: embedding, branches and sum of each block, logits of the targets."""
    found: dict[str, Tensor] = {}

    def keep(name: str, module: Any, inputs: Any, output: Any) -> None:
        found[name], _ = with_terms(output)

    modules: dict[str, torch.nn.Module] = {"embedding": decoder.embedding}
    for index, block in enumerate(decoder.blocks):
        parts = {"attention": block.attention, "feed-forward": block.feedforward, "output": block}
        modules |= {f"block {index} {part}": module for part, module in parts.items()}  # type: ignore[misc]
    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(functools.partial(keep, name)))
        logits_BTV = decoder.logits(inputs_BT)
    target_BT = logits_BTV.gather(-1, targets_BT[..., None]).squeeze(-1)
    return found | {"target logits": target_BT - logits_BTV.mean(-1)}


def slopes(found: Changes) -> dict[str, float]:
    """Exponent a of change ∝ width^a of each layer, by least squares; 0 is what muP promises."""
    return {
        layer: float(np.polyfit(np.log(list(by_width)), np.log(list(by_width.values())), 1)[0])
        for layer, by_width in found.items()
    }


def draw(measured: dict[str, Changes]) -> Figure:
    """The change against the width, both logarithmic: a panel for each parametrization, a line for each layer."""
    figure, axes_of = panels(len(measured), 4.2, 5.2 * len(measured), sharey=True)
    for axes, (name, found) in zip(axes_of, measured.items(), strict=True):
        for index, (layer, slope) in enumerate(slopes(found).items()):
            its, label = look(index), f"{layer} ({slope:+.2f})"
            axes.plot(list(found[layer]), list(found[layer].values()), **its.of_line, marker=its.marker, label=label)
        widths = list(next(iter(found.values())))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.set(xlabel="d_model", title=name)
        axes.legend(fontsize=8, title="layer (slope)")
    axes_of[0].set_ylabel("mean |change| of the activations")
    return figure


def _show(name: str, found: Changes) -> None:
    table = Table(box=None, pad_edge=False, header_style="cyan", title=f"{name}: mean |change| by width")
    for heading in ("layer", *map(str, next(iter(found.values()))), "slope"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for layer, slope in slopes(found).items():
        table.add_row(layer, *(f"{change:.3g}" for change in found[layer].values()), f"{slope:+.2f}")
    Console(highlight=False).print(table)
