"""What a figure shows, as numbers: every line, mark, bar and band of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from thunderhead.training import record

COLUMNS = ("panel", "series", "x", "y")


def write_csv(path: Path, figure: Figure) -> None:
    """A row a point: the axes' label of x, the series, and both coordinates as drawn.

    Series are named by what was drawn with a `label`; one that begins with _ is in no legend, but here.
    """
    points = (point for axes in figure.axes for point in _points(axes))
    record.write_rows(path, COLUMNS, [dict(zip(COLUMNS, point, strict=True)) for point in points])


def _points(axes: Axes) -> Iterator[tuple[Any, ...]]:
    series: dict[Any, str] = {artist: str(artist.get_label()) for artist in (*axes.lines, *axes.collections)}
    for container in axes.containers:
        if isinstance(container, ErrorbarContainer):
            line, caps, bars = container.lines
            series |= {line: str(container.get_label()), **dict.fromkeys(caps, "")}
            for low_and_high in (segment for bar in bars for segment in bar.get_segments()):
                for x, y in np.asarray(low_and_high):
                    yield axes.get_xlabel(), f"{_name(container.get_label())}: interval", x, y
    for artist, label in series.items():
        if not (name := _name(label)):
            continue
        if isinstance(artist, PolyCollection):  # the band's outline, of pieces; none where nothing is finite
            places = np.concatenate([np.empty((0, 2)), *(np.asarray(path.vertices) for path in artist.get_paths())])
        elif isinstance(artist, Line2D):
            places = np.asarray(artist.get_xydata(), float)
        else:
            continue
        for x, y in places:
            yield axes.get_xlabel(), name, x, y


def _name(label: object) -> str:
    """Of a series; empty if it was drawn without a label."""
    return "" if str(label).startswith(("_child", "_nolegend")) else str(label).removeprefix("_")
