"""Learning-rate schedules: pure functions of the step.

Each takes the 0-based `step` about to be taken and the run's `total_steps`, and returns the factor of the peak learning
rate for it. With W steps of warm-up the factor rises linearly over steps 0 … W-1 as (step + 1) / W: never 0, and 1 at
the last of them. A decay begins with the next step and is at `final_ratio` exactly at the last one, `total_steps - 1`.
From there on it stays: torch's schedulers ask for `total_steps` once, too.
"""

import math
from typing import Annotated, Literal

from annotated_types import Gt, Le

from thunderhead.core.types import Fraction, NonNegativeFloat, NonNegativeInt

Warmup = NonNegativeFloat | NonNegativeInt
"""Below 1 and written as a float (0.02): a fraction of the run. An integer: steps."""


def warmup_steps(warmup: Warmup, total_steps: int) -> int:
    """Steps of warm-up in a run of `total_steps`.

    Args:
        warmup: a float in [0, 1) is a fraction of the run, rounded to whole steps; an int is a number of steps.
        total_steps: optimizer steps of the run.

    Raises:
        ValueError: a float of 1 or more, or a warm-up that leaves no step after it.

    """
    assert total_steps >= 1
    longest = total_steps - 1
    if isinstance(warmup, float):
        if not 0 <= warmup < 1:
            raise ValueError(
                f"scheduler.warmup={warmup} is not a fraction of the run: use a float from 0 to below 1 "
                f"(0.02 for 2 %), or an integer number of steps up to {longest}"
            )
        return min(round(warmup * total_steps), longest)
    if not 0 <= warmup <= longest:
        raise ValueError(
            f"scheduler.warmup={warmup} steps do not fit a run of {total_steps} steps: at most {longest} do, "
            "so that a step is left after them; a fraction below 1 (0.02) adapts to the run"
        )
    return warmup


def constant(step: int, total_steps: int, *, warmup: Warmup = 0.02) -> float:
    """Warm-up, then the peak to the end."""
    return min(1.0, _rise(step, warmup_steps(warmup, total_steps)))


def linear(step: int, total_steps: int, *, warmup: Warmup = 0.02, final_ratio: Fraction = 0.0) -> float:
    """Warm-up, then a straight line to `final_ratio` (to 0: Bergsma et al. 2502.15938)."""
    w = warmup_steps(warmup, total_steps)
    if step < w:
        return _rise(step, w)
    return _between(1 - _progress(step, w, total_steps), final_ratio)


def cosine(step: int, total_steps: int, *, warmup: Warmup = 0.02, final_ratio: Fraction = 0.1) -> float:
    """Warm-up, then half a cosine to `final_ratio` (Loshchilov & Hutter 1608.03983; to 10 %: Chinchilla 2203.15556)."""
    w = warmup_steps(warmup, total_steps)
    if step < w:
        return _rise(step, w)
    return _between((1 + math.cos(math.pi * _progress(step, w, total_steps))) / 2, final_ratio)


def wsd(
    step: int,
    total_steps: int,
    *,
    warmup: Warmup = 0.02,
    decay: Annotated[float, Gt(0), Le(1)] = 0.2,
    shape: Literal["linear", "1-sqrt"] = "1-sqrt",
    final_ratio: Fraction = 0.0,
) -> float:
    """Warm-up, stable at the peak, decay (Hu et al. 2404.06395; the 1-sqrt shape: Hägele et al. 2405.18392).

    Args:
        step: the step about to be taken, from 0.
        total_steps: optimizer steps of the run.
        warmup: steps (int) or fraction of the run (float) of linear warm-up.
        decay: fraction of the run spent decaying, at its end; rounded to steps, at least one.
        shape: with p from 0 to 1 over the decay, `linear` falls as 1 - p and `1-sqrt` as 1 - sqrt(p).
        final_ratio: the factor at the last step.

    Raises:
        ValueError: warm-up and decay together are longer than the run.

    """
    w = warmup_steps(warmup, total_steps)
    decay_from = total_steps - max(1, round(decay * total_steps))
    if w > decay_from:
        raise ValueError(
            f"scheduler.warmup={warmup} ({w} steps) and scheduler.decay={decay} ({total_steps - decay_from} steps) "
            f"do not fit a run of {total_steps} steps: at most {decay_from} steps of warm-up do"
        )
    if step < decay_from:
        return min(1.0, _rise(step, w))
    progress = _progress(step, decay_from, total_steps)
    return _between(1 - (math.sqrt(progress) if shape == "1-sqrt" else progress), final_ratio)


def inverse_sqrt(step: int, total_steps: int, *, warmup: Warmup = 0.02) -> float:
    """Warm-up over W steps, then sqrt(W / (step + 1)) (Vaswani et al. 1706.03762 §5.3, scaled so that the peak is 1).

    W is the time scale of the decay as well; without warm-up it is 1. The last factor is sqrt(W / total_steps).
    """
    w = max(1, warmup_steps(warmup, total_steps))
    return min((step + 1) / w, math.sqrt(w / (step + 1)))


def _rise(step: int, w: int) -> float:
    return (step + 1) / w if w else 1.0


def _progress(step: int, start: int, total_steps: int) -> float:
    """Progress of a decay that begins with step `start`: 1 at the last step, and already above 0 at the first.

    The step before `start` is the one at the peak; so the fall begins at once and no division by zero can happen.
    """
    return min(1.0, (step + 1 - start) / (total_steps - start))


def _between(factor: float, final_ratio: float) -> float:
    """Squeeze a factor that falls from 1 to 0 so that it falls from 1 to `final_ratio`."""
    return final_ratio + (1 - final_ratio) * factor
