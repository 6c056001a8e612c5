"""Speed and memory of this project and public peers as context and model grow.

    python benchmarks/growth.py

Needs what train_step.py needs, a machine with nothing beside it, and some 40 minutes on two cores. Nothing is compiled,
which would take minutes for each point and side; all else is as in train_step.py: Llama-like decoders, bfloat16
autocast, fused AdamW, the same allocator settings, turns in rounds, ratios within a round.

Written: results/growth.json, docs/images/growth.png, the tables in docs/performance.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import train_step
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from results_folder import RESULTS

SIDES = ("train.py", "litgpt_best", "huggingface_best")
NAMES = {"train.py": "train.py", "litgpt_best": "litgpt", "huggingface_best": "Hugging Face"}
COLOURS = {"train.py": "#0072B2", "litgpt_best": "#D55E00", "huggingface_best": "#009E73"}
MARKERS = {"train.py": "o", "litgpt_best": "s", "huggingface_best": "^"}
VOCAB = 8192
WIDTH = {4: 160, 6: 256, 8: 384, 10: 640, 12: 768, 20: 1088}
"""Model dimensions by layers: 1 M to 300 M parameters beside embedding and head."""


def sizes(layers: int, context: int, sequences: int) -> list[int]:
    """What sides.py takes: heads of 32 or 64, a quarter of them for keys and values, d_ff of 8/3."""
    width = WIDTH[layers]
    heads = width // (32 if width < 512 else 64)
    kv_heads = next(n for n in (heads // 4, heads // 5, heads // 3, 1) if n and heads % n == 0)
    return [layers, width, heads, kv_heads, round(width * 8 / 3 / 32) * 32, VOCAB, context, sequences]


def point(shape: list[int], threads: int, rounds: int) -> dict[str, Any]:
    """Measure all sides of one size; those whose states do not fit into memory together beside each other, in pairs."""
    pairs = [(SIDES[0], peer) for peer in SIDES[1:]] if shape[0] >= 20 else [SIDES]
    found: dict[str, Any] = {}
    for names in pairs:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "found.json"
            command = [
                sys.executable,
                str(Path(train_step.__file__)),
                "--clock",
                "wall",
                "--steps",
                "2",
                "--json",
                str(file),
            ]
            command += ["--threads", str(threads), "--rounds", str(rounds), "--sides", *names]
            environment = os.environ | {"SIDES_SIZES": json.dumps(shape), "TORCH_COMPILE_DISABLE": "1"}
            subprocess.run(command, check=True, env=environment)
            measured = json.loads(file.read_text())
        found = measured | {"sides": found.get("sides", {}) | measured["sides"]}
    return found


def table(points: list[dict[str, Any]], first: str) -> list[str]:
    """A row a point: tokens/s of ours, how many times a peer's time of a step is ours, memory."""
    head = [first, "`train.py`, tokens/s", "litgpt's time of a step ×", "Hugging Face's ×"]
    head += ["memory: `train.py`", "litgpt", "Hugging Face"]
    lines = ["| " + " | ".join(head) + " |", "|--:" * len(head) + "|"]
    for each in points:
        rows = [each["sides"][side] for side in SIDES]
        cells = [each["label"], f"{rows[0]['tokens_per_core_second'] * each['threads']:,.0f}"]
        cells += [f"{row['seconds_over_train_py']:.2f}" for row in rows[1:]]
        cells += [f"{row['peak_bytes'] / 2**30:.2f} GiB" for row in rows]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _short(n: float) -> str:
    return f"{n / 1e6:.0f} M"


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Tokens/s and memory against context and size."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(2, 2)
    labels = ("context (tokens)", "parameters without embedding and head")
    for column, points, label in zip(panels.T, found.values(), labels, strict=True):
        for side in SIDES:
            rows, x = [each["sides"][side] for each in points], [each["x"] for each in points]
            look = {"color": COLOURS[side], "marker": MARKERS[side], "label": NAMES[side]}
            speeds = [row["tokens_per_core_second"] * each["threads"] for row, each in zip(rows, points, strict=True)]
            column[0].loglog(x, speeds, **look)
            column[1].loglog(x, [row["peak_bytes"] / 2**30 for row in rows], **look)
        column[0].set(ylabel="tokens/s", xlabel=label)
        column[1].set(ylabel="peak memory, GiB", xlabel=label)
    for axes, (axis, points) in zip(panels.flat, 2 * list(found.items()), strict=True):
        axes.xaxis.set_major_locator(FixedLocator([each["x"] for each in points]))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda x, _, axis=axis: _short(x) if axis == "size" else f"{x:,.0f}")
        )
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="two small points, and print only")
    args = parser.parse_args()
    contexts, layers = ([32], [4]) if args.smoke else ([256, 512, 1024, 2048, 4096, 8192], [*WIDTH])
    found: dict[str, list[dict[str, Any]]] = {"context": [], "size": []}
    for context in contexts:
        of_step = max(context, 64 if args.smoke else 2048)  # tokens
        measured = point(sizes(4 if args.smoke else 8, context, of_step // context), args.threads, args.rounds)
        found["context"].append({"x": context, "label": f"{context:,}", **measured})
    for n in layers:
        context = 32 if args.smoke else 256
        shape = sizes(n, context, 2 if n >= 20 else 8)
        measured = point(shape, args.threads, args.rounds)
        n_parameters = measured["parameters"] - 2 * VOCAB * shape[1]
        found["size"].append({"x": n_parameters, "label": f"{n_parameters / 1e6:,.1f} M", **measured})
    lines = [*table(found["context"], "context"), *table(found["size"], "parameters")]
    first = found["context"][0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    says = f"{first['device']}, {args.threads} threads, {first['date']}, medians of {args.rounds} rounds of 2 steps"
    says += f", not compiled; {versions}."
    text = "\n".join([says, "", *lines])
    print(f"\n{text}")
    if args.smoke:
        return
    (RESULTS / "growth.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, train_step.DOCS.parent / "images" / "growth.png")
    picture = "![Tokens per second and memory against context and size](images/growth.png)"
    train_step.into_docs("growth", f"{text}\n{picture}\n")


if __name__ == "__main__":
    main()
