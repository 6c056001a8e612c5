"""What all reports are made of: tables, pictures, HTML pages, and lines on the terminal."""

import base64
import contextlib
import io
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jinja2
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape

from thunderhead import disk
from thunderhead.lab import drawn, looks
from thunderhead.lab.runs import Failure
from thunderhead.lab.statistics import Interval, signed

NONE = "–"
"""Stands for what was not measured."""
MOST_POINTS = 10_000
"""Of the lines of a figure that is embedded as lines: some 100 runs."""
Item = TypeVar("Item")


class Rows(NamedTuple):
    """A table of a page, as text."""

    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    caption: str = ""


def table(items: Iterable[Item], columns: Mapping[str, Callable[[Item], str]], caption: str = "") -> Rows:
    """A row an item; `columns` say what stands in a cell."""
    return Rows([*columns], [[cell(item) for cell in columns.values()] for item in items], caption)


def number(value: Any, form: str) -> str:
    return NONE if value is None else f"{value:{form}}"


def interval(found: Interval | None, form: str = ".4f") -> str:
    """0.9871 … 1.0203; `form` "signed" writes the signs of differences."""
    if found is None:
        return NONE
    low, high = (signed(value) if form == "signed" else f"{value:{form}}" for value in found)
    return f"{low} … {high}"


def write(
    folder: Path,
    template: str,
    *,
    subtitle: str,
    figures: Mapping[str, tuple[str, Callable[[Item], Figure | None]]],
    of: Item | None,
    left_out: Sequence[Failure],
    **content: Any,
) -> Path:
    """Write report.html from a template of this folder, and its figures as PNG and CSV files, in place of earlier ones.

    The page's subtitle gets date and program; `figures` holds by file name what a figure shows, and what draws it `of`
    what was found, if anything was; `left_out` runs that have no result; `content` what else the template takes.
    """
    pictures = {}
    with mpl.rc_context(looks.STYLE):
        for name, (caption, draw) in figures.items():
            file = folder / "figures" / f"{name}.png"
            file.unlink(missing_ok=True)
            file.with_suffix(".csv").unlink(missing_ok=True)
            if of is None or (figure := draw(of)) is None:
                continue
            with disk.naming(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(file, dpi=150)
            drawn.write_csv(file.with_suffix(".csv"), figure)
            width = f"{100 * figure.get_figwidth() / looks.WIDTH:.0f}"
            sources = {"source": _embedded(figure), "on_a_phone": _embedded(_narrow(draw, of))}
            pictures[name] = {**sources, "width": width, "caption": caption}
    with contextlib.suppress(OSError):
        (folder / "figures").rmdir()  # of an earlier report that had some
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("thunderhead.lab", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.globals["contents"] = re.compile(r'<section id="(\w+)"><h2>(.*?)</h2>').findall
    page = environment.get_template(template).render(
        subtitle=f"{subtitle} · {datetime.now():%Y-%m-%d %H:%M} · Thunderhead",
        figures=pictures,
        failures=Rows(("run", "why"), left_out),
        **content,
    )
    disk.write_text(folder / "report.html", page)
    return folder / "report.html"


def _narrow(draw: Callable[[Item], Figure | None], of: Item) -> Figure:
    token = looks.stacked.set(True)
    try:
        figure = draw(of)
    finally:
        looks.stacked.reset(token)
    assert figure is not None
    for axes in figure.axes:
        axes.set(title=textwrap.fill(axes.get_title(), 50), xlabel=textwrap.fill(axes.get_xlabel(), 50))
        names = [label.get_text() for label in axes.get_yticklabels()]  # empty where they are numbers
        if any(names):
            axes.set_yticks(axes.get_yticks(), [_wrapped(name) for name in names])
        for text in legend.get_texts() if (legend := axes.get_legend()) is not None else ():
            text.set_text(_wrapped(text.get_text()))
    if title := figure.get_suptitle():
        figure.suptitle(textwrap.fill(title, 52))
    return figure


def _wrapped(name: str) -> str:
    """What is called so long that nothing would be left of the figure beside it, in a few lines."""
    return textwrap.fill(name, 24, max_lines=3, placeholder=" …")


def _embedded(figure: Figure) -> str:
    """For the page: as lines, which stay sharp on paper; as pixels where these are so many that they take less."""
    n_points = sum(np.size(line.get_xdata()) for axes in figure.axes for line in axes.lines)
    kind, more = ("svg+xml", {"metadata": {"Date": None}}) if n_points < MOST_POINTS else ("png", {"dpi": 200})
    content = io.BytesIO()
    figure.savefig(content, format=kind.removesuffix("+xml"), **more)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def tell(
    console: Console,
    answers: Iterable[tuple[str, str]],
    warnings: Iterable[str],
    left_out: Iterable[Failure],
    *,
    how: str,
    report: Path | None,
) -> None:
    """The answers, each with the colour of its mark, what to beware of, and runs that were not compared, or fitted."""
    lines = [f"[{colour}]•[/] {escape(sentence)}" for colour, sentence in answers]
    lines += [f"[yellow]read with care:[/] {escape(warning)}" for warning in warnings]
    lines += [f"[red]not {how}:[/] {escape(run)}: {escape(reason)}" for run, reason in left_out]
    for line in [*lines, f"[cyan]report[/] {escape(str(report))}"] if report else lines:
        console.print(line, soft_wrap=True)
