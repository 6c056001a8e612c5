"""Schedules against formulas written another way (whole curves in NumPy), and their properties for any run."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import LambdaLR

from thunderhead.core.optim.schedules import constant, cosine, linear, warmup_steps
from thunderhead.options.schedules import inverse_sqrt, wsd

ALL = [constant, linear, cosine, wsd, inverse_sqrt]
DECAYING = [linear, cosine, wsd]


def curve(schedule, total, **settings):
    return np.array([schedule(step, total, **settings) for step in range(total)])


def with_warmup(w, tail):
    """The rise over w steps followed by `tail`."""
    return np.concatenate([np.arange(1, w + 1) / max(w, 1), tail])


RUNS = [(1, 0), (2, 0), (2, 1), (7, 3), (100, 10), (101, 100), (1000, 0)]


@pytest.mark.parametrize(("total", "w"), RUNS)
class TestCurves:
    """float64 on both sides: what differs is rounding, below 1e-12."""

    def test_constant(self, total, w):
        np.testing.assert_allclose(curve(constant, total, warmup=w), with_warmup(w, np.ones(total - w)), atol=1e-12)

    @pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
    def test_linear(self, total, w, final):
        tail = np.linspace(1, final, total - w + 1)[1:]  # the first point is the peak, before the decay
        expected = with_warmup(w, tail)
        np.testing.assert_allclose(curve(linear, total, warmup=w, final_ratio=final), expected, atol=1e-12)

    @pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
    def test_cosine(self, total, w, final):
        # cos² of the half angle is another way to write (1 + cos) / 2
        angle = np.linspace(0, np.pi / 2, total - w + 1)[1:]
        expected = with_warmup(w, final + (1 - final) * np.cos(angle) ** 2)
        np.testing.assert_allclose(curve(cosine, total, warmup=w, final_ratio=final), expected, atol=1e-12)

    def test_inverse_sqrt(self, total, w):
        # Vaswani et al. (3): min(s^-0.5, s · w^-1.5), times sqrt(w) for a peak of 1; s counts from 1
        s, w = np.arange(1, total + 1), max(w, 1)
        expected = np.minimum(s**-0.5, s * float(w) ** -1.5) * w**0.5
        np.testing.assert_allclose(curve(inverse_sqrt, total, warmup=min(w, total - 1)), expected, atol=1e-12)


@pytest.mark.parametrize("shape", ["linear", "1-sqrt"])
@pytest.mark.parametrize(("total", "w", "decay", "n"), [(10, 2, 0.2, 2), (1000, 20, 0.2, 200), (9, 0, 1.0, 9)])
def test_wsd(total, w, decay, n, shape):
    progress = np.arange(1, n + 1) / n
    tail = 1 - (progress if shape == "linear" else progress**0.5)
    expected = with_warmup(w, np.concatenate([np.ones(total - w - n), 0.05 + 0.95 * tail]))
    result = curve(wsd, total, warmup=w, decay=decay, shape=shape, final_ratio=0.05)
    np.testing.assert_allclose(result, expected, atol=1e-12)


totals = st.integers(1, 3000)
fractions = st.floats(0, 1, exclude_max=True)


@given(total=totals, warmup=fractions, schedule=st.sampled_from(ALL), final=st.floats(0, 1), data=st.data())
def test_bounds_and_shape(total, warmup, schedule, final, data):
    options = {"final_ratio": final} if schedule in DECAYING else {}
    if schedule is wsd:
        warmup, options["decay"] = warmup / 2, data.draw(st.floats(0.01, 0.49))
        if total < 4:  # rounding to whole steps may leave no room for both
            return
    w = warmup_steps(warmup, total)
    factors = curve(schedule, total, warmup=warmup, **options)
    assert (factors >= 0).all()
    assert (factors <= 1 + 1e-12).all()
    assert (factors[:-1] > 0).all()
    assert (np.diff(factors[:w]) > 0).all(), "the warm-up rises"
    assert (np.diff(factors[max(w - 1, 0) :]) <= 1e-12).all(), "and nothing after it does"
    if schedule in DECAYING:
        assert factors[-1] == pytest.approx(final, abs=1e-12)
        assert schedule(total, total, warmup=warmup, **options) == factors[-1]
    if w:
        assert factors[w - 1] == 1
        assert factors[0] == pytest.approx(1 / w)


@given(total=totals, warmup=fractions)
def test_a_fraction_is_rounded_to_steps(total, warmup):
    steps = warmup_steps(warmup, total)
    assert 0 <= steps < total
    assert abs(steps - warmup * total) <= 0.5 or steps == total - 1


@given(total=totals, warmup=st.integers(0, 4000))
def test_an_integer_is_steps(total, warmup):
    if warmup < total:
        assert warmup_steps(warmup, total) == warmup
    else:
        with pytest.raises(ValueError, match=rf"^scheduler\.warmup={warmup} .* {total} steps: at most {total - 1} do"):
            warmup_steps(warmup, total)


@pytest.mark.parametrize("warmup", [1.0, 2.5, -0.1, float("nan")])
def test_a_float_that_is_no_fraction_is_refused(warmup):
    with pytest.raises(ValueError, match=re.escape(f"scheduler.warmup={warmup} is not a fraction of the run")):
        warmup_steps(warmup, 100)


@pytest.mark.parametrize("schedule", ALL)
def test_every_schedule_refuses_a_warmup_longer_than_the_run(schedule):
    with pytest.raises(ValueError, match=r"scheduler\.warmup=100 .* 50 steps: at most 49"):
        schedule(0, 50, warmup=100)


def test_wsd_refuses_warmup_and_decay_that_overlap():
    with pytest.raises(ValueError, match=r"scheduler\.warmup=90 .*scheduler\.decay=0\.2 .*at most 80 steps of warm-up"):
        wsd(0, 100, warmup=90, decay=0.2)
    assert wsd(79, 100, warmup=80, decay=0.2) == 1


@pytest.mark.parametrize("schedule", ALL)
def test_under_torch_the_learning_rates_are_the_factors(schedule):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = LambdaLR(optimizer, lambda step: schedule(step, 20, warmup=3))
    used = []
    for _ in range(20):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(used, 0.5 * curve(schedule, 20, warmup=3))
