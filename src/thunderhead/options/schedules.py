"""Further learning-rate schedules; what they have in common with the others: `thunderhead.core.optim.schedules`."""

import math
from typing import Annotated, Literal

from annotated_types import Gt, Le

from thunderhead.core.optim.schedules import Warmup, fall, progress, rise, warmup_steps
from thunderhead.core.types import Fraction


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

    - decay: fraction of the run spent decaying, at its end; rounded to steps, at least one.
    - shape: with p from 0 to 1 over the decay, `linear` falls as 1 - p and `1-sqrt` as 1 - sqrt(p).

    Raises ValueError if warm-up and decay together are longer than the run.
    """
    w = warmup_steps(warmup, total_steps)
    decay_from = total_steps - max(1, round(decay * total_steps))
    if w > decay_from:
        both = f"scheduler.warmup={warmup} ({w} steps) and scheduler.decay={decay} ({total_steps - decay_from} steps)"
        raise ValueError(f"{both} do not fit a run of {total_steps} steps: at most {decay_from} steps of warm-up do")
    if step < decay_from:
        return rise(step, w)
    p = progress(step, decay_from, total_steps)
    return fall(1 - (math.sqrt(p) if shape == "1-sqrt" else p), final_ratio)


def inverse_sqrt(step: int, total_steps: int, *, warmup: Warmup = 0.02) -> float:
    """Warm-up over W steps, then sqrt(W / (step + 1)) (Vaswani et al. 1706.03762 §5.3, scaled so that the peak is 1).

    W is the time scale of the decay as well; without warm-up it is 1. The last factor is sqrt(W / total_steps).
    """
    w = max(1, warmup_steps(warmup, total_steps))
    return min((step + 1) / w, math.sqrt(w / (step + 1)))
