"""How often runs of one and the same arm are called different: sweeps of real runs, with nothing to find.

    python benchmarks/same_arm.py --sweeps 100 --seeds 3 [overrides of the runs]

trains so many runs of one tiny arm, each with a seed of its own, and then names the first seeds of each group A and the
next ones B, as a sweep of two arms would have them: every "better" or "worse" is false. Runs that are there already
count, so that a stopped measurement goes on. By hundreds of runs of a second: some 20 minutes on one core.
"""

import argparse
import subprocess
import sys
from collections import Counter
from pathlib import Path

from scipy import stats

from thunderhead.lab.runs import read_runs
from thunderhead.lab.statistics import ALPHA, compare

ROOT = Path(__file__).resolve().parents[1]
ARM = (
    *("model.n_layers=2", "model.d_model=64", "model.n_heads=4", "model.context_length=64", "batch.global_tokens=1024"),
    *("batch.micro_size=16", "budget.steps=60", "tokenizer=byte", "model.vocab_size=null", "optimizer.lr=0.003"),
    *("data.max_validation_bytes=16384", "data=stdlib", "data.sources.stdlib.include_code=false", "sample=false"),
    *("precision=fp32", "logger=csv", "callbacks=none", "trainer.log_every_n_steps=30"),
)


def false_verdicts(losses: list[float], arms: int, seeds: int) -> Counter[str]:
    """What groups of `arms` × `seeds` losses are called, each by the worst of its comparisons."""
    found: Counter[str] = Counter()
    for first in range(0, len(losses) - arms * seeds + 1, arms * seeds):
        parts = [losses[at : at + seeds] for at in range(first, first + arms * seeds, seeds)]
        by_arm = {f"arm {index}": dict(enumerate(part)) for index, part in enumerate(parts)}
        pairs = [(a, b) for index, a in enumerate(by_arm) for b in list(by_arm)[:index]]
        verdicts = {comparison.verdict for comparison in compare(by_arm, pairs)}
        found["false" if verdicts & {"better", "worse"} else "open" if "open" in verdicts else "equal"] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=ROOT / "logs" / "sweeps" / "same_arm")
    arguments, overrides = parser.parse_known_args()
    n_runs = 2 * arguments.seeds * arguments.sweeps
    seeds = ",".join(map(str, range(1, n_runs + 1)))
    sweep = f"hydra.sweep.dir={arguments.folder}", f"seed={seeds}"
    command = [sys.executable, "train.py", "-m", *ARM, *overrides, *sweep]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    runs = sorted(read_runs([arguments.folder]), key=lambda run: run.seed)
    losses = [run.summary["val_loss"] for run in runs if run.summary is not None and run.unfinished is None]
    mean, deviation = stats.tmean(losses), stats.tstd(losses)
    print(f"{len(losses)} runs: final loss {mean:.4f}, standard deviation over seeds {deviation:.4f}")
    print("| arms × seeds | sweeps | false verdict | 95 % CI | practically equal | not resolved |")
    print("|---|---|---|---|---|---|")
    for arms, n in ((2, 2), (2, 3), (2, 5), (3, 3), (4, 3)):
        found = false_verdicts(losses, arms, n)
        sweeps = found.total()
        low, high = stats.binomtest(found["false"], sweeps).proportion_ci(1 - ALPHA)
        share = f"{found['false']} ({found['false'] / sweeps:.1%}) | {low:.1%} … {high:.1%}"
        print(f"| {arms} × {n} | {sweeps} | {share} | {found['equal']} | {found['open']} |")


if __name__ == "__main__":
    main()
