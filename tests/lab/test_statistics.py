"""Intervals cover, and tests keep their level, on simulated arms of known effects; verdicts are what intervals say."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from thunderhead.lab import statistics
from thunderhead.lab.statistics import ALPHA, compare, crossed_interval, sentence

SPREAD = 0.01  # of the paired differences, in nats


LOOKS = range(3, 9)


def by_seed(values: object) -> dict[int, float]:
    return {seed: float(value) for seed, value in enumerate(np.asarray(values), 1)}


def arms(effects: list[float], n_seeds: int, draw: np.random.Generator) -> dict[str, dict[int, float]]:
    """Losses of a baseline and of arms that lie above it by the effects, with a spread that the seeds share."""
    shared = draw.normal(3.0, 0.2, n_seeds)
    own = draw.normal(0, SPREAD / math.sqrt(2), (len(effects), n_seeds))
    return {f"arm{index}": by_seed(shared + effect + own[index]) for index, effect in enumerate(effects)}


@pytest.mark.parametrize("n_seeds", [3, 10])
def test_the_interval_covers_the_true_difference(n_seeds: int) -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        (found,) = compare(arms([0.0, 0.03], n_seeds, draw), [("arm1", "arm0")])
        assert found.interval is not None
        covered += found.interval.low <= 0.03 <= found.interval.high
    # 95 % of 400 has a standard error of 1.1 %; three of them
    assert covered / 400 == pytest.approx(0.95, abs=0.033)


def test_pairing_removes_what_the_seeds_share() -> None:
    losses = arms([0.0, 0.03], 5, np.random.default_rng(0))
    (found,) = compare(losses, [("arm1", "arm0")])
    unpaired = stats.ttest_ind(list(losses["arm1"].values()), list(losses["arm0"].values()))
    assert found.verdict == "worse"
    assert unpaired.pvalue > 0.5


def test_all_intervals_of_a_report_cover_at_once() -> None:
    """Of six comparisons of four arms, one of them with ten times the others' spread: none misses, in 95 %."""
    draw, effects = np.random.default_rng(0), [0.0, 0.01, 0.02, 0.0]
    pairs = [(f"arm{i}", f"arm{j}") for i in range(4) for j in range(i)]
    missed = by_itself = 0
    for _ in range(400):
        losses = arms(effects, 4, draw)
        losses["arm3"] = by_seed(np.array([*losses["arm3"].values()]) + draw.normal(0, 10 * SPREAD, 4))
        misses, alone = [], []
        for found in compare(losses, pairs):
            true = effects[int(found.arm[3])] - effects[int(found.against[3])]
            assert found.interval is not None
            misses.append(not found.interval.low <= true <= found.interval.high)
            alone.append(stats.ttest_1samp([*found.differences.values()], true).pvalue < ALPHA)
        missed += any(misses)
        by_itself += any(alone)
    assert missed / 400 <= ALPHA + 0.033  # three standard errors
    assert by_itself / 400 > 2 * ALPHA  # so they had to be wider than each by itself


LAST = np.array([[0.0], [0.0], [0.0], [1.0]])
NOISE: dict[str, Callable[[np.random.Generator, tuple[int, int]], Any]] = {
    "normal": lambda draw, shape: draw.standard_normal(shape),
    "heavy tails": lambda draw, shape: draw.standard_t(3, shape),
    "one arm noisy": lambda draw, shape: draw.standard_normal(shape) * (1 + 9 * LAST),
    "spikes in one arm": lambda draw, shape: draw.standard_normal(shape) + 10 * (draw.random(shape) < 0.1) * LAST,
}
ALL_PAIRS = [(f"arm{i}", f"arm{j}") for i in range(4) for j in range(i)]


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("n_seeds", [2, 3, 5])
def test_equal_arms_are_rarely_better_or_worse(noise: str, n_seeds: int) -> None:
    draw, wrong = np.random.default_rng(1), 0
    for _ in range(200):
        losses = NOISE[noise](draw, (4, n_seeds)) + draw.normal(0, 20, n_seeds)
        found = compare({f"arm{i}": by_seed(row) for i, row in enumerate(losses)}, ALL_PAIRS, 0.0)
        wrong += any(comparison.verdict != "open" for comparison in found)
    assert wrong / 200 <= ALPHA + 0.047  # three standard errors of 200


def test_unequal_seeds_keep_the_promise() -> None:
    draw, wrong = np.random.default_rng(2), 0
    for _ in range(300):
        losses = {f"arm{i}": by_seed(draw.standard_normal(6)) for i in range(4)}
        losses["arm1"] = {seed: losses["arm1"][seed] for seed in (1, 3)}
        losses["arm2"].pop(1)
        wrong += any(found.verdict != "open" for found in compare(losses, ALL_PAIRS, 0.0))
    assert wrong / 300 <= ALPHA + 0.038


def test_seeds_may_be_added_until_resolved_if_that_was_planned() -> None:
    """Three equal arms, looked at with 3 to 6 seeds."""
    draw, pairs, looks = np.random.default_rng(3), ALL_PAIRS[:3], range(3, 7)
    planned = unplanned = 0
    for _ in range(150):
        losses = draw.standard_normal((3, 6))
        seen = [{f"arm{i}": by_seed(row[:n]) for i, row in enumerate(losses)} for n in looks]
        planned += any(c.verdict != "open" for each in seen for c in compare(each, pairs, 0.0, looks=looks))
        unplanned += any(c.verdict != "open" for each in seen for c in compare(each, pairs, 0.0))
    assert planned / 150 <= ALPHA + 0.053
    assert planned < unplanned
    with pytest.raises(ValueError, match="there are 6 seeds, but no look was planned at more than 5"):
        compare(seen[-1], pairs, looks=range(3, 6))
    with pytest.raises(ValueError, match="2 seeds at least"):
        compare(seen[-1], pairs, looks=range(1, 7))


def test_what_is_given_up_would_hardly_have_been_resolved() -> None:
    """Two arms a random distance apart, with 4 seeds of 8 that were planned."""
    draw, resolved = np.random.default_rng(5), {True: list[bool](), False: list[bool]()}
    for _ in range(1500):
        losses = draw.normal(0, 3) * np.array([[0], [1]]) + draw.standard_normal((2, 8)) / math.sqrt(2)
        now, last = (
            compare(dict(zip("ab", map(by_seed, losses[:, :n]), strict=True)), [("b", "a")], 0.3, looks=LOOKS)
            for n in (4, 8)
        )
        if now[0].is_unclear:
            resolved[now[0].is_given_up].append(last[0].verdict != "open")
    assert min(map(len, resolved.values())) > 200
    assert np.mean(resolved[True]) < 0.05
    assert np.mean(resolved[False]) > 0.5
    assert last[0].chance is None
    assert not last[0].is_given_up


@pytest.mark.parametrize(("noisy", "at_least"), [(1.0, 0.6), (3.0, 0.4)])
def test_more_is_resolved_than_by_student_and_bonferroni(noisy: float, at_least: float) -> None:
    """Of 4 arms with 3 seeds, one lies off by 4 standard deviations of a difference, and another varies more or not."""
    draw = np.random.default_rng(4)
    resolved = before = 0
    for _ in range(200):
        losses = draw.standard_normal((4, 3)) * (1 + (noisy - 1) * LAST)
        losses[1] += 4 * math.sqrt(2)
        found = compare({f"arm{i}": by_seed(row) for i, row in enumerate(losses)}, ALL_PAIRS)[0]
        resolved += found.verdict == "worse"
        before += stats.ttest_rel(losses[1], losses[0]).pvalue < ALPHA / len(ALL_PAIRS)
    assert resolved / 200 > max(at_least, before / 200)
    assert before / 200 == pytest.approx(0.34, abs=0.1)


def test_of_two_arms_the_numbers_are_those_of_the_paired_test() -> None:
    losses = arms([0.0, 0.01], 5, np.random.default_rng(3))
    (found,) = compare(losses, [("arm1", "arm0")])
    result = stats.ttest_rel(*(list(losses[arm].values()) for arm in ("arm1", "arm0")))
    assert found.p == pytest.approx(result.pvalue)
    assert found.interval == pytest.approx(tuple(result.confidence_interval(0.95)))


def test_identical_arms_count_for_nothing() -> None:
    losses = arms([0.0, 0.01], 5, np.random.default_rng(3))
    alone = compare(losses, [("arm1", "arm0")])[0]
    same, other = compare(losses | {"copy": losses["arm0"]}, [("copy", "arm0"), ("arm1", "arm0")])
    assert (same.interval, same.p, same.verdict) == (None, None, "open")
    assert (other.interval, other.p) == (alone.interval, alone.p)


@pytest.mark.parametrize("seed", range(20))
def test_verdict_interval_and_p_never_disagree(seed: int) -> None:
    draw = np.random.default_rng(seed)
    pairs = [(f"arm{i}", f"arm{j}") for i in range(4) for j in range(i)]
    for found in compare(arms([0.0, 0.003, 0.02, 0.1], 3, draw), pairs, 0.0):
        assert found.interval is not None
        assert found.p is not None
        low, high = found.interval
        assert (found.verdict == "open") == (low <= 0 <= high) == (found.p >= ALPHA)
        assert (found.verdict == "better") == (high < 0)


def test_what_is_surely_small_is_practically_equal() -> None:
    """Whether it is surely not 0 makes no difference: -0.000001 nats are no gain."""
    for shift in (0.0, 1e-6, 0.002):
        a, b = by_seed([3.0 + shift, 3.1 + shift, 3.2 + shift]), by_seed([3.0, 3.1 - 1e-9, 3.2])
        (found,) = compare({"a": a, "b": b}, [("a", "b")])
        assert found.verdict == "equal"
        assert sentence(found, "nats", "matched tokens").endswith(": practically equal, less than 0.005 nats apart.")
    for smallest_effect, verdict in ((0.02, "equal"), (0.001, "worse")):
        losses = {"a": by_seed([3.009, 3.11, 3.211]), "b": by_seed([3.0, 3.1, 3.2])}
        assert compare(losses, [("a", "b")], smallest_effect)[0].verdict == verdict


def test_seeds_that_diverged_are_the_result() -> None:
    losses = {"a": by_seed([2.0, 2.1, 2.2]), "b": by_seed([3.0, 3.1, 3.2])}
    (found,) = compare(losses, [("a", "b")], diverged={"a": "1 of 4 seeds of a diverged"})
    assert found.verdict == "open"
    said = "a − b: 1 of 4 seeds of a diverged, and what the other seeds say is not compared."
    assert sentence(found, "nats", "matched tokens") == said


def test_only_equal_seeds_are_pairs() -> None:
    (found,) = compare({"a": {1: 3.0, 2: 3.2, 4: 9.0}, "b": {1: 2.9, 2: 3.0, 3: 0.0}}, [("a", "b")])
    assert found.differences == pytest.approx({1: 0.1, 2: 0.2})


# --- sentences -------------------------------------------------------------------------------------------------------


def words(a: list[float], b: list[float], conditions: str = "matched tokens") -> str:
    (found,) = compare({"gqa": by_seed(a), "mha": by_seed(b)}, [("gqa", "mha")])
    return sentence(found, "nats", conditions)


def test_a_resolved_difference() -> None:
    worse = words([3.011, 3.112, 3.213], [3.0, 3.1, 3.2])
    assert worse == "gqa − mha = +0.0120 nats (95 % CI +0.0095 … +0.0145, 3 seeds, matched tokens): worse."
    assert words([3.0, 3.1, 3.2], [3.011, 3.112, 3.213]).endswith("): better.")


def test_an_unresolved_difference_promises_nothing() -> None:
    found = words([3.001, 3.099, 3.204], [3.0, 3.1, 3.2])
    said = "gqa − mha = +0.001 nats (95 % CI −0.005 … +0.008, 3 seeds, matched tokens): not resolved at 3 seeds."
    assert found == said


def test_one_seed_resolves_nothing() -> None:
    found = words([3.5], [3.0])
    assert (
        found
        == "gqa − mha = +0.5000 nats (1 seed, matched tokens): one seed cannot resolve anything; train more seeds."
    )


def test_no_seed_in_common() -> None:
    (found,) = compare({"a": {1: 3.0}, "b": {2: 3.0}}, [("a", "b")])
    assert sentence(found, "nats", "matched tokens") == "a − b: not compared, they have no seed in common."


def test_no_spread_is_no_certainty() -> None:
    assert "identical, the setting changed nothing" in words([3.0, 3.1], [3.0, 3.1])
    (found,) = compare({"a": by_seed([3.5, 3.5]), "b": by_seed([3.0, 3.0])}, [("a", "b")])
    assert found.verdict == "open"
    assert "no spread to judge by" in sentence(found, "nats", "")


def test_more_comparisons_make_wider_intervals() -> None:
    losses = arms([0.0, 0.012, 0.0, 0.0], 3, np.random.default_rng(5))
    losses["arm1"] = by_seed(np.array([*losses["arm0"].values()]) + np.array([0.010, 0.013, 0.008]))
    (alone,) = compare(losses, [("arm1", "arm0")])
    together = compare(losses, [("arm1", "arm0"), ("arm2", "arm0"), ("arm3", "arm0")])[0]
    assert (alone.verdict, together.verdict) == ("worse", "open")


def test_signed_numbers() -> None:
    assert [statistics.signed(x, 3) for x in (0.0123, -0.0123, 0.0001, -0.0001)] == [
        "+0.012",
        "−0.012",
        "0.000",
        "0.000",
    ]


@pytest.mark.parametrize("n_seeds", [2, 3, 5])
@pytest.mark.parametrize(("of_seeds", "of_examples"), [(0.0, 0.3), (0.05, 0.3), (0.1, 0.0)])
def test_intervals_over_seeds_and_examples_cover(n_seeds: int, of_seeds: float, of_examples: float) -> None:
    """Right or wrong answers of two arms, 5 points apart, whatever it is that the chances differ by."""
    draw, covered, n_reports = np.random.default_rng(0), 0, 1000
    for _ in range(n_reports):
        shift_SE = 0.05 + draw.normal(0, of_seeds, (n_seeds, 1)) + draw.normal(0, of_examples, 200)
        right_2SE = draw.random((2, n_seeds, 200)) < np.clip([0.5 + shift_SE / 2, 0.5 - shift_SE / 2], 0, 1)
        found = crossed_interval(np.subtract(*right_2SE.astype(float)))
        assert found is not None
        covered += found.low <= 0.05 <= found.high
    # of a share of 0.95 in 1,000 the standard error is 0.7 %; Cochran's quantile may err by 1 % to the safe side
    assert 0.93 <= covered / n_reports <= 0.975


def test_the_interval_of_one_seed_is_students_over_examples() -> None:
    draw = np.random.default_rng(0)
    differences_1E = draw.normal(0.1, 1, (1, 50))
    oracle = stats.ttest_1samp(differences_1E[0], 0).confidence_interval(0.95)
    assert crossed_interval(differences_1E) == pytest.approx(tuple(oracle))
    # and of seeds that all answer alike, or examples that do
    assert crossed_interval(np.repeat(differences_1E, 3, axis=0)) == pytest.approx(tuple(oracle))
    by_seed_3 = stats.ttest_1samp(differences_1E[0, :3], 0).confidence_interval(0.95)
    assert crossed_interval(np.repeat(differences_1E[:, :3].T, 9, axis=1)) == pytest.approx(tuple(by_seed_3))
    assert crossed_interval(np.zeros((3, 5))) is None
