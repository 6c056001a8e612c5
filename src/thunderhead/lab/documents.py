"""Differences of final losses as they would be over other text, too: from the document_losses.json of runs."""

import math

import numpy as np
from numpy.typing import NDArray

from thunderhead.core.config import ConfigError, Problem, read_mapping
from thunderhead.lab import statistics
from thunderhead.lab.analysis import Analysis
from thunderhead.lab.multiplicity import ALPHA
from thunderhead.lab.runs import Run
from thunderhead.lab.statistics import Interval


def intervals(analysis: Analysis) -> dict[tuple[str, str], Interval]:
    """Intervals of the mean differences of arms, over seeds and documents drawn from many, that hold all at once.

    Each document counts with its part of the loss, so that their mean is the difference itself. A comparison is left
    out if its runs did not keep the same documents, if seeds diverged, or if there is one document; also, with a
    warning, if what a run kept is damaged.
    """
    runs, found = {arm.name: arm.runs for arm in analysis.arms}, dict[tuple[str, str], Interval]()
    for compared in analysis.comparisons:
        pair = compared.arm, compared.against
        try:
            parts = [_parts(runs[arm][seed], analysis.metric) for arm in pair for seed in compared.differences]
        except ConfigError as error:
            analysis.warnings += [p.message for p in error.problems if p.message not in analysis.warnings]
            continue
        known = [each for each in parts if each is not None]
        if not parts or compared.diverged or len(known) < len(parts) or len({len(each) for each in known}) > 1:
            continue
        first, second = np.split(np.array(known), 2)
        if interval := statistics.crossed_interval(first - second, ALPHA / len(analysis.comparisons)):
            found[pair] = interval
    return found


def _parts(run: Run, metric: str) -> NDArray[np.float64] | None:
    """Of each document its part of the run's result times their number: the mean over them is the result, (E,).

    None where it was not kept, or at an earlier end of the run. Raises ConfigError if the file is damaged.
    """
    file = run.folder / "document_losses.json"
    if not file.is_file():
        return None
    try:
        kept = read_mapping(file, "runs")
        if kept["steps"] != run.number("steps"):
            return None
        parts = []
        for source in kept["sources"].values():  # of whose losses the result is the plain mean
            over = sum(source["targets"]) if metric == "val_loss" else source["bytes"] * math.log(2)
            parts.append(np.array(source["nats"], dtype=np.float64) / over / len(kept["sources"]))
        each = np.concatenate(parts)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            [Problem("runs", f"{file} is damaged ({error!r}): there is no interval over text")]
        ) from error
    return each * len(each)
