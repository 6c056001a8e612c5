"""Runs that pairing by seed and planned looks save: python benchmarks/saved_runs.py (some minutes on one core).

For each sweep of benchmarks/results/ablations, losses are drawn as its real runs had them: a mean for each arm, what a
seed does to all arms alike, and what it does to one arm, all three estimated from the real losses. Seeds are added as
`until=resolved` does, from 3 to 8. The fixed design that it is compared with has as many seeds for each arm as Welch's
test (unpaired, corrected by Bonferroni) needs to give as many verdicts.
"""

import csv
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from thunderhead.lab.multiplicity import ALPHA
from thunderhead.lab.statistics import SMALLEST_EFFECT, compare, unresolved

RESULTS = Path(__file__).parent / "results" / "ablations"
LOOKS = tuple(range(3, 9))
MOST = 400  # seeds of a fixed design
SWEEPS, REPORTS = 300, 2000  # that are simulated, of the sequential design and of each fixed one
Floats = NDArray[np.float64]


class Losses(NamedTuple):
    """What a sweep's losses are drawn from, in nats."""

    means: Floats  # (arms,)
    of_seed: float  # standard deviation of what a seed does to all arms
    of_run: float  # of what it does to one

    def draw(self, generator: np.random.Generator, n_sweeps: int, n_seeds: int) -> Floats:
        """(sweeps, arms, seeds)."""
        common = generator.normal(0, self.of_seed, (n_sweeps, 1, n_seeds))
        own = generator.normal(0, self.of_run, (n_sweeps, len(self.means), n_seeds))
        return self.means[:, None] + common + own


def read(file: Path) -> Losses:
    """By the two-way analysis of variance of what all arms and seeds have."""
    by_arm: dict[str, dict[str, float]] = defaultdict(dict)
    for row in csv.DictReader(file.open()):
        by_arm[row["arm"]][row["seed"]] = float(row["loss_averaged" if "averaging" in file.stem else "val_loss"])
    seeds = sorted(set.intersection(*(set(losses) for losses in by_arm.values())))
    table = np.array([[losses[seed] for seed in seeds] for losses in by_arm.values()])
    n_arms, n_seeds = table.shape
    means, effects = table.mean(1), table.mean(0) - table.mean()
    rest = table - means[:, None] - effects
    of_run = float(np.sum(rest**2)) / (n_arms - 1) / (n_seeds - 1)
    of_seed = float(np.sum(effects**2)) / (n_seeds - 1) - of_run / n_arms
    return Losses(means, max(0.0, of_seed) ** 0.5, of_run**0.5)


def sequential(losses: Losses, generator: np.random.Generator) -> tuple[float, float, float]:
    """Mean runs of a sweep with until=resolved, share of pairs with a verdict, and of sweeps with a wrong one."""
    names = [str(arm) for arm in range(len(losses.means))]
    pairs = [(b, a) for a, b in combinations(names, 2)]
    n_runs, resolved, wrong = 0, 0, 0
    for drawn in losses.draw(generator, SWEEPS, LOOKS[-1]):
        seeds = dict.fromkeys(names, LOOKS[0])
        for n in LOOKS:
            have = {arm: dict(enumerate(drawn[int(arm), : seeds[arm]])) for arm in names}
            found = compare(have, pairs, looks=LOOKS)
            unclear = unresolved(found)
            if not unclear or n == LOOKS[-1]:
                break
            seeds |= dict.fromkeys(unclear, n + 1)
        n_runs += sum(seeds.values())
        resolved += sum(c.verdict != "open" for c in found)
        true = [losses.means[int(c.arm)] - losses.means[int(c.against)] for c in found]
        wrong += any(_is_wrong(c.verdict, gap) for c, gap in zip(found, true, strict=True))
    return n_runs / SWEEPS, resolved / SWEEPS / len(pairs), wrong / SWEEPS


def _is_wrong(verdict: str, gap: float) -> bool:
    return (verdict == "better" and gap >= 0) or (verdict == "worse" and gap <= 0)


def unpaired(losses: Losses, n: int, generator: np.random.Generator) -> float:
    """Share of pairs with a verdict by Welch's intervals at n seeds an arm, corrected by Bonferroni."""
    # other seeds for each arm: what a seed does to all is one more part of a run's variance
    alone = losses._replace(of_seed=0.0, of_run=float(np.hypot(losses.of_seed, losses.of_run)))
    drawn = alone.draw(generator, REPORTS, n)
    pairs = list(combinations(range(len(losses.means)), 2))
    given = 0.0
    for a, b in pairs:
        test = stats.ttest_ind(drawn[:, b], drawn[:, a], axis=1, equal_var=False)
        low, high = test.confidence_interval(1 - ALPHA / len(pairs))
        given += np.mean((low > 0) | (high < 0) | ((low > -SMALLEST_EFFECT) & (high < SMALLEST_EFFECT)))
    return float(given) / len(pairs)


def fixed(losses: Losses, share: float, generator: np.random.Generator) -> int | None:
    """Fewest seeds an arm that give a verdict on that share of the pairs; None if MOST do not."""
    low, high = 1, 2
    while unpaired(losses, high, generator) < share:
        low, high = high, 2 * high
        if high > MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if unpaired(losses, middle, generator) >= share else (middle, high)
    return high


def main() -> None:
    print("| ablation | sd of a seed | sd of a run | verdicts | wrong | runs, until=resolved | runs, fixed | ratio |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    sums = np.zeros(2)
    for file in sorted(RESULTS.glob("*.csv")):
        generator, losses = np.random.default_rng(0), read(file)
        runs, share, wrong = sequential(losses, generator)
        n = fixed(losses, share, generator) or MOST
        sums += runs, n * len(losses.means)
        cells = [f"{losses.of_seed:.4f}", f"{losses.of_run:.4f}", f"{share:.0%}", f"{wrong:.1%}", f"{runs:.1f}"]
        cells += [f"{'≥ ' * (n == MOST)}{n * len(losses.means)}", f"{runs / n / len(losses.means):.2f}"]
        print("| " + " | ".join([file.stem.removeprefix("ablation_"), *cells]) + " |", flush=True)
    print(f"| all | | | | | {sums[0]:.1f} | {sums[1]:.0f} | {sums[0] / sums[1]:.2f} |")


if __name__ == "__main__":
    main()
