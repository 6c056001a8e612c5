"""Turns of sources: against the divisor method done seat by seat, and against arithmetic written another way."""

import math
import pickle
import re
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thunderhead.core.data.order import Order
from thunderhead.corpus.mixture import (
    Mixture,
    Stage,
    Turns,
    counts,
    exact,
    ledger,
    plan_turns,
    stages,
    trained_blocks,
    turns,
    weights_by_fraction,
    without_turns,
)
from thunderhead.corpus.shard_data import repetition
from thunderhead.corpus.sources import LocalText

whole = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 50), min_size=1)
real = st.dictionaries(st.sampled_from("abcdef"), st.floats(1e-3, 1e3), min_size=1)


def webster(weights: Mapping[str, int], n: int) -> list[str]:
    """Give n seats, one by one, to the highest weight / (2 · seats + 1)."""
    seats = dict.fromkeys(sorted(weights), 0)
    given = []
    for _ in range(n):
        winner = max(seats, key=lambda name: Fraction(weights[name], 2 * seats[name] + 1))
        seats[winner] += 1
        given.append(winner)
    return given


def source(weight: float | Mapping[float, float] = 1.0, max_epochs: float | None = None) -> LocalText:
    return LocalText(path="unused", weight=weight, max_epochs=max_epochs)


# --- turns


@given(whole, st.integers(0, 300))
def test_turns_are_seats_by_webster(weights: dict[str, int], n: int) -> None:
    given = webster(weights, n)
    assert turns(weights, dict.fromkeys(weights, 0), n) == given
    assert counts(weights, n) == {name: given.count(name) for name in weights}


@given(real, st.integers(0, 10**15))
def test_counts_far_away_are_shares_to_within_a_sample(weights: dict[str, float], n: int) -> None:
    whole_weights = exact(weights)
    found = counts(whole_weights, n)
    assert sum(found.values()) == n
    total = sum(whole_weights.values())
    for name, weight in whole_weights.items():
        share = Fraction(weight, total)
        assert abs(found[name] - share * n) <= Fraction(1, 2) + share * len(whole_weights) / 2
        assert float(share) == pytest.approx(weights[name] / math.fsum(weights.values()), abs=1e-8)


@given(real, st.integers(0, 10**12), st.integers(1, 30))
def test_counts_go_on_by_the_turns_that_follow(weights: dict[str, float], n: int, more: int) -> None:
    whole_weights = exact(weights)
    before, after = counts(whole_weights, n), counts(whole_weights, n + more)
    given = Counter(turns(whole_weights, before, more))
    assert after == {name: before[name] + given[name] for name in whole_weights}


def test_weights_in_decimals_are_exact() -> None:
    assert exact({"code": 0.8, "prose": 0.2}) == {"code": 4, "prose": 1}
    assert exact({"a": 0.1, "b": 0.2, "c": 0.7}) == {"a": 1, "b": 2, "c": 7}
    assert "".join(turns({"c": 4, "p": 1}, {"c": 0, "p": 0}, 10)) == "ccpccccpcc"


# --- weights


def test_weights_in_stages() -> None:
    sources = {"a": source({0: 0.9, 0.8: 0.5}), "b": source(0.1), "c": source({0: 0, 0.25: 1})}
    assert weights_by_fraction(sources) == {
        0.0: {"a": 0.9, "b": 0.1, "c": 0},
        0.25: {"a": 0.9, "b": 0.1, "c": 1},
        0.8: {"a": 0.5, "b": 0.1, "c": 1},
    }
    assert [stage.first for stage in stages(sources, 1.0, steps=10, sequences_per_step=4)] == [0, 8, 32]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": {0.1: 1}}, r"data\.sources\.a\.weight: stages begin at fractions .* found 0\.1$"),
        ({"a": {0: 1, 1.0: 2}}, r"data\.sources\.a\.weight: .* found 0, 1$"),
        ({"a": {}}, r"data\.sources\.a\.weight: .* found none$"),
        ({"a": 0, "b": 0}, r"data\.sources: no source has a weight from 0 of the run on: give a or b more than 0"),
        ({"a": {0: 1, 0.5: 0}}, r"no source has a weight from 0\.5 of the run on"),
        ({"a": {-0.5: 1, 0: 1}, "b": {0.5: 1}}, r"data\.sources\.a\.weight.*; data\.sources\.b\.weight"),
    ],
)
def test_weights_that_cannot_be(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weights_by_fraction({name: source(weight) for name, weight in weights.items()})


@given(real, st.floats(0.2, 100))
def test_temperature_is_a_power(weights: dict[str, float], temperature: float) -> None:
    (stage,) = stages({name: source(weight) for name, weight in weights.items()}, temperature, 1, 1)
    total, tempered_total = sum(weights.values()), sum(stage.weights.values())
    powers = {name: (weight / total) ** (1 / temperature) for name, weight in weights.items()}
    for name in weights:
        assert stage.weights[name] / tempered_total == pytest.approx(powers[name] / sum(powers.values()), rel=1e-6)


def test_the_extremes_of_temperature() -> None:
    weights = {"a": source(1e-300), "b": source(1.0), "none": source(0)}
    (hot,), (cold,) = stages(weights, 1e9, 1, 1), stages(weights, 0.01, 1, 1)
    assert hot.weights == pytest.approx({"a": 1.0, "b": 1.0, "none": 0.0}, abs=1e-6)
    assert cold.weights == {"a": 0.0, "b": 1.0, "none": 0.0}


# --- a run


def step_by_step(
    run: list[Stage], limits: Mapping[str, int | None], at_limit: str, n: int
) -> tuple[list[tuple[str, int]], int | None]:
    """The same rules, sample by sample: turns begin anew when the set of sources or their weights change."""
    taken, here = dict.fromkeys(limits, 0), dict.fromkeys(limits, 0)
    found: list[tuple[str, int]] = []
    before = None
    for i in range(n):
        weights = [stage.weights for stage in run if stage.first <= i][-1]
        stage_number = sum(stage.first <= i for stage in run)
        weighted = {s: w for s, w in weights.items() if w > 0}
        able = {s: w for s, w in weighted.items() if limits[s] is None or taken[s] < limits[s]}
        if not able or (at_limit == "stop" and able != weighted):
            return found, i
        if (stage_number, able) != before:
            before, here = (stage_number, able), dict.fromkeys(limits, 0)
        whole_weights = exact(able)
        winner = max(whole_weights, key=lambda s: Fraction(whole_weights[s], 2 * here[s] + 1))
        found.append((winner, taken[winner]))
        taken[winner] += 1
        here[winner] += 1
    return found, None


names = ("a", "b", "c")
weight = st.sampled_from([0.0, 0.1, 0.25, 1.0, 3.0])
runs = st.lists(st.tuples(st.integers(1, 80), st.fixed_dictionaries(dict.fromkeys(names, weight))), max_size=3)
limits = st.fixed_dictionaries(dict.fromkeys(names, st.none() | st.integers(1, 60)))


@given(
    st.fixed_dictionaries(dict.fromkeys(names, weight)).filter(lambda w: any(w.values())),
    runs,
    limits,
    st.sampled_from(["redistribute", "stop"]),
)
def test_a_run_is_the_one_done_step_by_step(
    first: dict[str, float], later: list[tuple[int, dict[str, float]]], limit: dict[str, int | None], at_limit: str
) -> None:
    run = [Stage(0, first)]
    for length, weights in later:
        run.append(Stage(run[-1].first + length, weights))
    expected, end = step_by_step(run, limit, at_limit, 400)
    planned = Turns(run, limit, at_limit)
    assert planned.end == end or (end is None and planned.end >= 400)
    assert [planned(n) for n in range(len(expected))] == expected
    assert [planned(n) for n in reversed(range(len(expected)))] == expected[::-1]
    for n in (0, 1, len(expected) // 2, len(expected)):
        assert planned.counts(n) == {s: sum(name == s for name, _ in expected[:n]) for s in names}


def test_windows_join_and_do_not_depend_on_what_was_asked_before() -> None:
    planned = Turns([Stage(0, {"a": 0.7, "b": 0.3}), Stage(1500, {"a": 0.2, "b": 0.8})], {"a": None, "b": 900}, "stop")
    assert planned.end is not None
    found = [planned(n) for n in range(planned.end)]
    for s in "ab":
        assert [k for name, k in found if name == s] == list(range(planned.counts(planned.end)[s]))
    fresh = Turns([Stage(0, {"a": 0.7, "b": 0.3}), Stage(1500, {"a": 0.2, "b": 0.8})], {"a": None, "b": 900}, "stop")
    assert fresh(2000) == found[2000]
    assert pickle.loads(pickle.dumps(fresh))(1023) == found[1023]
    assert fresh.used_up == {"b": planned.end}
    far = Turns([Stage(0, {"a": 0.7, "b": 0.3})], {"a": None, "b": None}, "stop")
    assert far.counts(10**15) == {"a": 7 * 10**14, "b": 3 * 10**14}
    assert far(10**15) == ("a", 7 * 10**14)


def test_a_mixture_is_turns_and_orders() -> None:
    sources = {"a": source(3.0), "b": source(1.0, max_epochs=1.5)}
    blocks = {"a": [10, 7], "b": [4]}
    planned = plan_turns(
        sources, {s: sum(sizes) for s, sizes in blocks.items()},
        temperature=1.0, at_max_epochs="redistribute", steps=10, sequences_per_step=8,
    )  # fmt: skip
    mixture = Mixture(planned, blocks, seed=3, window=6, trained={"a": 17, "b": 4})
    found = [mixture(n) for n in range(80)]
    for s, sizes in blocks.items():
        order = Order(s, sizes, seed=3, window=6)
        own = [sample for sample in found if sample.source == s]
        assert own == [order(k) for k in range(len(own))]
    assert sum(sample.source == "b" for sample in found) == 6  # one and a half times four
    assert planned.used_up == {"b": next(n for n in range(80) if planned.counts(n)["b"] == 6)}
    given = partial(ledger, planned, {"a": 17, "b": 4}, 32)
    assert given(80) == {"a": (74 * 32, 74 / 80, 74 / 17), "b": (6 * 32, 6 / 80, 1.5)}
    assert given(0) == {"a": (0, 0, 0), "b": (0, 0, 0)}
    again = pickle.loads(pickle.dumps(mixture))
    assert [again(n) for n in range(80)] == found


sizes = st.dictionaries(
    st.sampled_from("abc"), st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any), min_size=1
)


@given(sizes, st.integers(1, 200), st.integers(1, 20))
def test_a_part_of_the_data_is_seen_again_and_again(blocks: dict[str, list[int]], wanted: int, window: int) -> None:
    available = {s: sum(counted) for s, counted in blocks.items()}
    try:
        trained = trained_blocks(available, 32, 32 * wanted)
    except ValueError:
        # too many, or too few for one of each
        assert wanted >= sum(available.values()) or not all(counts(available, wanted).values())
        return
    assert sum(trained.values()) == wanted
    for s, count in trained.items():
        assert 0 < count <= available[s]
        share = Fraction(available[s], sum(available.values()))
        assert abs(count - wanted * share) <= Fraction(1, 2) + share * len(blocks) / 2
    planned = plan_turns(
        {s: source(float(n)) for s, n in trained.items()}, trained,
        temperature=1.0, at_max_epochs="stop", steps=1, sequences_per_step=1,
    )  # fmt: skip
    mixture = Mixture(planned, blocks, seed=3, window=window, trained=trained)
    found = [mixture(n) for n in range(3 * wanted)]
    for s, count in trained.items():
        seen = Counter((sample.epoch, sample.block) for sample in found if sample.source == s)
        parts = [{block for epoch, block in seen if epoch == number} for number in range(3)]
        assert parts[0] == parts[1] == parts[2]  # the same blocks in each epoch, each of them once
        assert len(parts[0]) == count
        assert max(parts[0]) < available[s]
        assert set(seen.values()) == {1}


def test_a_part_that_cannot_be() -> None:
    available = {"many": 900, "few": 10}
    assert trained_blocks(available, 32, None) == available
    assert trained_blocks(available, 32, 91 * 32 + 31) == {"many": 90, "few": 1}
    with pytest.raises(ValueError, match=r"max_training_tokens=29120 leaves nothing out, there are 29120 tokens"):
        trained_blocks(available, 32, 910 * 32)
    with pytest.raises(
        ValueError, match=r"max_training_tokens=960 leaves no block .* of few: use at least (\d+)"
    ) as error:
        trained_blocks(available, 32, 960)
    enough = int(str(error.value).partition("use at least ")[2].partition(",")[0])
    assert trained_blocks(available, 32, enough)["few"] == 1
    with pytest.raises(ValueError, match="of few"):
        trained_blocks(available, 32, enough - 1)


def test_the_mixture_is_the_one_of_the_first_release() -> None:
    # Runs are resumed with later versions of this code: these samples must stay.
    planned = plan_turns(
        {"code": source({0: 0.8, 0.5: 0.5}), "prose": source({0: 0.2, 0.5: 0.5})}, {"code": 9, "prose": 3},
        temperature=2.0, at_max_epochs="redistribute", steps=4, sequences_per_step=4,
    )  # fmt: skip
    mixture = Mixture(planned, {"code": [4, 5], "prose": [3]}, seed=1, window=4, trained={"code": 9, "prose": 3})
    assert "".join(planned(n)[0][0] for n in range(16)) == TURNS
    assert [tuple(mixture(n))[1:] for n in range(16)] == SAMPLES


TURNS = "cpccpccpcpcpcpcp"
SAMPLES = [
    (0, 4),
    (0, 2),
    (0, 5),
    (0, 6),
    (0, 1),
    (0, 7),
    (0, 2),
    (0, 0),
    (0, 8),
    (1, 1),
    (0, 1),
    (1, 0),
    (0, 0),
    (1, 2),
    (0, 3),
    (2, 0),
]


@pytest.mark.parametrize(
    ("sources", "steps", "told"),
    [
        ({"a": source(), "b": source(4e-10)}, 1000, ["b gets no sequence in this run of 4,000: raise data.sources.b."]),
        ({"a": source(), "b": source(0.01)}, 10, ["b gets no sequence in this run of 40: .* by weight=0$"]),
        ({"a": source(), "b": source(0.01)}, 100, []),
        ({"a": source(), "b": source(0)}, 10, []),
        ({"a": source({0: 1, 0.8: 4e-10}), "b": source()}, 100, ["a gets no sequence .* from 0.8 to 1 of it: "]),
        (
            {"a": source({0: 0, 0.2: 1e-9, 0.4: 1, 0.6: 1e-9}), "b": source()},
            100,
            ["a gets no sequence .* from 0.2 to 0.4 of it and from 0.6 to 1 of it: "],
        ),
        ({"a": source(), "b": source({0: 0, 0.9: 1})}, 3, ["from 0.9 .* none of its 3 steps", "b gets .* run of 12: "]),
        ({"a": source(max_epochs=1), "b": source({0: 1, 0.5: 2})}, 1000, []),  # used up in the first half, as is told
        ({"a": source(max_epochs=1), "b": source(1e-12)}, 100, []),  # it takes a's place
    ],
)
def test_sources_without_a_turn_are_told(sources: dict[str, LocalText], steps: int, told: list[str]) -> None:
    planned = plan_turns(
        sources, dict.fromkeys(sources, 50),
        temperature=1.0, at_max_epochs="redistribute", steps=steps, sequences_per_step=4,
    )  # fmt: skip
    for note, expected in zip(without_turns(sources, planned, steps, 4), told, strict=True):
        assert re.search(expected, note)


@given(
    st.fixed_dictionaries(dict.fromkeys(names, weight | st.just(1e-10))).filter(lambda w: any(w.values())),
    limits,
    st.integers(1, 60),
)
def test_who_is_told_of_is_who_has_no_sample(
    weights: dict[str, float], limit: dict[str, int | None], steps: int
) -> None:
    sources = {s: source(weights[s], max_epochs=limit[s]) for s in names}
    planned = plan_turns(
        sources, dict.fromkeys(sources, 1),
        temperature=1.0, at_max_epochs="redistribute", steps=steps, sequences_per_step=2,
    )  # fmt: skip
    if planned.end is not None and planned.end < 2 * steps:
        return
    drawn = {planned(n)[0] for n in range(2 * steps)}
    told = {note.split()[0] for note in without_turns(sources, planned, steps, 2)}
    assert told == {s for s in names if weights[s] and s not in drawn}


def test_less_than_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.sources\.a\.max_epochs=0\.01 of its 50 blocks is less than one"):
        plan_turns(
            {"a": source(max_epochs=0.01)}, {"a": 50}, temperature=1.0, at_max_epochs="stop", steps=1,
            sequences_per_step=1,
        )  # fmt: skip


def test_repetition_is_judged() -> None:
    epochs = {"a": 4.0, "b": 4.1, "c": 16.0, "d": 16.5, "e": 30.0}
    notes, refused = repetition(epochs, ["e"], is_part=True, fitting=lambda: 7)
    assert [note.split()[0] for note in notes] == ["b", "c", "e"]
    assert len(refused) == 1
    assert "data.sources.d would be seen 16.5 times" in refused[0]
    assert refused[0].endswith(
        ": budget=steps budget.steps=7 is within 16, or lower data.sources.d.weight, or raise data.max_training_tokens,"
        " or say data.sources.d.max_epochs=17 if it is meant"
    )
    _, (alone,) = repetition({"d": 16.5}, [], is_part=False, fitting=lambda: 0)
    assert alone.endswith("(Muennighoff et al. 2305.16264): say data.sources.d.max_epochs=17 if it is meant")
