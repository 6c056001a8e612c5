"""What arms cost, against costs known by hand."""

import numpy as np

from thunderhead.lab.costs import Cost, cost_to_reach
from thunderhead.lab.runs import Curve

CURVE = Curve(*(np.array(v, float) for v in ([10, 20, 30], [100, 200, 300], [1, 2, 3], [5.0, 3.0, 2.0])))


def test_between_validations_the_loss_is_a_line() -> None:
    assert cost_to_reach(CURVE, 4.0) == Cost(15, 150, 1.5)
    assert cost_to_reach(CURVE, 2.0) == Cost(30, 300, 3)


def test_the_first_validation_is_the_earliest_answer_and_never_is_none() -> None:
    assert cost_to_reach(CURVE, 6.0) == Cost(10, 100, 1)
    assert cost_to_reach(CURVE, 1.9) is None


def test_the_first_time_counts() -> None:
    loss = np.array([5.0, 3.0, 4.0, 2.0])
    curve = Curve(np.arange(1.0, 5.0), np.arange(1.0, 5.0), np.arange(1.0, 5.0), loss)
    assert cost_to_reach(curve, 3.0) == Cost(2, 2, 2)
