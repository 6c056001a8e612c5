"""How all pictures look: colours that the colour-blind tell apart (Okabe & Ito), with a marker for each line."""

import math
import textwrap
import typing
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
WIDTH = 11.0
"""Inches of the widest figure."""
PHONE = 4.6
"""Inches of a figure whose panels stand below each other: as wide as a phone shows letters of this size."""
stacked: ContextVar[bool] = ContextVar("stacked", default=False)
"""Whether figures are drawn for a phone."""
STYLE: Any = {
    **{"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False},
    **{"font.size": 10, "axes.titlesize": 10.5, "figure.titlesize": 10.5, "legend.frameon": False},
    **{"svg.hashsalt": "thunderhead", "axes.formatter.useoffset": False, "axes.unicode_minus": True},
}
"""For `matplotlib.rc_context`."""


class Look(NamedTuple):
    """How one of several lines is drawn."""

    colour: str
    marker: str
    line: Any

    @property
    def of_line(self) -> dict[str, Any]:
        return {"color": self.colour, "linestyle": self.line}

    @property
    def of_marks(self) -> dict[str, Any]:
        return {"color": self.colour, "marker": self.marker}


def look(index: int) -> Look:
    return Look(COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)], LINES[index // len(COLOURS) % len(LINES)])


def panels(n: int, height: float, width: float = WIDTH, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side, on a phone below each other; `options` as of matplotlib's `subplots`."""
    if stacked.get():
        options.pop("width_ratios", None)
        figure = Figure(figsize=(PHONE, 0.85 * height * n), layout="constrained")
        return figure, list(figure.subplots(n, 1, squeeze=False, **options)[:, 0])
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, n, squeeze=False, **options)[0])


MANY = 12
"""Lines of a legend that still leaves a panel room."""


def legend(*panels: Axes, where: Literal["upper right", "best"] = "best") -> None:
    """In each panel; of more than MANY lines below the figure, which grows by as much.

    In a panel it gets no room of its own, which would leave the axes none.
    """
    labelled = [axes.get_legend_handles_labels() for axes in panels]
    if max(len(names) for _, names in labelled) <= MANY:
        for axes in panels:
            axes.legend(loc=where).set_in_layout(False)
        return
    lines = {name: line for lines, names in labelled for line, name in zip(lines, names, strict=True)}
    figure = typing.cast(Figure, panels[0].figure)
    shown = [textwrap.shorten(name, 60, placeholder=" …") for name in lines]
    columns = max(1, int(figure.get_figwidth() / (0.6 + 0.06 * max(map(len, shown)))))
    figure.set_figheight(figure.get_figheight() + 0.15 * math.ceil(len(shown) / columns))
    figure.legend(list(lines.values()), shown, loc="outside lower center", ncols=columns, fontsize="xx-small")
