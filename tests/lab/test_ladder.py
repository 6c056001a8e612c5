"""Ladders with known multipliers: what is found, how often intervals hold it, and what verdicts follow from."""

import csv
import runpy
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_isoflop import PLAN, LawExecutor

from browser import Page
from thunderhead.composing import groups_composed_once
from thunderhead.core import config
from thunderhead.core.config import CONF_DIR, ConfigError
from thunderhead.lab.jobs import Job
from thunderhead.lab.ladder import Effect, Estimate, Ladder, Persistence, Rung, climb
from thunderhead.lab.ladder_figures import ladder as draw
from thunderhead.lab.ladder_report import places_of, rate_rule, write_ladder_report
from thunderhead.lab.ladder_sweep import read_settings, run_ladder
from thunderhead.lab.runs import read_runs
from thunderhead.lab.statistics import Interval
from thunderhead.lab.sweep import Sweep
from tiny import tiny

known = SimpleNamespace(**runpy.run_path(str(CONF_DIR.parent / "benchmarks" / "ladder_coverage.py")))
RULE = ("budget.tokens_per_parameter=5", "parametrization=mup", "parametrization.base_d_model=48")
SIZES: dict[str, dict[str, Any]] = {f"d{d}": {"model.d_model": d, "model.n_heads": 2} for d in (8, 12, 16, 24)}


@pytest.mark.parametrize(("law", "multiplier"), [("E + k / C^γ", "1.1"), ("k / C^γ", "1.4 → 1.1")])
def test_without_noise_what_is_true_is_found(law: str, multiplier: str) -> None:
    found, asked = known.simulate(law, multiplier, sizes=4, seeds=2, seed=1, noise=0.02)
    for name, (estimate, true) in asked.items():
        assert estimate.value == pytest.approx(true, rel=0.02), name  # exponents are tried in steps of 5 %
    assert found.predict_loss(1e13, of_baseline=True).value == pytest.approx(known.LAWS[law](1e13), rel=0.01)


@pytest.mark.parametrize("multiplier", ["1.0", "1.1", "1.4 → 1.1"])
def test_stated_intervals_hold_what_is_true(multiplier: str) -> None:
    """As benchmarks/ladder_coverage.py with fewer ladders: 90 % of 80 is 72 ± 2.7."""
    held, _, verdicts = known.coverage("two powers", multiplier, 80, sizes=4, seeds=3)
    assert min(held.pop("projection"), held.pop("loss")) >= 0.88  # they hold the error of the form, too
    assert all(0.78 < share < 0.99 for share in held.values()), held
    assert 0.85 < np.mean(list(held.values())) < 0.95
    wrong = {"1.0": {"persists"}, "1.1": {"shrinks", "grows", "flips"}, "1.4 → 1.1": {"grows", "flips"}}[multiplier]
    assert sum(verdicts[verdict] for verdict in wrong) <= 0.2 * 80


def test_two_seeds_give_wide_intervals_and_no_nan() -> None:
    """Student's t of few seeds draws losses that rise, and some below 0."""
    held, widths, _ = known.coverage("two powers", "1.0", 60, sizes=3, seeds=2)
    assert held["loss"] >= 0.88
    assert np.isfinite(widths["loss"])


def test_the_verdict_is_what_three_intervals_say() -> None:
    rung = Rung("s", 1.0, 1.0, {1: 1.0})

    def verdict(first: int, last: int, trend: int) -> str:
        of = {-1: Interval(0.8, 0.9), 0: Interval(0.9, 1.1), 1: Interval(1.1, 1.2)}
        any_effect = Estimate(1.0, of[0])
        effects = [Effect(rung, rung, 2, any_effect, any_effect, Estimate(1.0, of[side])) for side in (first, last)]
        nothing: Any = np.ones((2, 2))
        return Persistence("arm", effects, Estimate(1.0, of[trend]), nothing, nothing, nothing, nothing).verdict

    told = {(f, m, t): verdict(f, m, t) for f in (-1, 0, 1) for m in (-1, 0, 1) for t in (-1, 0, 1)}
    for (first, last, trend), said in told.items():
        assert verdict(-first, -last, -trend) == said  # of a worse arm as of a better one
        assert (said == "persists") == (trend == 0 and first == last != 0)
        assert (said in ("shrinks", "flips")) == (trend != 0 and first == -trend)
        assert (said == "flips") == (trend != 0 and first == -trend and last == trend)
        assert (said == "grows") == (trend != 0 and last == trend and first != -trend)


def test_what_cannot_be_compared_says_what_is_missing() -> None:
    def rungs(n: int, seeds: Sequence[int], slope: float = -0.2) -> list[Rung]:
        return [Rung(f"s{i}", 1.0, 10.0**i, {s: 2 + slope * i + 0.01 * s * i for s in seeds}) for i in range(n)]

    with pytest.raises(ValueError, match=r"gqa: a ladder needs 3 sizes.*; seeds in common are s0: 2, s1: 2"):
        climb(rungs(2, [1, 2]), "gqa", rungs(4, [1, 2]))
    with pytest.raises(ValueError, match="seeds in common are s0: 1, s1: 1, s2: 1"):
        climb(rungs(3, [1, 2]), "gqa", rungs(3, [2, 3]))
    with pytest.raises(ValueError, match="loss does not fall"):
        climb(rungs(3, [1, 2], slope=0.2), "gqa", rungs(3, [1, 2]))


# --- the sweep --------------------------------------------------------------------------------------------------------


class Better(LawExecutor):
    """Writes records in which gqa's loss is lower, by more or less from seed to seed."""

    def loss(self, job: Job, n: float, tokens: float) -> float:
        seed = job.config["seed"]
        scatter = 0.002 * float(np.random.default_rng([seed, int(n)]).normal())
        return super().loss(job, n, tokens) - ("gqa" in job.choices.values()) * (0.1 + scatter)


@pytest.fixture
def lines(text_corpus: Path, shards_dir: Path) -> list[str]:
    return tiny(text_corpus, shards_dir, "budget=chinchilla", "batch.global_tokens=64", *RULE)


def run(lines: Sequence[str], folder: Path, executor: LawExecutor, *arms: str, seeds: str = "12") -> int:
    each = [({"attention": arm, "seed": seed}, [f"attention={arm}", f"seed={seed}"]) for arm in arms for seed in seeds]
    settings = read_settings({"sizes": SIZES, "held_out": "d24", "project": None}, [])
    sweep = Sweep(folder, executor, ["-m"], PLAN)
    composed = lambda more: config.plain(config.compose([*lines, *more]))  # noqa: E731
    with groups_composed_once():
        return run_ladder(settings, sweep, arms=each, compose=composed, baseline="mha")


def test_a_ladder_is_run_and_its_held_out_size_predicted(
    lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    executor = Better()
    assert run(lines, tmp_path, executor, "gqa", "mha") == 0
    said = capsys.readouterr().out
    assert "Learning rates by size: muP, from those of width 48" in said
    names = [job.name for job in executor.started]
    assert len(names) == 4 * 2 * 2
    assert all(name.startswith("d24") for name in names[-4:])  # the held-out size comes last, and is predicted before
    assert said.index("Predicted for gqa at") < said.index("Predicted for mha at") < said.index("Ladder\n")
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["size"], row["held_out"]) for row in rows] == [
        ("gqa", size, str(size == "d24")) for size in SIZES
    ]
    assert all(1 < float(row["multiplier_low"]) < float(row["multiplier"]) for row in rows)
    assert all(float(row["difference"]) == pytest.approx(-0.1, abs=0.03) for row in rows)
    assert (tmp_path / "figures" / "ladder.csv").read_text().count("gqa: held out") > 2
    page = (tmp_path / "report.html").read_text()
    for told in ("Does it persist? gqa against mha", "held out", "The held-out size", "Projected to"):
        assert told in page

    # the same of any finished runs, whose names and sizes are read off their settings
    runs = read_runs([tmp_path])
    most = max(float(row["flops"]) for row in rows[:-1]) * 1.2
    write_ladder_report(tmp_path / "again", runs, places_of(runs, most), baseline="mha")
    with (tmp_path / "again" / "results.csv").open() as file:
        again = list(csv.DictReader(file))
    assert [row["multiplier"] for row in again] == [row["multiplier"] for row in rows]
    assert [row["held_out"] for row in again] == [row["held_out"] for row in rows]


class BestElsewhere(Better):
    """The best learning rate is another at each size."""

    def loss(self, job: Job, n: float, tokens: float) -> float:
        return super().loss(job, n, tokens) + 0.1 * np.log2(job.config["optimizer"]["lr"] * n / 40) ** 2


def test_a_tuned_ladder_is_read_again_with_its_arms(lines: list[str], tmp_path: Path) -> None:
    """Their rates differ from size to size, and are no arms."""
    tuned = [*lines, "tune=lr", "tune.multipliers={optimizer.lr:[0.25,1,4,16]}"]
    assert run(tuned, tmp_path, BestElsewhere(), "gqa", "mha") == 0
    runs = read_runs([tmp_path])
    assert len({run.config["optimizer"]["lr"] for run in runs}) > 1
    assert {place.arm for place in places_of(runs).values()} == {"gqa", "mha"}


def test_a_phone_shows_all_of_it(lines: list[str], tmp_path: Path, page: Page) -> None:
    run(lines, tmp_path, Better(), "gqa", "mha")
    page.open((tmp_path / "report.html").as_uri(), 390, 800)
    assert [own > 0 and shown > 300 for shown, own in page.pictures()] == [True]
    assert page.ask("document.images[0].clientHeight > 1.2 * document.images[0].clientWidth")  # panels below each other
    assert page.overflow() <= 0
    wide = page.ask("[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length")
    assert not wide
    assert not page.errors
    page.photograph(tmp_path / "phone.png", whole=True)


def test_the_picture_holds_whole_intervals() -> None:
    found, _ = known.simulate("E + k / C^γ", "1.4 → 1.1", sizes=4, seeds=2, seed=1, noise=0.02)
    far = 60 * found.effects[-1].arm.flops
    projection = found.project(far)
    axes = draw(Ladder("base", [found], {}, 1e9, {found.arm: (far, projection)})).axes[0]
    low, high = axes.get_ylim()
    assert low < projection.interval.low < projection.interval.high < high
    assert axes.get_legend() is None  # it stands below
    endless = Estimate(1.2, Interval(0.9, 1000.0))
    axes = draw(Ladder("base", [found], {}, 1e9, {found.arm: (far, endless)})).axes[0]
    assert axes.get_ylim()[1] < 10  # the rest can still be seen


def test_what_fails_is_listed_and_no_more_is_said_than_is_known(
    lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(lines, tmp_path, Better(fails="gqa seed=2"), "mha", "gqa") == 1
    said = capsys.readouterr().out
    assert "gqa: a ladder needs 3 sizes, and 2 seeds in common with the baseline at each" in said
    assert "not compared: d8 gqa seed=2: exit status 1: a wire broke" in said
    assert "No ladder" in (tmp_path / "report.html").read_text()


def test_what_is_no_ladder_is_refused_at_once(lines: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        run(lines, tmp_path / "sweep", Better(), "gqa", seeds="1")
    for told in ("a ladder compares two arms", "needs two seeds at least", "no arm is called mha: gqa"):
        assert told in str(refused.value)
    assert not (tmp_path / "sweep").exists()
    given = {"sizes": SIZES, "held_out": "d9", "project": None}
    with pytest.raises(ConfigError) as refused:
        read_settings(given | {"sizes": dict(list(SIZES.items())[:3])}, ["model.d_model=9", "match=params"])
    for told in ("'d9' is no size", "at least 3 sizes beside", "is set by hydra.sweeper.sizes", "arms need no match"):
        assert told in str(refused.value)
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.project"):
        read_settings(given | {"project": -1.0}, [])


def test_learning_rates_that_do_not_follow_the_size_are_told() -> None:
    def rule(*rates: float) -> str:
        return rate_rule([{"optimizer": {"lr": rate}} for rate in rates])

    assert rule(0.01, 0.02) == "set by size or arm (optimizer.lr 0.01 … 0.02)"
    assert "the same at every size (optimizer.lr 0.01), so that a trend" in rule(0.01, 0.01)
