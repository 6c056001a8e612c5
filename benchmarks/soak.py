"""Whether a long run that is stopped and resumed again and again grows, and ends where an undisturbed one does.

    python benchmarks/soak.py --steps 50000 --resumes 50 [overrides of train.py]

One process trains a tiny model to the end, stopped by a signal and resumed at equal distances. At the end of each part
it notes its resident memory, open descriptors, threads, and how many bytes of event files a step took. To each a line
is fitted over all parts but the first fifth, and the last one, which ends with a summary and a text; the slope is told
with its 95 % interval. Then the same run is made undisturbed, and the final weights are compared bit for bit. Exit
status 1 if they differ, or if descriptors or threads grow.
"""

import argparse
import contextlib
import gc
import math
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from scipy import stats

from thunderhead.core import config
from thunderhead.training.run import train

RESULTS = Path(__file__).with_name("results") / "soak.md"
SETTINGS = (
    *("data=stdlib", "data.sources.stdlib.include_code=false", "data.max_validation_tokens=1024", "tokenizer=byte"),
    *("model.n_layers=1", "model.d_model=32", "model.n_heads=2", "model.context_length=32", "model.vocab_size=null"),
    *("model.d_ff=null", "dropout=gpt2", "batch.global_tokens=128", "batch.micro_size=4", "trainer=cpu"),
    *("precision=fp32", "generation.max_new_tokens=4", "keep_freed_memory=false", "~callbacks.progress"),
)
GROWING = {"resident memory": "bytes", "descriptors": "", "threads": "", "event files, of a step": "bytes"}


class StopEvery(Callback):
    """Sends this process SIGTERM after so many steps."""

    def __init__(self, *, steps: int):
        self.steps = steps

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step % self.steps == 0 and trainer.global_step < trainer.max_steps:
            os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--resumes", type=int, default=50)
    parser.add_argument("--table", type=Path, default=RESULTS)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.modules["soak"] = sys.modules["__main__"]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        lines, is_sound = soak(Path(folder), arguments.steps, arguments.resumes, arguments.overrides)
    arguments.table.parent.mkdir(parents=True, exist_ok=True)
    arguments.table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    sys.exit(0 if is_sound else 1)


def soak(folder: Path, steps: int, resumes: int, overrides: list[str]) -> tuple[list[str], bool]:
    """Train both ways; returns the table, and whether all is as it should be."""
    each, begin = math.ceil(steps / (resumes + 1)), time.perf_counter()
    settings = [*SETTINGS, f"budget.steps={steps}", f"validation.every={each}", *overrides]
    settings.append(f"callbacks.checkpoint.every_n_train_steps={each}")
    whole, parted = folder / "whole", folder / "parted"
    stop = f"+callbacks.stop={{_target_: soak.StopEvery, steps: {each}}}"
    seen: list[dict[str, float]] = []
    starts, events = [[*settings, stop]] + [[f"resume={parted}", "trust=[soak]"]] * resumes, 0
    for number, start in enumerate(starts, start=1):
        with contextlib.suppress(SystemExit):
            train(config.compose(start), parted)
        gc.collect()
        now = sum(file.stat().st_size for file in parted.glob("events.*"))
        seen.append(dict(zip(GROWING, (*taken(), (now - events) / each), strict=True)))
        events = now
        print(f"{number} of {len(starts)}: {seen[-1]}, {time.perf_counter() - begin:.0f} s", flush=True)
    train(config.compose(settings), whole)
    contents = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, parted)]
    equal = [content["global_step"] for content in contents] == [steps, steps] and all(
        torch.equal(weight, contents[1]["state_dict"][name]) for name, weight in contents[0]["state_dict"].items()
    )
    table, grows, seconds = [], [], time.perf_counter() - begin
    for name, unit in GROWING.items():
        values = [each_part[name] for each_part in seen][len(seen) // 5 : -1]
        slope, error = slope_of(values, each)
        table.append(f"| {name} | {values[0]:,.0f} {unit} | {values[-1]:,.0f} {unit} | {slope:,.3g} ± {error:,.2g} |")
        grows += [name] if name in ("descriptors", "threads") and slope - error > 0 else []
    lines = [
        f"# {steps:,} steps with {resumes} resumes in one process",
        "",
        f"`python benchmarks/soak.py --steps {steps} --resumes {resumes}`: {seconds:.0f} s for both",
        "",
        "| at the end of a part | after a fifth | of the last but one | slope per 1,000 steps (95 %) |",
        "|---|---|---|---|",
        *table,
        "",
        f"Final weights are bitwise those of the undisturbed run: **{'yes' if equal else 'NO'}**.",
    ]
    return lines, equal and not grows


def taken() -> tuple[float, float, float]:
    """What this process takes: bytes of memory, open descriptors, threads (torch's, too)."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def slope_of(values: list[float], steps: int) -> tuple[float, float]:
    """The slope of a line through values that lie `steps` apart, per 1,000 steps, and half its 95 % interval."""
    if len(values) < 3 or len(set(values)) == 1:
        return 0.0, 0.0
    fit = stats.linregress([number * steps / 1000 for number in range(len(values))], values)
    return float(fit.slope), float(stats.t.ppf(0.975, len(values) - 2) * fit.stderr)


if __name__ == "__main__":
    main()
