"""What training had cost until it reached a loss."""

from typing import NamedTuple

import numpy as np

from thunderhead.lab.runs import Curve


class Cost(NamedTuple):
    """Of training up to some point."""

    tokens: float
    flops: float
    seconds: float  # without validation


def cost_to_reach(curve: Curve, loss: float) -> Cost | None:
    """What training had cost when a validation curve first came down to a loss, between validations by a straight line.

    None if it never did. The first validation is a point without one before it: what comes out there is at most.
    """
    below = np.flatnonzero(curve.loss <= loss)
    if below.size == 0:
        return None
    after = int(below[0])
    if after == 0:
        return Cost(*(float(axis[0]) for axis in curve[:3]))
    part = (curve.loss[after - 1] - loss) / (curve.loss[after - 1] - curve.loss[after])
    return Cost(*(float(axis[after - 1] + part * (axis[after] - axis[after - 1])) for axis in curve[:3]))
