"""Loggers are sinks: any of Lightning's gets configuration and plan, rows, and where it can text and figures."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

from thunderhead import disk


def log_text(loggers: Iterable[Logger], name: str, text: str, step: int) -> None:
    """Show a text: by the logger's own `log_text(name, text, step)`, W&B's, or a TensorBoard-like `add_text`."""
    for logger in loggers:
        if callable(log := getattr(logger, "log_text", None)):
            if "columns" in inspect.signature(log).parameters:
                log(key=name, columns=["text"], data=[[text]], step=step)
            elif _takes(log, name, text, step):
                log(name, text, step)
        elif callable(add := _tensorboard(logger, "add_text")):
            add(name, f"```\n{text}\n```", step)


def log_figure(loggers: Iterable[Logger], name: str, figure: Figure, step: int) -> None:
    """Show a figure: by `log_figure(name, figure, step)`, W&B's `log_image`, or a TensorBoard-like `add_figure`."""
    for logger in loggers:
        if callable(log := getattr(logger, "log_figure", None)):
            if _takes(log, name, figure, step):
                log(name, figure, step)
        elif callable(log := getattr(logger, "log_image", None)):
            log(key=name, images=[figure], step=step)
        elif callable(add := _tensorboard(logger, "add_figure")):
            add(name, figure, step)


def log_by_tokens(logger: Logger, log: Callable[..., None], row: Mapping[str, Any], tokens: int) -> None:
    """Give a TensorBoard-like logger, whose only axis is the step, the row once more with the tokens as its axis."""
    if callable(_tensorboard(logger, "add_scalar")):
        log({f"by_tokens/{name}": value for name, value in row.items()}, step=tokens)


def forget_from(logger: Logger, step: int, tokens: int) -> dict[str, float]:
    """Take out of a logger's files what a resumed run writes again, or has left behind on another branch.

    That is, values of step `step` on, and everything after it; TensorBoard's `by_tokens/…` has tokens for steps.
    Returns what was measured in that step, if the logger knows.
    """
    if callable(forget := getattr(logger, "forget_from", None)):
        return dict(forget(step))
    if not isinstance(logger, TensorBoardLogger):
        return {}
    for file in Path(logger.log_dir).glob("events.out.tfevents.*"):
        events = [*RawEventFileLoader(str(file)).Load()]
        kept = [event for event in events if not _is_later(Event.FromString(event), step, tokens)]
        if len(kept) < len(events):
            logger.experiment.close()  # it may still write there; the next value opens another file
            with disk.replacing(file) as stream:
                writer = RecordWriter(stream)
                for event in kept:
                    writer.write(event)
    return {}


def _is_later(event: Any, step: int, tokens: int) -> bool:
    value = event.summary.value[0] if event.summary.value else None
    if value is None:
        return False
    first = tokens if value.tag.startswith("by_tokens/") else step
    return bool(event.step > first or (event.step == first and value.HasField("simple_value")))


def _tensorboard(logger: Logger, name: str) -> Any:
    return getattr(getattr(logger, "experiment", None), name, None)


def _takes(log: Callable[..., None], *values: Any) -> bool:
    """Whether a method can be called so; one of the same name may be of another kind, and is left alone."""
    try:
        inspect.signature(log).bind(*values)
    except TypeError:
        return False
    return True


def draw_schedule(schedule: Callable[[int, int], float], peak: float, total_steps: int, tokens_per_step: int) -> Figure:
    """The planned learning rate over the run, with the tokens as a second axis."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    steps = range(total_steps)
    axes.plot(steps, [peak * schedule(step, total_steps) for step in steps], color="#0072B2")
    axes.set(xlabel="step", ylabel="learning rate", title="Planned learning rate", ylim=(0, None))
    axes.grid(alpha=0.3)
    there_and_back = (lambda step: step * tokens_per_step, lambda tokens: tokens / tokens_per_step)
    axes.secondary_xaxis("top", functions=there_and_back).set_xlabel("tokens")
    return figure
