"""What arms take to a loss that all of them reach."""

import math
from collections.abc import Sequence

from thunderhead.lab import statistics
from thunderhead.lab.analysis import Analysis
from thunderhead.lab.page import NONE, Rows


def table(analysis: Analysis) -> Rows:
    found = analysis.costs_to_reach()
    rows = [
        (name, str(len(ratios)), *(_multiplier([ratio[index] for ratio in ratios]) for index in range(3)))
        for name, ratios in found.items()
    ]
    caption = (
        "Cost to reach a loss that all arms reach, the lowest of each seed, as a multiple of what "
        f"{analysis.reference.name if analysis.reference else NONE} takes; below 1 is cheaper. Geometric mean over "
        "seeds, with its 95 % interval."
    )
    return Rows(("arm", "seeds", "tokens", "training FLOPs", "seconds"), rows, caption) if found else Rows()


def _multiplier(ratios: Sequence[float]) -> str:
    """The geometric mean of ratios, with Student's interval of their logarithms."""
    logs = [math.log(ratio) for ratio in ratios if math.isfinite(ratio) and ratio > 0]
    if not logs:
        return NONE
    found = statistics.mean_interval(logs)
    between = f" ({math.exp(found.low):.2f} … {math.exp(found.high):.2f})" if found else ""
    return f"{math.exp(sum(logs) / len(logs)):.2f} ×{between}"
