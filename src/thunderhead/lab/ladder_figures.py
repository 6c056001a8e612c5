"""The picture of a ladder."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from thunderhead.lab import looks
from thunderhead.lab.ladder import Ladder
from thunderhead.lab.looks import look, panels

TICKS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 7, 10, 20, 50)
"""Multipliers that are written at the axis, as many as there is room for."""
REACH = 3.0
"""Times the multipliers that the axis goes beyond them: a bar that reaches its end goes on."""


def ladder(found: Ladder) -> Figure:
    """Multipliers by compute with their trend and the projection; loss by compute beside it."""
    figure, (left, right) = panels(2, 4.4, width_ratios=(1.5, 1))
    left.axhline(1, color="#444444", linewidth=1)
    values, ends = [1.0], [1.0]
    for index, arm in enumerate(found.arms, 1):
        its, name = look(index), arm.arm
        flops = [effect.arm.flops for effect in arm.effects]
        line = np.geomspace(flops[0], flops[-1], 30)
        fitted = [arm.line(float(c)) for c in line]
        left.plot(line, [f.value for f in fitted], **its.of_line, label=f"_{name}: trend")
        left.fill_between(
            line,
            *np.array([f.interval for f in fitted]).T,
            color=its.colour,
            alpha=0.15,
            linewidth=0,
            label=f"_{name}: trend, 90 % CI",
        )
        tested = [e for e in found.tested[name].effects if e.arm.flops > flops[-1]] if name in found.tested else []
        far, projection = found.projections[name]
        for label, marker, size, points in (
            ("measured", its.marker, 8, [(e.arm.flops, e.multiplier) for e in arm.effects]),
            ("held out", "*", 15, [(e.arm.flops, e.multiplier) for e in tested]),
            ("projection", "D", 6, [(far, projection)]),
        ):
            for c, (value, (low, high)) in points:
                mark: Any = {"marker": marker, "markersize": size, "color": its.colour, "capsize": 4}
                if label == "projection":
                    mark["markerfacecolor"] = "white"
                values.append(value)
                ends += [low, high]
                left.errorbar([c], [value], yerr=[[value - low], [high - value]], **mark, label=f"_{name}: {label}")
        own = [(e.arm.flops, e.arm.mean) for e in (*arm.effects, *tested)]
        right.plot(*np.array(own).T, **its.of_marks, linestyle=its.line, label=f"{name}: {arm.verdict}")
    widest = found.tested.get(found.arms[0].arm, found.arms[0]).effects
    base = np.array([(e.baseline.flops, e.baseline.mean) for e in widest]).T
    right.plot(*base, **look(0).of_marks, linestyle="-", label=found.baseline)
    right.set(xscale="log", xlabel="training FLOPs", ylabel="final validation loss (nats)", title="Loss by compute")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2 if looks.stacked.get() else 4)
    better = f"compute multiplier (above 1: better than {found.baseline})"
    left.set(xscale="log", yscale="log", xlabel="training FLOPs of a run", ylabel=better)
    left.set_title("Worth of compute, bars and bands: 90 % CI; ★ held out, ◇ projected")
    bottom, top = max(min(ends), min(values) / REACH), min(max(ends), max(values) * REACH)
    margin = 1.15 * max(top / bottom, 1.1) ** 0.1
    low, high = bottom / margin, top * margin
    left.set_ylim(low, high)
    ticks = [tick for tick in TICKS if low <= tick <= high]
    left.set_yticks(ticks[:: 1 + len(ticks) // 10] if 1 not in ticks else _around_one(ticks))
    left.yaxis.set_minor_locator(NullLocator())
    left.yaxis.set_minor_formatter(NullFormatter())
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} ×"))
    return figure


def _around_one(ticks: list[float]) -> list[float]:
    """Few enough to be read, 1 among them."""
    step, one = 1 + len(ticks) // 10, ticks.index(1)
    return ticks[one % step :: step]


FIGURES = {"ladder": ("What each arm is worth in compute, by size, and the losses", ladder)}
