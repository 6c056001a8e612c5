"""Loggers are sinks: any of Lightning's gets configuration and plan, rows, and where it can text and figures."""

import contextlib
import inspect
import re
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure

from thunderhead import disk
from thunderhead.core.config import read_mapping
from thunderhead.training import record
from thunderhead.training.about import card

SECTIONS = (
    (r"(train|val)/loss", r"loss/\1"),
    (r"(train)/(.+)", r"loss/\1_\2"),
    (r"(val)/((loss|perplexity|bits_per_byte)(/.+)?)", r"loss/\1_\2"),
    (r"(val/.+)", r"metric/\1"),
    (r"(tokens_per_second|mfu)", r"speed/\1"),
    (r"((tokens|flops|share|epochs)(/.+)?|step)", r"usage/\1"),
    (r"(sample|choices)", r"\1"),
    (r"(.+)", r"training/\1"),
)
"""What TensorBoard's charts are called: it sorts them by the alphabet, and each first word has a section."""
UNCOMPARED = {
    *("trainer", "strategy", "compile", "activation_checkpointing", "plan"),
    *("generation", "validation", "parameter_groups"),
}
"""Groups that say where a run is computed, or are seldom chosen: TensorBoard's HParams has no column for them."""
COMPARED = ("loss/val", "loss/train", "speed/tokens_per_second")
"""Columns of results beside the settings, in TensorBoard's HParams."""


def chart(name: str) -> str:
    """What a column of metrics.csv is called in TensorBoard: train/loss is loss/train."""
    return next(re.sub(pattern, shown, name) for pattern, shown in SECTIONS if re.fullmatch(pattern, name))


class TensorBoard(TensorBoardLogger):
    """Events in the run's folder: each value once, by the tokens seen or by the step (`axis`).

    Its charts come in the order loss, metric, speed, training, usage; Text has the choices, and HParams what compares.
    """

    def __init__(self, save_dir: str, *, axis: Literal["tokens", "steps"] = "tokens"):
        super().__init__(save_dir, name="", version="", default_hp_metric=False)
        self.axis, self._tokens_per_step = axis, 1
        self._end: Any = None  # of the session, for HParams

    def _at(self, step: int) -> int:
        return step * self._tokens_per_step if self.axis == "tokens" else step

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Write the card of choices, and what HParams compares: the same columns in each run."""
        from torch.utils.tensorboard.summary import hparams  # imports TensorBoard: not for a plan

        assert isinstance(params, dict)
        plan, told = params["planned"], params["about"]
        self._tokens_per_step = plan["tokens_per_step"]
        model, optimizer = params.get("model", {}), params.get("optimizer", {})
        sizes = {"n_layers": model.get("n_layers"), "d_model": model.get("d_model"), "lr": optimizer.get("lr")}
        counted = {"parameters": plan["parameters"]["total"], "tokens": plan["tokens"], "seed": params["seed"]}
        numbers = {name: value for name, value in {**sizes, **counted}.items() if value is not None}
        chosen = {group: words for group, words in told["choices"].items() if group not in UNCOMPARED}
        self.experiment.add_text("choices", card(params), 0)
        *start, self._end = hparams({**chosen, **numbers}, dict.fromkeys(COMPARED, 0.0))  # type: ignore[no-untyped-call]
        for summary in start:
            self.experiment._get_file_writer().add_summary(summary)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step or 0, **metrics}
        row.pop("tokens" if self.axis == "tokens" else "step", None)  # which is the axis
        super().log_metrics({chart(name): value for name, value in row.items()}, self._at(step or 0))

    @rank_zero_only
    def log_text(self, name: str, text: str, step: int) -> None:
        self.experiment.add_text(chart(name), f"```\n{text}\n```", self._at(step))

    @rank_zero_only
    def log_figure(self, name: str, figure: Figure, step: int) -> None:
        self.experiment.add_figure(chart(name), figure, self._at(step))

    @rank_zero_only
    def save(self) -> None:
        """Nothing beside the events: the record holds the configuration."""
        self.experiment.flush()

    @rank_zero_only
    def close(self, status: Literal["success", "failed"]) -> None:
        if status == "success" and self._end is not None:
            self.experiment._get_file_writer().add_summary(self._end)
        self.finalize(status)


def finish(loggers: Iterable[Logger], status: Literal["success", "failed"]) -> None:
    """Tell loggers that a run has ended: by `close(status)`, if they have it, else as Lightning does at each end."""
    for logger in loggers:
        with contextlib.nullcontext() if status == "success" else contextlib.suppress(OSError):
            getattr(logger, "close", logger.finalize)(status)


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


def forget_from(logger: Logger, step: int, tokens: int) -> dict[str, float]:
    """Take out of a logger's files what a resumed run writes again, or has left behind on another branch.

    That is, values of step `step` on, and everything after it; ours for TensorBoard may have tokens for steps.
    Returns what was measured in that step, if the logger knows.
    """
    if callable(forget := getattr(logger, "forget_from", None)):
        return dict(forget(step))
    if not isinstance(logger, TensorBoardLogger):
        return {}
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader  # imports half of it
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    first = tokens if getattr(logger, "axis", "steps") == "tokens" else step
    for file in Path(logger.log_dir).glob("events.out.tfevents.*"):
        events = [*RawEventFileLoader(str(file)).Load()]
        kept = [event for event in events if not _is_later(Event.FromString(event), first)]
        if len(kept) < len(events):
            logger.experiment.close()  # it may still write there; the next value opens another file
            with disk.replacing(file) as stream:
                writer = RecordWriter(stream)
                for event in kept:
                    writer.write(event)
    return {}


def _is_later(event: Any, first: int) -> bool:
    value = event.summary.value[0] if event.summary.value else None
    return bool(value and (event.step > first or (event.step == first and value.HasField("simple_value"))))


def _tensorboard(logger: Logger, name: str) -> Any:
    return getattr(getattr(logger, "experiment", None), name, None)


def _takes(log: Callable[..., None], *values: Any) -> bool:
    """Whether a method can be called so; one of the same name may be of another kind, and is left alone."""
    try:
        inspect.signature(log).bind(*values)
    except TypeError:
        return False
    return True


def show_tasks(run: Path, summary: Mapping[str, Any]) -> None:
    """Write the scores of tasks in a run's summary beside its events for TensorBoard, at the run's end.

    They are metrics like those of validation; of another checkpoint than the last they say which.
    """
    from torch.utils.tensorboard import SummaryWriter

    others = [file for file in run.glob("events.out.tfevents.*") if not file.name.endswith(".tasks")]
    if not others:
        return
    for old in run.glob("events.out.tfevents.*.tasks"):
        old.unlink()
    axes = [node.get("axis") for node in read_mapping(run / "config.yaml").get("logger", {}).values()]
    end = summary["tokens" if "tokens" in axes else "steps"]
    with SummaryWriter(str(run), filename_suffix=".tasks") as writer:
        for checkpoint, found in summary["tasks"].items():
            for name, value in record.scores_of(found).items():
                writer.add_scalar(chart(f"val/{name}" + f" ({checkpoint})" * (checkpoint != "last")), value, end)


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
