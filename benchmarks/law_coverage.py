"""How often the 95 % intervals of a scaling law hold what is true, where small budgets scatter more than large ones.

    python benchmarks/law_coverage.py                # 200 grids of each kind on all cores: some ten minutes on two

Losses follow the law of Besiroglu et al. (2404.10102) with normal noise of log L, 0.8 % up to the middle budget and
0.4 % above. `drawn`: 240 runs of budgets and sizes drawn at random, as many as the authors could read off Hoffmann et
al.'s figure; `grid`: 9 sizes at each of 9 budgets; `small`: 4 sizes at each of 4.
"""

import argparse
import itertools
import multiprocessing
import os
import sys
from functools import partial

import numpy as np

from thunderhead.lab.parabolas import Point
from thunderhead.lab.scaling import fit

TRUE = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
ASKED = TRUE | {"a": 0.3658 / 0.7136, "b": 0.3478 / 0.7136}
BUDGETS = np.array([6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21])
KINDS = ("drawn", "grid", "small")


def runs(kind: str, seed: int) -> list[Point]:
    """Runs of one grid."""
    draw = np.random.default_rng(seed)
    if kind == "drawn":
        places = zip(draw.choice(BUDGETS, 240), np.exp(draw.uniform(-1, 1, 240) * np.log(6)), strict=True)
    else:
        budgets, n_sizes = (BUDGETS, 9) if kind == "grid" else (BUDGETS[::2][:4] * 1.0, 4)
        places = itertools.product(budgets, np.geomspace(1 / 5, 5, n_sizes))
    points = []
    for flops, share in places:
        n = share * 0.47 * (flops / 6) ** 0.5  # near the best size
        d = flops / 6 / n
        loss = TRUE["E"] + TRUE["A"] / n ** TRUE["alpha"] + TRUE["B"] / d ** TRUE["beta"]
        noise = (0.008 if flops <= 1e20 else 0.004) * draw.normal()
        points.append(Point("", float(n), float(d), float(flops), float(loss * np.exp(noise))))
    return points


def hits(kind: str, n_resamples: int, seed: int) -> list[tuple[bool, float]]:
    """Of each quantity: whether its interval holds it, and the interval's width."""
    found = fit(runs(kind, seed), count="total", n_resamples=n_resamples, seed=seed).intervals
    ends = {name: (found[name].low, found[name].high) for name in ASKED}
    return [(low <= ASKED[name] <= high, high - low) for name, (low, high) in ends.items()]


def main() -> None:
    """Print a table for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=KINDS)
    parser.add_argument("--grids", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=200)
    asked = parser.parse_args()
    print(f"| inside (median width) | {' | '.join(ASKED)} |\n|---{'|---' * len(ASKED)}|")
    with multiprocessing.get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
        for kind in asked.kinds:
            found = []
            for n, each in enumerate(pool.imap(partial(hits, kind, asked.resamples), range(asked.grids)), 1):
                found.append(each)
                if sys.stderr.isatty() or n % 20 == 0:
                    print(f"{kind}: {n} of {asked.grids}", file=sys.stderr)
            inside, widths = np.moveaxis(np.array(found), 2, 0)
            shown = [f"{mean:.1%} ({np.median(w):.3g})" for mean, w in zip(inside.mean(0), widths.T, strict=True)]
            print(f"| {kind} | " + " | ".join(shown) + " |", flush=True)


if __name__ == "__main__":
    main()
