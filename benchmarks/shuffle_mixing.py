"""How well the order in two levels (chunks, then a window) mixes a corpus, against a full shuffle.

    python benchmarks/shuffle_mixing.py

For a corpus of 64 chunks as `prepare.py` writes them (64 MiB, 32,768 blocks of 1,024 tokens: 2.1 billion tokens) it
walks one epoch of `Order` (core/data/order.py) for several windows, and measures, of blocks that follow each other
in training, how far apart they lie in the corpus, and of each 512 in a row (a batch of half a million tokens), from how
many chunks they are. Writes a table and a picture.
"""

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from thunderhead.core.data.order import Order, permutation

CHUNKS, BLOCKS, BATCH = 64, 32_768, 512
WINDOWS = (1, 4_096, 32_768, 65_536, 262_144, CHUNKS * BLOCKS)
RESULTS = Path(__file__).with_name("results")
Positions = npt.NDArray[np.int64]


def walk(window: int, n: int) -> Positions:
    """Positions in the corpus of the first n blocks of an epoch."""
    order = Order("corpus", [BLOCKS] * CHUNKS, seed=1, window=window)
    return np.array([order(k)[1] for k in range(n)])


def distances(positions: Positions) -> npt.NDArray[np.float64]:
    """How far blocks that follow each other lie apart, as a share of the corpus."""
    return np.abs(np.diff(positions)) / (CHUNKS * BLOCKS)


def from_full_shuffle(found: npt.NDArray[np.float64]) -> float:
    """Kolmogorov-Smirnov distance to two independent uniform positions, which are within d with 1 - (1 - d)²."""
    found = np.sort(found)
    exact = 1 - (1 - found) ** 2
    steps = np.arange(len(found) + 1) / len(found)
    return float(max(np.abs(exact - steps[:-1]).max(), np.abs(exact - steps[1:]).max()))


def chunks_in_a_batch(positions: Positions) -> float:
    """The mean number of chunks in BATCH blocks that follow each other."""
    chunks = (positions // BLOCKS)[: len(positions) // BATCH * BATCH].reshape(-1, BATCH)
    return float(np.mean([len(np.unique(row)) for row in chunks]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=300_000, help="of the epoch to walk")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    lines = [
        "# How well the two-level shuffle mixes",
        "",
        "`python benchmarks/shuffle_mixing.py`",
        "",
        f"{CHUNKS} chunks of {BLOCKS:,} blocks; the first {arguments.blocks:,} blocks of an epoch. Distance: of blocks"
        " that follow each other in training, in the corpus, as a share of it; a full shuffle has a mean of 1/3. KS:"
        " largest difference between its distribution and a full shuffle's. Chunks: in how many a batch of"
        f" {BATCH} blocks lies.",
        "",
        "| data.shuffle_window | mean distance | KS to a full shuffle | same chunk | chunks in a batch |",
        "|---|---|---|---|---|",
    ]
    rows = [(f"{window:,}", walk(window, arguments.blocks)) for window in WINDOWS]
    rows.append(("full shuffle (numpy)", permutation(CHUNKS * BLOCKS, 7)[: arguments.blocks]))
    for index, (name, positions) in enumerate(rows):
        apart, same = distances(positions), np.mean(np.diff(positions // BLOCKS) == 0)
        measured = (
            f"{apart.mean():.4f} | {from_full_shuffle(apart):.3f} | {same:.1%} | {chunks_in_a_batch(positions):.1f}"
        )
        lines.append(f"| {name} | {measured} |")
        style = {"color": "black", "linestyle": ":"} if index == len(rows) - 1 else {}
        axes.plot(np.sort(apart)[::100], np.linspace(0, 1, len(apart))[::100], label=name, **style)
    axes.set(
        xscale="log", xlim=(1e-6, 1), ylim=(0, 1), title="data.shuffle_window and a full shuffle",
        xlabel="distance of neighbours in training, as a share of the corpus",
        ylabel="share of neighbours within it",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    arguments.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out / "shuffle_mixing.png", dpi=120)
    (arguments.out / "shuffle_mixing.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
