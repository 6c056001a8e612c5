"""How long commands take before they do what they are for, beside what importing the libraries takes.

    python benchmarks/startup.py --rounds 5

Each round runs each command once, in turn, as a process of its own; medians, and ratios to `import torch` and to
`import torch, lightning.pytorch`. After thunderhead, Lightning comes without what no run here uses
(thunderhead/lean.py). "First step" is a run of one step of a tiny model on data that is prepared.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    *("model.n_layers=2", "model.d_model=64", "model.n_heads=4", "model.context_length=64", "batch.global_tokens=1024"),
    *("batch.micro_size=16", "budget.steps=1", "data.max_validation_bytes=1024", "callbacks=none", "logger=csv"),
    "sample=false",
)
IMPORTS = ("import torch", "import torch, lightning.pytorch")
LEAN = "import thunderhead, torch, lightning.pytorch"
COMMANDS = {
    **{name: ["-c", name] for name in (*IMPORTS, LEAN)},
    "train.py --help": ["train.py", "--help"],
    "train.py --cfg job": ["train.py", "--cfg", "job"],
    "train.py attention=foo": ["train.py", "attention=foo"],
    "train.py dry_run=true": ["train.py", "dry_run=true"],
    "first step": ["train.py", *TINY],
}


def seconds(command: list[str], folder: str) -> float:
    """Of a Python program, from its start to its end."""
    own = [f"hydra.run.dir={folder}/{time.monotonic_ns()}"] if command[0] == "train.py" else []
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    begin = time.perf_counter()
    subprocess.run([sys.executable, *command, *own], cwd=ROOT, env=environment, capture_output=True, check=False)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    subprocess.run([sys.executable, "prepare.py"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.rounds + 1):  # the first, which writes bytecode and fills caches, does not count
            for name, command in COMMANDS.items():
                found[name].append(seconds(command, folder))
    medians = {name: statistics.median(times[1:]) for name, times in found.items()}
    print(f"| command | seconds | × {IMPORTS[0]} | × {IMPORTS[1]} |")
    print("|---|---|---|---|")
    for name, median in medians.items():
        print(f"| `{name}` | {median:.1f} | {' | '.join(f'{median / medians[base]:.2f}' for base in IMPORTS)} |")


if __name__ == "__main__":
    main()
