"""Learning-rate schedules: pure functions of the step.

Each takes the 0-based `step` about to be taken and the run's `total_steps`, and returns the factor of the peak learning
rate for it. With W steps of warm-up the factor rises linearly over steps 0 … W-1 as (step + 1) / W: never 0, and 1 at
the last of them. A decay begins with the next step and is at `final_ratio` exactly at the last one, `total_steps - 1`.
From there on it stays: torch's schedulers ask for `total_steps` once, too.
"""

import math

from thunderhead.core.types import Fraction, NonNegativeFloat, NonNegativeInt

Warmup = NonNegativeFloat | NonNegativeInt
"""Below 1 and written as a float (0.02): a fraction of the run, rounded to whole steps. An integer: steps."""


def warmup_steps(warmup: Warmup, total_steps: int) -> int:
    """Steps of warm-up in a run; ValueError for a float of 1 or more, or a warm-up that leaves no step after it."""
    longest = total_steps - 1
    if isinstance(warmup, float) and 0 <= warmup < 1:
        return min(round(warmup * total_steps), longest)
    if isinstance(warmup, float):
        raise ValueError(f"scheduler.warmup={warmup} is not a fraction of the run: use one below 1, or a whole number")
    if not 0 <= warmup <= longest:
        fits = f"at most {longest} do, or a fraction below 1 (0.02)"
        raise ValueError(f"scheduler.warmup={warmup} steps do not fit a run of {total_steps} steps: {fits}")
    return warmup


def constant(step: int, total_steps: int, *, warmup: Warmup = 0.02) -> float:
    """Warm-up, then the peak to the end."""
    return rise(step, warmup_steps(warmup, total_steps))


def linear(step: int, total_steps: int, *, warmup: Warmup = 0.02, final_ratio: Fraction = 0.0) -> float:
    """Warm-up, then a straight line to `final_ratio` (to 0: Bergsma et al. 2502.15938)."""
    w = warmup_steps(warmup, total_steps)
    return rise(step, w) if step < w else fall(1 - progress(step, w, total_steps), final_ratio)


def cosine(step: int, total_steps: int, *, warmup: Warmup = 0.02, final_ratio: Fraction = 0.1) -> float:
    """Warm-up, then half a cosine to `final_ratio` (Loshchilov & Hutter 1608.03983; to 10 %: Chinchilla 2203.15556)."""
    w = warmup_steps(warmup, total_steps)
    half_wave = (1 + math.cos(math.pi * progress(step, w, total_steps))) / 2
    return rise(step, w) if step < w else fall(half_wave, final_ratio)


def rise(step: int, w: int) -> float:
    """The factor after `step` with w steps of warm-up, then 1."""
    return min(1.0, (step + 1) / w) if w else 1.0


def progress(step: int, start: int, total_steps: int) -> float:
    """Progress of a decay that begins with step `start`: 1 at the last step, and already above 0 at the first.

    The step before `start` is the one at the peak; so the fall begins at once and no division by zero can happen.
    """
    return min(1.0, (step + 1 - start) / (total_steps - start))


def fall(factor: float, final_ratio: float) -> float:
    """Squeeze a factor that falls from 1 to 0 so that it falls from 1 to `final_ratio`."""
    return final_ratio + (1 - final_ratio) * factor
