"""Tables of docs/trust.md: how often verdicts are wrong and differences found, of several ways to compare arms.

    python benchmarks/trust.py

simulates losses of arms whose true differences are known, for 2 to 6 arms and 2 to 8 seeds, and prints the tables;
some 15 minutes on one core. Each method gives half-widths of intervals to the same differences: a report errs if any of
its intervals misses. Differences do not change the widths, so that this is also the chance of a false verdict.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from thunderhead.lab import multiplicity
from thunderhead.lab.multiplicity import ALPHA

Floats = npt.NDArray[np.float64]
DRAWS = 20_000
SAMPLE = 200
SEEDS = (2, 3, 5, 8)


class Design(NamedTuple):
    """What a report compares: pairs of arms."""

    arms: int
    to_first: bool = False

    @property
    def every(self) -> list[tuple[int, int]]:
        return list(combinations(range(self.arms), 2))

    @property
    def tested(self) -> list[int]:
        """Indices in `every`."""
        return [index for index, pair in enumerate(self.every) if not self.to_first or pair[0] == 0]


DESIGNS = (Design(2), Design(3), Design(4), Design(4, True), Design(6, True))  # as reports choose them

# --- losses without any difference: (draws, arms, seeds) --------------------------------------------------------------


def _scaled(*variances: float, of_first: float = 1.0) -> Callable[[Any, int, int], Floats]:
    """Normal, with these variances of the last arms."""

    def draw(random: np.random.Generator, arms: int, seeds: int) -> Floats:
        scale = np.ones(arms)
        scale[0] = of_first
        given = variances[-arms:]
        scale[arms - len(given) :] = given
        return random.standard_normal((DRAWS, arms, seeds)) * np.sqrt(scale)[:, None]

    return draw


def _heavy(random: np.random.Generator, arms: int, seeds: int) -> Floats:
    return random.standard_t(3, (DRAWS, arms, seeds))


def _spikes(chance: float, either_way: bool = False) -> Callable[[Any, int, int], Floats]:
    """The last arm ends 10 standard deviations too high at times; its usual loss is what is asked for."""

    def draw(random: np.random.Generator, arms: int, seeds: int) -> Floats:
        losses = random.standard_normal((DRAWS, arms, seeds))
        sign = random.choice([-1, 1], (DRAWS, seeds)) if either_way else 1
        losses[:, -1] += 10 * sign * (random.random((DRAWS, seeds)) < chance)
        return losses

    return draw


def _clusters(random: np.random.Generator, arms: int, seeds: int) -> Floats:
    """Halves of the arms react to a seed alike, as those whose matrices have equal shapes do."""
    shared = random.standard_normal((DRAWS, 2, seeds))
    return 3 * shared[:, np.arange(arms) * 2 // arms] + random.standard_normal((DRAWS, arms, seeds))


NULL = {
    "normal, equal variances": _scaled(),
    "one arm 10 × the variance": _scaled(10.0),
    "one arm 100 ×": _scaled(100.0),
    "the first arm 100 ×": _scaled(of_first=100.0),
    "each arm 10 × the one before": _scaled(1.0, 10.0, 100.0, 1e3, 1e4, 1e5),
    "halves of the arms move together": _clusters,
    "heavy tails (t with 3 df)": _heavy,
    "spikes up in one arm, 10 %": _spikes(0.1),
    "spikes up or down, 30 %": _spikes(0.3, either_way=True),
}

# --- methods: half-widths of the intervals of all tested pairs, (draws, pairs) ----------------------------------------


class Data(NamedTuple):
    """Losses and what follows from them."""

    losses: Floats
    design: Design
    means: Floats  # of differences, (draws, tested pairs)
    variances: Floats  # of differences, (draws, every pair)

    @property
    def n(self) -> int:
        return self.losses.shape[-1]

    @property
    def tested(self) -> Floats:
        return self.variances[:, self.design.tested]

    @property
    def per_arm(self) -> Floats:
        """Variances of the arms by Grubbs (1948): of differences, V_ab = v_a + v_b, by least squares; (draws, arms)."""
        arms = self.design.arms
        sums = np.zeros((len(self.losses), arms))
        for index, pair in enumerate(self.design.every):
            sums[:, pair] += self.variances[:, [index]]
        total = sums.sum(1, keepdims=True) / 2 / (arms - 1)
        return np.maximum((sums - total) / (arms - 2), 0)


def data(losses: Floats, design: Design) -> Data:
    first, second = np.array(design.every).T
    differences = losses[:, first] - losses[:, second]
    return Data(losses, design, differences.mean(2)[:, design.tested], differences.var(2, ddof=1))


def student(d: Data) -> Floats:
    """Student's t of each pair, Bonferroni: what was used until decision 36."""
    return stats.t.isf(ALPHA / 2 / len(d.design.tested), d.n - 1) * np.sqrt(d.tested / d.n)


def pooled(d: Data) -> Floats:
    """One variance of all arms: analysis of variance with Tukey's or Dunnett's critical value."""
    df = (d.n - 1) * (d.design.arms - 1)
    return _equal_variances(d.design, df) * np.sqrt(d.variances.mean(1, keepdims=True) / d.n)


@cache
def _equal_variances(design: Design, df: int) -> float:
    """Tukey's from scipy; Dunnett's from simulated t that share the first arm and the variance."""
    if not design.to_first:
        return float(stats.studentized_range.isf(ALPHA, design.arms, df) / np.sqrt(2))
    random = np.random.default_rng(1)
    arms = random.standard_normal((400_000, design.arms))
    t = np.abs(arms[:, 1:] - arms[:, :1]).max(1) / np.sqrt(2 * random.chisquare(df, len(arms)) / df)
    return float(np.quantile(t, 1 - ALPHA))


def limma(d: Data) -> Floats:
    """Variances of pairs, drawn to a common one as far as they seem to scatter about it (Smyth 2004), Bonferroni."""
    df = d.n - 1
    logs = np.log(d.variances) - special.digamma(df / 2) + np.log(df / 2)
    excess = logs.var(1, ddof=1) - special.polygamma(1, df / 2) if d.design.arms > 2 else np.full(len(logs), 1e9)
    grid = np.geomspace(0.05, 1e4, 4000)
    prior = 2 * np.interp(-excess, -special.polygamma(1, grid), grid, right=np.inf)
    finite = np.where(np.isfinite(prior), prior, 1e8)
    common = np.exp(logs.mean(1) + special.digamma(finite / 2) - np.log(finite / 2))
    variances = (finite[:, None] * common[:, None] + df * d.tested) / (finite[:, None] + df)
    total = np.minimum(finite + df, df * (d.design.arms - 1))[:, None]
    return stats.t.isf(ALPHA / 2 / len(d.design.tested), total) * np.sqrt(variances / d.n)


def satterthwaite(d: Data) -> Floats:
    """A variance of each arm about what all share of a seed, degrees of freedom by Satterthwaite (1946), Bonferroni."""
    if d.design.arms == 2:
        return student(d)
    one, two = (d.per_arm[:, list(arms)] for arms in zip(*(d.design.every[i] for i in d.design.tested), strict=True))
    sums = np.maximum(one + two, 1e-300)
    df = (d.n - 1) * sums**2 / np.maximum(one**2 + two**2, 1e-300)
    return stats.t.isf(ALPHA / 2 / len(d.design.tested), df) * np.sqrt(sums / d.n)


def max_t(d: Data) -> Floats:
    """The joint t of all pairs with the correlations that the seeds show (Hothorn et al. 2008), of SAMPLE reports."""
    first, second = np.array([d.design.every[i] for i in d.design.tested]).T
    random = np.random.default_rng(2)
    widths = np.full(d.tested.shape, np.nan)
    for index in range(SAMPLE):
        differences = d.losses[index, first] - d.losses[index, second]
        residuals = differences - differences.mean(1, keepdims=True)
        residuals /= np.sqrt((residuals**2).sum(1, keepdims=True))  # rows: residualsᵀ residuals is the correlation
        t = np.abs(random.standard_normal((2000, d.n)) @ residuals.T).max(1)
        t /= np.sqrt(random.chisquare(d.n - 1, len(t)) / (d.n - 1))
        widths[index] = np.quantile(t, 1 - ALPHA) * np.sqrt(d.tested[index] / d.n)
    return widths


def thunderhead(d: Data, looks: tuple[int, ...] = ()) -> Floats:
    """`thunderhead.lab.statistics.compare`, of many reports at once."""
    level, _ = multiplicity.correction([d.design.every[i] for i in d.design.tested], looks or (d.n,))
    return stats.t.isf(level / 2, d.n - 1) * np.sqrt(multiplicity.moderated(d.tested, d.variances, d.n) / d.n)


METHODS = {
    "Student, Bonferroni": student,
    "ANOVA, Tukey/Dunnett": pooled,
    "limma, Bonferroni": limma,
    "Satterthwaite": satterthwaite,
    "max-t, estimated": max_t,
    "**this project**": thunderhead,
}

# --- tables -----------------------------------------------------------------------------------------------------------


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def missed(d: Data, widths: Floats) -> float:
    """Share of the reports of which any interval misses the true difference, 0."""
    known = ~np.isnan(widths[:, 0])
    return float((np.abs(d.means) > widths)[known].any(1).mean())


def errors() -> Iterator[str]:
    """The highest family-wise error of all designs and numbers of seeds, and where it is."""
    yield row("losses", *METHODS)
    yield row("---", *["---"] * len(METHODS))
    for name, draw in NULL.items():
        worst = dict.fromkeys(METHODS, (0.0, ""))
        for design in DESIGNS:
            for n in SEEDS:
                d = data(draw(np.random.default_rng(0), design.arms, n), design)
                for method, widths in METHODS.items():
                    worst[method] = max(worst[method], (missed(d, widths(d)), f"{design.arms} × {n}"))
        yield row(name, *(f"{error:.3f} ({where})" for error, where in worst.values()))


def coverage() -> Iterator[str]:
    """Of this project's intervals, all of a report at once, and single ones."""
    cases = [(design, n) for design in DESIGNS[:4] for n in (2, 3, 8)]
    yield row("losses", *(f"{d.arms}{' to first' * d.to_first} × {n}" for d, n in cases))
    yield row("---", *["---"] * len(cases))
    for name, draw in NULL.items():
        cells = []
        for design, n in cases:
            d = data(draw(np.random.default_rng(1), design.arms, n), design)
            inside = np.abs(d.means) <= thunderhead(d)
            cells.append(f"{inside.all(1).mean():.3f} ({inside.mean():.3f})")
        yield row(name, *cells)


def limits() -> Iterator[str]:
    """Coverage of the *expected* loss of an arm with spikes, by Student's interval of two arms."""
    yield row("seeds", *map(str, SEEDS))
    yield row("---", *["---"] * len(SEEDS))
    for chance in (0.05, 0.1, 0.3):
        cells = []
        for n in SEEDS:
            d = data(_spikes(chance)(np.random.default_rng(5), 2, n), Design(2))
            cells.append(f"{(np.abs(d.means + 10 * chance) <= thunderhead(d)).mean():.3f}")
        yield row(f"spikes up, {100 * chance:g} %", *cells)


def power() -> Iterator[str]:
    """How often the first two arms, 4 standard deviations of their difference apart, are resolved; and other cases."""
    settings: dict[str, tuple[Callable[[Any, int, int], Floats], int, float]] = {
        "equal variances": (NULL["normal, equal variances"], 1, 2.0),
        "another arm has 10 × the variance": (_scaled(10.0), 1, 2.0),
        "another arm has 100 ×": (_scaled(100.0), 1, 2.0),
        "the arm itself has 10 ×": (_scaled(10.0), -1, 11.0),
        "halves move together": (_clusters, -1, 20.0),
        "heavy tails": (_heavy, 1, 6.0),
    }
    cases = [(design, n) for design in (Design(3), Design(4), Design(6, True)) for n in (2, 3, 5)]
    for design, n in cases:
        yield f"\n{design.arms} arms{', to the first' * design.to_first}, {n} seeds:\n"
        yield row("losses", *METHODS)
        yield row("---", *["---"] * len(METHODS))
        for name, (draw, arm, variance) in settings.items():
            losses = draw(np.random.default_rng(3), design.arms, n)
            losses[:, arm] += 4 * np.sqrt(variance)
            d = data(losses, design)
            pair = design.tested.index(design.every.index((0, arm % design.arms)))
            shares = []
            for method in METHODS.values():
                widths = np.broadcast_to(method(d), d.means.shape)[:, pair]
                shares.append(float((np.abs(d.means[:, pair]) > widths)[~np.isnan(widths)].mean()))
            yield row(name, *(f"{share:.2f}" for share in shares))


def peeking() -> Iterator[str]:
    """Seeds added from 3 to 8 until all pairs are resolved: wrong reports, reports resolved, seeds trained."""
    looks = tuple(range(3, 9))
    yield row("arms", "losses", "difference", "looks at 8 only", "**planned looks**", "uncorrected looks")
    yield row(*["---"] * 6)
    names = ("normal, equal variances", "one arm 100 ×", "heavy tails (t with 3 df)", "spikes up or down, 30 %")
    for design in (Design(2), Design(4), Design(4, True)):
        for name in names:
            draw = NULL[name]
            for apart in (0.0, 1.0, 2.0, 4.0)[: 4 if name.startswith("normal") else 1]:
                losses = draw(np.random.default_rng(4), design.arms, looks[-1])
                losses += apart * np.sqrt(2) * np.arange(design.arms)[:, None]
                first, second = np.array([design.every[i] for i in design.tested]).T
                true = apart * np.sqrt(2) * (first - second)
                cells = []
                for planned, used in (((8,), (8,)), (looks, looks), ((), looks)):
                    open_yet, wrong, seeds = np.full(DRAWS, True), np.full(DRAWS, False), np.zeros(DRAWS)
                    for n in used:
                        d = data(losses[:, :, :n], design)
                        widths = thunderhead(d, planned)
                        seeds[open_yet] = n
                        wrong |= open_yet & (np.abs(d.means - true) > widths).any(1)
                        open_yet &= ~(np.abs(d.means) > widths).all(1)
                    cells.append(f"{wrong.mean():.3f}, {1 - open_yet.mean():.2f}, {seeds.mean():.1f}")
                yield row(f"{design.arms}{' to first' * design.to_first}", name, f"{apart:g} sd", *cells)


def search(seconds: float = 20) -> Iterator[str]:
    """The worst of covariances that random draws and hill-climbing find, at the level that `multiplicity` gives."""
    cases: list[tuple[Design, tuple[int, ...]]] = [(design, (n,)) for design in DESIGNS[1:] for n in (2, 3, 5, 8)]
    cases += [(design, tuple(range(3, 9))) for design in DESIGNS[1:4]]
    yield row("arms", "seeds", "tried", "false verdicts under the worst", "variances of its differences / the smallest")
    yield row(*["---"] * 5)
    for design, looks in cases:
        first, second = np.array(design.every).T
        random, tried = np.random.default_rng(6), 0

        def chance(factor: Floats, draws: int, seed: int, design: Design = design, looks: Any = looks) -> float:
            sample, wrong = np.random.default_rng(seed), np.full(draws, False)
            losses = np.einsum("kj,djs->dks", factor, sample.standard_normal((draws, factor.shape[1], looks[-1])))
            for n in looks:
                d = data(losses[:, :, :n], design)
                wrong |= (np.abs(d.means) > thunderhead(d, looks)).any(1)
            return float(wrong.mean())

        best = [(chance(factor, 4000, 1), factor) for factor in multiplicity.covariances(design.arms)]
        start = time.monotonic()
        while (spent := time.monotonic() - start) < seconds:
            tried += 1
            factor = max(best, key=lambda each: each[0])[1] if spent > seconds * 0.8 else best[random.integers(6)][1]
            if spent < seconds / 2 and random.random() < 0.5:
                factor = np.diag(10 ** random.uniform(0, random.uniform(0.5, 4), design.arms))
            elif spent < seconds / 2:
                factor = random.standard_normal((design.arms, design.arms)) * 10 ** random.uniform(-2, 0)
                factor += np.diag(10 ** random.uniform(-3, 2, design.arms))
            else:
                factor = factor * np.exp(random.normal(0, 0.3, (design.arms, 1)))
                factor = factor + random.normal(0, 0.1, factor.shape) * (random.random() < 0.3) * np.abs(factor).mean()
            best = sorted([*best, (chance(factor, 4000, 1), factor)], key=lambda each: -each[0])[:12]
        error, factor = max(((chance(factor, 40_000, 2), factor) for _, factor in best[:6]), key=lambda each: each[0])
        error = chance(factor, 100_000, 3)  # anew: the best of several flatters itself
        variances = np.square(factor[first] - factor[second]).sum(1)
        shown = ", ".join(f"{value:.3g}" for value in variances / variances.min())
        arms = f"{design.arms}{' to first' * design.to_first}"
        yield row(arms, ", ".join(map(str, looks)), str(tried), f"{error:.4f}", shown)


TABLES = {table.__name__: table for table in (errors, coverage, limits, power, peeking, search)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tables", nargs="*", default=list(TABLES), metavar="|".join(TABLES))
    for name in parser.parse_args().tables:
        print(f"\n## {name}\n\n{TABLES[name].__doc__}\n")
        for line in TABLES[name]():
            print(line, flush=True)


if __name__ == "__main__":
    main()
