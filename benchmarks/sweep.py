"""How much of a sweep's time is training: named ablations, with jobs forked and with jobs that import by themselves.

    python benchmarks/sweep.py --rounds 2 [overrides of the sweep, e.g. seed=1,2 budget.steps=50]

Efficiency is the seconds of training of all runs (as in their summaries: optimizer steps, without validation) over the
seconds of the whole command, with one job at a time. Both kinds take turns. The data is prepared before.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SWEEP = ["-m", "activation=relu,gelu,swiglu", "seed=1,2,3", "budget.steps=150", "data.max_validation_tokens=32768"]


def sweep(*overrides: str) -> tuple[float, float]:
    """Seconds of the command, and seconds of training."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", *SWEEP, f"hydra.sweep.dir={folder}/sweep", *overrides]
        begin = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - begin
        return wall, sum(json.loads(file.read_text())["seconds"] for file in Path(folder).glob("sweep/*/summary.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    arguments, overrides = parser.parse_known_args()
    subprocess.run([sys.executable, "prepare.py"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    kinds = {"forked": ["hydra.launcher.fork=true"], "importing": ["hydra.launcher.fork=false"]}
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for _ in range(arguments.rounds):
        for kind, own in kinds.items():
            found[kind].append(sweep(*own, *overrides))
            wall, training = found[kind][-1]
            print(f"{kind}: {training:.1f} s of training in {wall:.1f} s, efficiency {training / wall:.2f}", flush=True)
    walls = {kind: statistics.median(wall for wall, _ in times) for kind, times in found.items()}
    print(f"importing / forked: {walls['importing'] / walls['forked']:.2f} × the time")


if __name__ == "__main__":
    main()
