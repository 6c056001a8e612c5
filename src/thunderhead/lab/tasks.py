"""Arms on tasks of lm-evaluation-harness, paired by example and seed; from the task_examples.json of their runs."""

from itertools import chain
from typing import NamedTuple

import numpy as np

from thunderhead.core.config import ConfigError, Problem, read_mapping
from thunderhead.lab import page, statistics
from thunderhead.lab.analysis import Analysis
from thunderhead.lab.multiplicity import ALPHA
from thunderhead.lab.page import NONE, Rows
from thunderhead.lab.runs import Run
from thunderhead.lab.statistics import signed

COLUMNS = ("task", "comparison", "scores", "Δ", "95 % CI", "seeds", "examples")
CAPTION = (
    "Mean score of both arms, and the difference, paired by example and seed: above 0 the first arm scores higher."
    " Intervals take seeds and examples for draws from many (of one seed, the examples alone), and hold for all rows"
    " of this table together."
)


class Scores(NamedTuple):
    """What one run got in the examples of a task."""

    examples: str  # what identifies them
    values: list[float]  # of each


def table(analysis: Analysis) -> Rows:
    """A row for each metric of a task and each comparison of arms that both have it; Bonferroni's intervals."""
    done = {arm.name: {seed: _scores(run) for seed, run in arm.runs.items()} for arm in analysis.arms}
    names = dict.fromkeys(chain.from_iterable(scores for by_seed in done.values() for scores in by_seed.values()))
    found = []
    for name in names:
        for compared in analysis.comparisons:
            arms = [done[arm] for arm in (compared.arm, compared.against)]
            seeds = [seed for seed in compared.differences if all(name in arm[seed] for arm in arms)]
            if seeds:
                found.append((name, compared, [[arm[seed][name] for seed in seeds] for arm in arms]))
    rows = []
    for name, compared, scores in found:
        each = list(chain(*scores))
        means = " / ".join(f"{np.mean([np.mean(one.values) for one in own]):.4f}" for own in scores)
        counts = [str(len(scores[0])), " / ".join(dict.fromkeys(f"{len(one.values):,}" for one in each))]
        difference, between = NONE, "seeds diverged"
        if len({(one.examples, len(one.values)) for one in each}) > 1:
            between = "not compared: other examples"
        elif not compared.diverged:
            first, second = (np.array([one.values for one in own]) for own in scores)
            interval = statistics.crossed_interval(first - second, ALPHA / len(found))
            difference, between = signed(float(np.mean(first - second))), page.interval(interval, "signed")
        rows.append((name, f"{compared.arm} − {compared.against}", means, difference, between, *counts))
    return Rows(COLUMNS, rows, CAPTION)


def _scores(run: Run) -> dict[str, Scores]:
    """By task and metric; those of another checkpoint than the last say so. What an earlier end gave is left out.

    Raises ConfigError if the file is damaged.
    """
    file, found = run.folder / "task_examples.json", dict[str, Scores]()
    try:
        for checkpoint, tasks in (read_mapping(file, "runs") if file.is_file() else {}).items():
            of = "" if checkpoint == "last" else f" ({checkpoint})"
            for task, kept in tasks.items():
                if kept["steps"] == run.number("steps"):
                    for metric, values in kept["scores"].items():
                        found[f"{task} {metric}{of}"] = Scores(kept["examples"], [float(value) for value in values])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        message = f"{file} is damaged ({error!r}): delete it, and evaluate the run again"
        raise ConfigError([Problem("runs", message)]) from error
    return found
