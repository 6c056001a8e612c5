"""A training step of this project beside a bare PyTorch loop and public peers, on a CPU.

    uv pip install -e '.[benchmarks]'                                 # transformers, accelerate; litgpt: see below
    uv pip install --no-deps litgpt                                   # its pins of other packages are older than ours
    python benchmarks/train_step.py --threads 2 --clock wall          # on a quiet machine, about 10 minutes
    python benchmarks/train_step.py                                   # CPU time of one thread: on a shared machine
    python benchmarks/train_step.py --ladder                          # eager, block, model × settings of the allocator

Every side (sides.py) is a process of its own that is warm and waits. In each round each side takes some steps, one side
after the other, the order turning from round to round; ratios are taken within a round and their median over rounds is
reported. `train.py` is the real program with its default metrics, TensorBoard, checkpoint callbacks and progress; it is
told its turns by one more callback. A turn holds no validation and no checkpoint.

Written: results/train_step.json and .md, docs/images/train_step.png, the table in docs/performance.md (or
results/compile_ladder.* and that table).
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if "--smoke" in sys.argv:  # before sides sets the sizes, and before torch asks
    os.environ |= {"SIDES_SIZES": "[1, 48, 6, 2, 64, 8192, 32, 8]", "TORCH_COMPILE_DISABLE": "1"}

import sides
import torch
from matplotlib.figure import Figure
from results_folder import RESULTS

from thunderhead.core import config as configuration
from thunderhead.core.components import build
from thunderhead.core.model_spec import build_decoder
from thunderhead.training import hardware

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ROOT / "docs" / "images" / "train_step.png"
DOCS = ROOT / "docs" / "performance.md"
TOKENS = sides.BATCH * sides.T  # of a step
WARM_UP = 4  # steps
NAMES = {
    "bare": "bare PyTorch loop of our model",
    "train.py": "`train.py`",
    "litgpt_best": "litgpt, at its best here",
    "huggingface_best": "Hugging Face Trainer, at its best here",
    "litgpt_shipped": "litgpt, as shipped",
    "huggingface_shipped": "Hugging Face Trainer, as shipped",
}
LADDER = [f"bare_{scope}_{allocator}" for scope in ("none", "block", "model") for allocator in ("glibc", "huge")]
RANGES = ("slowest", "fastest")


class Side:
    """A process that takes its turns when told."""

    def __init__(self, name: str, folder: Path, threads: int):
        self.name, self.log = name, folder / f"{name}.log"
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        own = folder / name
        environment = os.environ | sides.environment(name)
        environment |= {"OMP_NUM_THREADS": str(threads), "TURNS_IN": str(orders), "TURNS_OUT": str(answers)}
        environment |= {"TURNS_FOLDER": str(own), "PYTHONPATH": str(ROOT / "benchmarks")}
        command = [str(ROOT / "benchmarks" / "sides.py"), name, str(folder / "batches.pt")]
        if name == "train.py":
            scope = "compile=none" if sides.EAGER else "compile=model"
            turns = "+callbacks.turns._target_=sides.lightning_turns"
            command = [str(ROOT / "train.py"), *sides.TRAIN_PY, scope, turns, f"hydra.run.dir={own}"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(orders, answers),
            )
        os.close(orders)
        os.close(answers)
        self._reader = os.fdopen(self._answers, "r")

    def turn(self, steps: int) -> dict[str, float]:
        """Have it take some steps; seconds a step by both clocks, the peak of its memory, and its loss."""
        os.write(self._orders, f"{steps}\n".encode())
        answer = self._reader.readline()
        if not answer:
            raise SystemExit(f"{self.name} ended:\n{self.log.read_text()[-3000:]}")
        found = json.loads(answer)
        return found | {"cpu": found["cpu"] / steps, "wall": found["wall"] / steps}

    def close(self) -> None:
        """End it."""
        os.close(self._orders)
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def save_batches(path: Path, count: int) -> None:
    """The first batches that train.py will read, (count, BATCH, T + 1), for those who read no shards."""
    config = configuration.plain(configuration.compose(sides.TRAIN_PY))
    sizes = {"context_length": sides.T, "micro_batch_size": sides.BATCH, "sequences_per_step": sides.BATCH}
    module = build(config["data"], tokenizer=build(config["tokenizer"]), filters={}, seed=1, **sizes)
    module.prepare_data()
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    module.trainer = SimpleNamespace(global_step=0, max_steps=-1, strategy=strategy, global_rank=0, world_size=1)
    module.setup("fit")
    torch.save(torch.stack(list(itertools.islice(iter(module.train_dataloader()), count))), path)


def matmul_flops(clock: Callable[[], float]) -> float:
    """FLOP/s of the step's matrix products alone, forward and backward, at their shapes, in bfloat16."""
    kv = sides.KV_HEADS * sides.WIDTH // sides.HEADS
    layer = [(sides.WIDTH, n) for n in (sides.WIDTH, kv, kv, sides.WIDTH, sides.D_FF, sides.D_FF)]
    shapes = [*[*layer, (sides.D_FF, sides.WIDTH)] * sides.LAYERS, (sides.WIDTH, sides.VOCAB)]
    flops = seconds = 0.0
    for (n_in, n_out), count in ((shape, shapes.count(shape)) for shape in dict.fromkeys(shapes)):
        x, w, g = (torch.randn(*size).bfloat16() for size in ((TOKENS, n_in), (n_out, n_in), (TOKENS, n_out)))
        for product in (lambda x=x, w=w: x @ w.T, lambda w=w, g=g: g @ w, lambda x=x, g=g: g.T @ x):  # type: ignore[misc]
            best = float("inf")
            for _ in range(4):
                start = clock()
                product()
                best = min(best, clock() - start)
            seconds += count * best
            flops += count * 2 * TOKENS * n_in * n_out
    return flops / seconds


def model_sizes() -> tuple[int, int]:
    """FLOPs a token, forward and backward, without recomputation (PaLM's convention), and parameters."""
    config = configuration.plain(configuration.compose(sides.TRAIN_PY))
    with torch.device("meta"):
        decoder = build_decoder(config, sides.VOCAB, None)
    return 3 * decoder.forward_flops_per_token(), decoder.parameter_counts()["total"]


def measure(names: list[str], args: argparse.Namespace) -> list[dict[str, dict[str, float]]]:
    """The rounds: of each side the answer to its turn."""
    folder = Path(tempfile.mkdtemp(prefix="train_step."))
    save_batches(folder / "batches.pt", 32)
    processes: list[Side] = []
    try:
        for name in names:
            start = time.perf_counter()
            processes.append(Side(name, folder, args.threads))
            loss = processes[-1].turn(WARM_UP)["loss"]
            print(f"{name} is warm after {time.perf_counter() - start:.0f} s (loss {loss})", flush=True)
        rounds = []
        for number in range(args.rounds):
            answers = {}
            for side in processes[number % len(processes) :] + processes[: number % len(processes)]:
                slow = side.name.endswith(("_shipped", "_glibc"))
                answers[side.name] = side.turn(max(2, args.steps // 2) if slow else args.steps)
            rounds.append({name: answers[name] for name in names})
            print(
                f"round {number + 1}: " + " ".join(f"{n} {a[args.clock]:.2f}" for n, a in answers.items()), flush=True
            )
    finally:
        for side in processes:
            side.close()
        shutil.rmtree(folder, ignore_errors=True)
    return rounds


def summarise(names: list[str], args: argparse.Namespace, rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Medians, per side."""
    cores = args.threads if args.clock == "wall" else 1
    reference = "train.py" if "train.py" in names else names[-1]
    (flops, parameters), table = model_sizes(), {}
    matmul = matmul_flops(time.perf_counter if args.clock == "wall" else time.process_time)
    for name in names:
        seconds = [r[name][args.clock] for r in rounds]
        ratios = sorted(r[name][args.clock] / r[reference][args.clock] for r in rounds)
        table[name] = {
            "tokens_per_core_second": TOKENS / statistics.median(seconds) / cores,
            "slowest": TOKENS / max(seconds) / cores,
            "fastest": TOKENS / min(seconds) / cores,
            "seconds_over_train_py": statistics.median(ratios),
            "ratio_range": [ratios[0], ratios[-1]],
            "peak_bytes": max(r[name]["peak_bytes"] for r in rounds),
            "share_of_matmul_speed": flops * TOKENS / statistics.median(seconds) / matmul,
            "loss": rounds[-1][name]["loss"],
        }
    versions = {}
    for package in ("torch", "lightning", "litgpt", "transformers", "accelerate"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "device": hardware.device_name("cpu").rpartition(" (")[0],
        "threads": args.threads,
        "clock": args.clock,
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions,
        "rounds": args.rounds,
        "steps": args.steps,
        "reference": reference,
        "matmul_flops": matmul,
        "flops_per_token": flops,
        "parameters": parameters,
        "sides": table,
    }


def markdown(found: dict[str, Any]) -> str:
    """The table that goes into docs/performance.md."""
    clock = "wall time" if found["clock"] == "wall" else "CPU time of the process"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        f"{found['device']}, {found['threads']} thread{'s' * (found['threads'] > 1)}, {clock}, {found['date']}; "
        f"medians of {found['rounds']} rounds of {found['steps']} steps of {TOKENS:,} tokens; {versions}. The matrix "
        f"products alone: {found['matmul_flops'] / 1e9:,.0f} GFLOP/s.",
        "",
        "| side | tokens per core-second | time of a step against `train.py` (range of rounds) | peak memory (RSS) "
        "| FLOP/s over those of the matrix products alone |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, row in found["sides"].items():
        low, high = row["ratio_range"]
        lines.append(
            f"| {NAMES.get(name, name)} | {row['tokens_per_core_second']:,.0f} | {row['seconds_over_train_py']:.2f} "
            f"({low:.2f}–{high:.2f}) | {row['peak_bytes'] / 2**30:.2f} GiB | {row['share_of_matmul_speed']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def ladder_markdown(found: dict[str, Any]) -> str:
    """Compile scopes against settings of the allocator."""
    clock = "wall time" if found["clock"] == "wall" else "CPU time of the process"
    lines = [
        f"{found['device']}, {found['threads']} thread{'s' * (found['threads'] > 1)}, {clock}, {found['date']}; a bare "
        f"loop, medians of {found['rounds']} rounds; tokens per core-second (times as fast as eager with glibc's "
        "defaults; peak memory).",
        "",
        "| compile | glibc's defaults | freed memory kept, huge pages |",
        "|---|--:|--:|",
    ]
    base = found["sides"]["bare_none_glibc"]["seconds_over_train_py"]
    for scope in ("none", "block", "model"):
        cells = []
        for allocator in ("glibc", "huge"):
            row = found["sides"][f"bare_{scope}_{allocator}"]
            faster, memory = base / row["seconds_over_train_py"], row["peak_bytes"] / 2**30
            cells.append(f"{row['tokens_per_core_second']:,.0f} ({faster:.2f}×; {memory:.2f} GiB)")
        lines.append(f"| {scope} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def into_docs(marker: str, text: str) -> None:
    """Put a table where docs/performance.md has it."""
    page = DOCS.read_text()
    begin, end = f"<!-- {marker} -->\n", f"<!-- end of {marker} -->"
    head, _, rest = page.partition(begin)
    DOCS.write_text(head + begin + text + end + rest.partition(end)[2])


def draw(found: dict[str, Any], path: Path) -> None:
    """Tokens per core-second of each side, with the range over rounds."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    rows = list(found["sides"].items())[::-1]
    speeds = [row["tokens_per_core_second"] for _, row in rows]
    errors = [[abs(row[end] - row["tokens_per_core_second"]) for _, row in rows] for end in RANGES]
    colours = ["#0072B2" if name in ("bare", "train.py") else "#999999" for name, _ in rows]
    bars = axes.barh([NAMES.get(n, n).replace("`", "") for n, _ in rows], speeds, xerr=errors, color=colours)
    axes.bar_label(bars, [f" {speed:,.0f}" for speed in speeds], label_type="center", color="white")
    unit = "wall" if found["clock"] == "wall" else "CPU"
    axes.set(
        xlabel=f"tokens per core-second ({unit} time; {found['device']}, {found['threads']} threads)", xlim=(0, None)
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu", help="wall: on a quiet machine only")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="of a turn; slow sides take half as many")
    parser.add_argument("--sides", nargs="+", choices=[*NAMES, *LADDER], default=list(NAMES))
    parser.add_argument("--ladder", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="tiny and uncompiled, to see that it runs; print only")
    parser.add_argument("--dry", action="store_true", help="print only")
    parser.add_argument("--json", type=Path, help="write the figures here, and nothing else")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = LADDER if args.ladder else args.sides
    found = summarise(names, args, rounds := measure(names, args))
    if args.json:
        args.json.write_text(json.dumps(found))
        return
    text = ladder_markdown(found) if args.ladder else markdown(found)
    print(f"\n{text}")
    if args.dry or args.smoke:
        return
    stem = "compile_ladder" if args.ladder else "train_step"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{stem}.json").write_text(json.dumps(found | {"by_round": rounds}, indent=1) + "\n")
    (RESULTS / f"{stem}.md").write_text(f"# benchmarks/train_step.py{' --ladder' * args.ladder}\n\n{text}")
    if args.ladder:
        into_docs(stem, text)
    else:
        draw(found, FIGURE)
        into_docs(stem, f"{text}\n![Tokens per core-second of each side](images/train_step.png)\n")
    print(f"written to {RESULTS.relative_to(ROOT)}/{stem}.json and .md")


if __name__ == "__main__":
    main()
