"""What a run draws from each source: how long it lasts, how often text is repeated, and how often is too often."""

import bisect
import math
from collections.abc import Callable, Iterable, Mapping

from thunderhead.core.config import Problem
from thunderhead.core.data.datamodule import Draw
from thunderhead.corpus.mixture import Turns
from thunderhead.corpus.sources import Share

# Muennighoff et al. 2305.16264: up to 4 epochs repeated data is about as good as new; the worth of a repetition decays
# with a constant of 15.4 repetitions, so after 16 epochs it is 1/e of new data's.
LITTLE_IS_LOST_UNTIL = 4
LITTLE_IS_GAINED_AFTER = 16


def draw(
    sources: Mapping[str, Share],
    available: Mapping[str, int],
    turns_of: Callable[[int], Turns],
    *,
    steps: int,
    sequences: int,
    may_end: bool,
    is_part: bool,
) -> Draw:
    """Work out what so many steps draw from each source; fewer steps where a source that ends ends the run.

    Args:
        sources: with weights and max_epochs.
        available: blocks of each that are trained on.
        turns_of: whose turn it is in a run of so many steps.
        steps: that are asked for.
        sequences: of a step.
        may_end: whether a source that reaches its max_epochs ends the run (data.at_max_epochs=stop).
        is_part: whether data.max_training_tokens leaves a part of the data out.
    """
    asked = steps
    notes: list[str] = []
    problems: list[Problem] = []
    try:
        turns = turns_of(steps)
        while turns.end is not None and turns.end < steps * sequences:
            steps = turns.end // sequences
            if steps == 0:
                raise ValueError(
                    f"data.sources: max_epochs leaves {turns.end} sequences, fewer than the {sequences} of one step:"
                    " raise it, or lower batch.global_tokens"
                )
            turns = turns_of(steps)  # stages are fractions of the run, which is shorter now
    except ValueError as error:
        return Draw(asked, problems=(Problem("", str(error)),))
    if steps < asked:
        told = " and ".join(f"{s} (data.sources.{s}.max_epochs={sources[s].max_epochs:g})" for s in turns.used_up)
        if not may_end:
            message = (
                f"only lasts for {steps:,} of {asked:,} steps: all with a weight are used up: {told}; raise"
                f" max_epochs, or lower the budget, as budget=steps budget.steps={steps}"
            )
            problems.append(Problem("data.sources", message))
        notes.append(f"stops after {steps:,} of {asked:,} steps, when {told} is used up")
    elif not may_end:
        notes += [
            f"{source} reaches max_epochs={sources[source].max_epochs:g} in step {n // sequences + 1:,}, then the"
            " others take its place"
            for source, n in turns.used_up.items()
            if n < steps * sequences
        ]
    counts = turns.counts(steps * sequences)
    epochs = {source: counts[source] / n for source, n in available.items()}
    allowed = [name for name, source in sources.items() if source.max_epochs is not None]

    def is_too_long(steps: int) -> bool:
        turns = turns_of(steps)
        counts = turns.counts(min(steps * sequences, turns.end or steps * sequences))
        return any(counts[s] > LITTLE_IS_GAINED_AFTER * n for s, n in available.items() if s not in allowed)

    repeated, refused = repetition(
        epochs,
        allowed,
        is_part=is_part,
        fitting=lambda: bisect.bisect_left(range(1, steps), True, key=is_too_long),
    )
    shares = {source: counts[source] / (steps * sequences) for source in available}
    problems += [Problem("", message) for message in refused]
    return Draw(steps, epochs, shares, (*notes, *repeated), tuple(problems))


def repetition(
    epochs: Mapping[str, float], allowed: Iterable[str], *, is_part: bool, fitting: Callable[[], int]
) -> tuple[list[str], list[str]]:
    """Judge how often sources are repeated.

    Args:
        epochs: of each source in the run.
        allowed: sources whose max_epochs the user has set: these may be repeated as often as that.
        is_part: whether data.max_training_tokens leaves a part of the data out.
        fitting: says how many steps no source is repeated too often in.

    Returns:
        What is worth knowing, and what is refused.
    """
    notes, refused = [], []
    for name, n in epochs.items():
        if n > LITTLE_IS_GAINED_AFTER and name not in set(allowed):
            steps = fitting()
            ways = [f"budget=steps budget.steps={steps} is within {LITTLE_IS_GAINED_AFTER}"] if steps else []
            ways += [f"lower data.sources.{name}.weight"] if len(epochs) > 1 else []
            ways += ["raise data.max_training_tokens"] if is_part else []
            ways += [f"say data.sources.{name}.max_epochs={math.ceil(n)} if it is meant"]
            refused.append(
                f"data.sources.{name} would be seen {n:.1f} times: past {LITTLE_IS_GAINED_AFTER} epochs hardly anything"
                f" is learned from repeated data (Muennighoff et al. 2305.16264): {', or '.join(ways)}"
            )
        elif n > LITTLE_IS_LOST_UNTIL:
            notes.append(
                f"{name} is seen {n:.1f} times: up to {LITTLE_IS_LOST_UNTIL} epochs are about as good as new data,"
                " more are not (2305.16264)"
            )
    return notes, refused
