"""How often the 90 % intervals of a ladder hold what is true, and which verdicts it gives, where the truth is known.

    python benchmarks/ladder_coverage.py               # 500 ladders of each kind: some five minutes on one core

The baseline follows E + k / C^γ (or another form), from 2e10 FLOPs on, each size with 6 times the compute of the one
before; the arm reaches at C what the baseline reaches at multiplier(C) · C. A seed adds the same to both arms (0.01
nats), and each run something of its own (0.005; `falling` noise: twice that at the smallest size, down to a half at the
largest). Projection and predicted loss are of 10 times the largest compute.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from thunderhead.lab.ladder import Estimate, Persistence, Rung, climb

SMALLEST, STEP, FURTHER = 2e10, 6.0, 10.0
SHARED, OWN = 0.01, 0.005
LAWS: dict[str, Callable[[float], float]] = {
    "E + k / C^γ": lambda c: 1.3 + 1.0 * (c / SMALLEST) ** -0.3,
    "k / C^γ": lambda c: 2.3 * (c / SMALLEST) ** -0.1,
    "two powers": lambda c: 1.2 + 0.5 * (c / SMALLEST) ** -0.4 + 0.6 * (c / SMALLEST) ** -0.2,
}


def multipliers(largest: float) -> dict[str, Callable[[float], float]]:
    """By name, of compute: shrinking ones have 1.4 at the smallest size and 1.1 at the largest."""

    def decades(c: float) -> float:
        return float(np.log10(c / SMALLEST) / np.log10(largest / SMALLEST))

    return {
        "1.0": lambda c: 1.0,
        "1.1": lambda c: 1.1,
        "1.4 → 1.1": lambda c: 1.4 * (1.1 / 1.4) ** decades(c),
        "1.4 → 1.1, levelling off": lambda c: float(1.4 ** ((np.log(1.1) / np.log(1.4)) ** decades(c))),
    }


def simulate(
    law: str, multiplier: str, *, sizes: int, seeds: int, seed: int, falling: bool = False, noise: float = 1.0
) -> tuple[Persistence, dict[str, tuple[Estimate, float]]]:
    """A ladder, and each quantity's estimate with the true value; `noise`: times the usual."""
    draw = np.random.default_rng(seed)
    flops = SMALLEST * STEP ** np.arange(sizes)
    loss, true = LAWS[law], multipliers(flops[-1])[multiplier]
    own = noise * OWN * (np.geomspace(2, 0.5, sizes) if falling else np.ones(sizes))
    rungs: list[list[Rung]] = [[], []]
    for index, c in enumerate(flops):
        shared, alone = noise * SHARED * draw.normal(size=seeds), own[index] * draw.normal(size=(2, seeds))
        for arm, mean in enumerate((loss(c), loss(true(c) * c))):
            losses = dict(enumerate(map(float, mean + shared + alone[arm])))
            rungs[arm].append(Rung(f"s{index}", 1.0, float(c), losses))
    found = climb(rungs[0], "arm", rungs[1], seed=seed)
    at = [true(c) for c in flops]
    slope, intercept = np.polyfit(np.log10(flops), np.log(at), 1)
    far = FURTHER * flops[-1]
    asked = {f"size {i + 1}": (effect.multiplier, at[i]) for i, effect in enumerate(found.effects)}
    asked["trend"] = (found.trend, float(np.exp(slope)))
    asked["largest, fitted"] = (found.effects[-1].fitted, float(np.exp(intercept + slope * np.log10(flops[-1]))))
    asked["projection"] = (found.project(far), true(far))
    asked["loss"] = (found.predict_loss(far), loss(true(far) * far))
    return found, asked


def coverage(law: str, multiplier: str, n: int, **how: Any) -> tuple[dict[str, float], dict[str, float], Counter[str]]:
    """Of n ladders: how often each interval holds the truth, the intervals' median width, and the verdicts."""
    runs = [simulate(law, multiplier, seed=seed, **how) for seed in range(n)]
    held = {
        name: float(np.mean([a[name][0].interval.low <= a[name][1] <= a[name][0].interval.high for _, a in runs]))
        for name in runs[0][1]
    }
    widths = {
        name: float(np.median([a[name][0].interval.high - a[name][0].interval.low for _, a in runs]))
        for name in runs[0][1]
    }
    return held, widths, Counter(found.verdict for found, _ in runs)


def main() -> None:
    """Print a row for each kind of ladder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ladders", type=int, default=500)
    n = parser.parse_args().ladders
    print(
        "| law | multiplier | sizes × seeds | at the sizes | trend | largest, fitted | projection | loss | verdicts |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    kinds = [(law, 4, 3, False) for law in LAWS]
    kinds += [("two powers", 3, 3, False), ("two powers", 3, 2, False), ("two powers", 4, 3, True)]
    for law, sizes, seeds, falling in kinds:
        for multiplier in multipliers(1.0):
            held, widths, verdicts = coverage(law, multiplier, n, sizes=sizes, seeds=seeds, falling=falling)
            of_sizes = [held[name] for name in held if name.startswith("size")]
            shown = [
                f"{held[name]:.0%} ({widths[name]:.2f})" for name in ("trend", "largest, fitted", "projection", "loss")
            ]
            told = ", ".join(f"{verdict} {count / n:.0%}" for verdict, count in verdicts.most_common())
            cells = [law, multiplier, f"{sizes} × {seeds}" + ", falling noise" * falling]
            cells += [f"{min(of_sizes):.0%} … {max(of_sizes):.0%}", *shown, told]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
