"""How much of the scatter from seed to seed falls out of a difference between arms of one seed.

    python benchmarks/pairing.py --seeds 12

Trains pairs of tiny models of unequal shapes for some seconds each, with initial weights as they are drawn (each by its
coordinates, so that models of other shapes have in common what both have room for) and, to compare, with others for
each shape. The ratio is the standard deviation of the differences paired by seed, over what it would be of unpaired
ones: 1 is no gain; the seeds needed for a certainty go with its square.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from thunderhead.composing import groups_composed_once  # noqa: E402
from thunderhead.core.config import read_mapping  # noqa: E402
from thunderhead.core.model import init  # noqa: E402
from tiny import train_here  # noqa: E402

BASE = (
    *("model=nano", "model.n_layers=2", "model.d_model=64", "model.n_heads=4", "model.context_length=64"),
    *("model.d_ff=256", "attention=mha", "activation=gelu", "tokenizer=byte", "data.max_validation_bytes=32768"),
    *("batch.global_tokens=512", "batch.micro_size=8", "budget=steps", "budget.steps=100", "trainer=cpu"),
    *("precision=fp32", "logger=csv", "callbacks=none", "sample=false"),
)
ARMS = {
    "mha": (),
    "mqa": ("attention=mqa",),
    "d_ff 176": ("model.d_ff=176",),
    "swiglu": ("activation=swiglu", "model.d_ff=176"),
    "d_model 80": ("model.d_model=80",),
    "3 layers": ("model.n_layers=3",),
}
by_coordinates = init._draw


def by_shape(shape: torch.Size, seed: int, path: str) -> Tensor:
    return by_coordinates(shape, seed, f"{path} {tuple(shape)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    losses: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as work, groups_composed_once():
        for seed in range(arguments.seeds):
            for name, arm in ARMS.items():
                for how, draw in (("by shape", by_shape), ("by coordinates", by_coordinates)):
                    folder = Path(work) / f"{seed}-{name}-{how}"
                    folder.mkdir()
                    lines = [*BASE, *arm, f"seed={seed}", f"data.shards_dir={work}/shards"]
                    with patch.object(init, "_draw", draw), contextlib.redirect_stdout(io.StringIO()):
                        train_here(lines, folder)
                    losses.setdefault((how, name), []).append(read_mapping(folder / "summary.json")["val_loss"])
            print(f"seed {seed + 1} of {arguments.seeds}", file=sys.stderr)
    print("| against mha | ratio, by shape | ratio, by coordinates | correlation, by shape | by coordinates |")
    print("|---|---|---|---|---|")
    for name in [*ARMS][1:]:
        cells = []
        for how in ("by shape", "by coordinates"):
            a, b = np.array(losses[how, name]), np.array(losses[how, "mha"])
            cells.append((np.std(a - b, ddof=1) / np.hypot(a.std(ddof=1), b.std(ddof=1)), np.corrcoef(a, b)[0, 1]))
        (ratio, correlation), (ratio_now, correlation_now) = cells
        print(f"| {name} | {ratio:.2f} | {ratio_now:.2f} | {correlation:.2f} | {correlation_now:.2f} |")


if __name__ == "__main__":
    main()
