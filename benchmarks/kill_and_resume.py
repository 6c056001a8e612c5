"""Whether a run that is killed again and again ends where an undisturbed one does, bit for bit.

    python benchmarks/kill_and_resume.py --kills 20 [overrides of train.py]

Trains a small model on data=mixture (weights in two stages, and a source that is used up on the way) with dropout,
accumulated micro-batches, loader workers and DDP over two processes on gloo: once undisturbed, and once with `kill -9`
of all its processes at random steps, each time gone on by the same command line, which has resume=auto. Compares every
logged loss and gradient norm, every validation loss and the final weights. Exit status 1 if any differs.

The ranks are started as SLURM or torchrun would start them. They are forked from a server that has imported the
packages, so that 20 kills do not mean 40 times the imports.
"""

import argparse
import multiprocessing
import os
import random
import runpy
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from thunderhead.training import resume
from thunderhead.training.record import read_rows

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results") / "kill_and_resume.md"
SETTINGS = (
    *("data=mixture", "tokenizer=byte", "data.validation_fraction=0.05", "data.max_validation_tokens=2048"),
    *("data.sources.code.weight={0: 0.8, 0.5: 0.6}", "data.sources.prose.weight={0: 0.2, 0.5: 0.4}"),
    *("model.n_layers=2", "model.d_model=64", "model.n_heads=4", "model.context_length=64", "model.vocab_size=null"),
    *("model.d_ff=null", "dropout=gpt2", "attention.dropout=0.1", "batch.micro_size=2", "batch.global_tokens=1024"),
    *("trainer=cpu", "trainer.log_every_n_steps=1", "precision=fp32", "strategy=ddp", "validation.every=7"),
    *("callbacks.checkpoint.every_n_train_steps=5", "generation.max_new_tokens=4", "logger=csv", "resume=auto"),
)
SECONDS = 300  # to get to the next step
FORKS = multiprocessing.get_context("forkserver")
Rank = multiprocessing.context.ForkServerProcess


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the steps at which to kill")
    parser.add_argument("--folder", type=Path, help="for the runs and shards; without it, a temporary one")
    parser.add_argument("--table", type=Path, default=RESULTS)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        arguments.folder = (arguments.folder or Path(temporary)).absolute()
        lines, equal = compare(arguments)
    arguments.table.parent.mkdir(parents=True, exist_ok=True)
    arguments.table.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    sys.exit(0 if equal else 1)


def compare(arguments: argparse.Namespace) -> tuple[list[str], bool]:
    """Train undisturbed and disturbed; returns the table, and whether everything is equal."""
    arguments.folder.mkdir(parents=True, exist_ok=True)
    FORKS.set_forkserver_preload(["thunderhead.training.run", "hydra"])
    steps, draw = arguments.steps, random.Random(arguments.seed)
    settings = [
        *SETTINGS,
        *(f"data.num_workers={arguments.workers}", f"budget.steps={steps}"),
        # the prose that the run would draw is more than this: it is used up after two thirds
        *(f"data.sources.prose.max_epochs={(0.2 * 0.5 + 0.4 * 0.17) * steps * 16 / PROSE_BLOCKS:.6f}",),
        *arguments.overrides,
    ]
    begin = time.perf_counter()
    wait(start(arguments.folder, "whole", settings, arguments.ranks))
    print(f"undisturbed: {steps} steps in {time.perf_counter() - begin:.0f} s with the start", flush=True)
    (whole,) = runs(arguments.folder, "whole")
    wanted = rows(whole)

    table, equal, resumed_from = [], True, 0
    made_up: list[str] = []  # validations that a kill came before
    # not before the first checkpoint: there would be nothing to go on from
    targets = [*sorted(draw.sample(range(6, steps - 2), arguments.kills)), None]
    for number, target in enumerate(targets, start=1):
        ranks = start(arguments.folder, "killed", settings, arguments.ranks)
        if target is None:
            wait(ranks)
        else:
            kill_at(ranks, arguments.folder, target, draw.random())
        (folder,) = runs(arguments.folder, "killed")  # one: no start was anew
        found = {step: row for step, row in rows(folder).items() if step > resumed_from}
        same = all(row == {name: wanted[step][name] for name in row} for step, row in found.items())
        equal &= same
        last = max(found, default=resumed_from)
        end = f"killed in step {last + 1}" if found else "killed before its first step"
        end = end if target is not None else "finished"
        litter = sum(1 for _ in (folder / "checkpoints").glob(".*"))
        checks = ("equal" if found else "none") if same else "**different**"
        table.append(f"| {number} | {resumed_from} | {end} | {len(found)} | {litter} | {checks} |")
        print(table[-1], flush=True)
        if resume.is_finished(folder):  # the last step was faster than the kill
            break
        if target is not None:
            newest = resume.find(str(folder), folder)
            assert newest is not None
            resumed_from = int(torch.load(newest.checkpoint, weights_only=True)["global_step"])
            if "val/loss" in wanted[resumed_from] and "val/loss" not in rows(folder)[resumed_from]:
                made_up.append(f"step {resumed_from}")
    weights = [
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (whole, folder)
    ]
    same_weights = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    found = rows(folder)
    same_rows = found == wanted
    n_validations = sum("val/loss" in row for row in wanted.values())
    lines = [
        f"# {arguments.kills} × kill -9 of one run",
        "",
        f"`python benchmarks/kill_and_resume.py --kills {arguments.kills} --steps {steps} --ranks {arguments.ranks} "
        f"--workers {arguments.workers} --seed {arguments.seed}`",
        "",
        f"{steps} steps of data=mixture, {arguments.ranks} ranks (DDP on gloo) with {arguments.workers} loader workers"
        " each, dropout 0.1, accumulated micro-batches, a checkpoint every 5 steps and a validation every 7. After each"
        " kill of all processes the same command line (resume=auto) went on. Compared with the undisturbed run, bit for"
        " bit: training loss, gradient norm, validation losses, tokens of each source.",
        "",
        "| start | from checkpoint at step | ended | logged steps compared | half-written files left | rows |",
        "|---|---|---|---|---|---|",
        *table,
        "",
        f"All {len(wanted)} steps and {n_validations} validations of the finished run are those of the undisturbed one:"
        f" **{'yes' if same_rows else 'NO'}**. Validations that a kill between a checkpoint and the validation of the"
        f" same step had prevented, made by the next start: {', '.join(made_up) or 'none'}."
        f" Final weights are bitwise equal: **{'yes' if same_weights else 'NO'}**.",
    ]
    return lines, equal and same_rows and same_weights


PROSE_BLOCKS = 7200
"""Blocks of 64 bytes in 95 % of the library's prose, about."""


def start(folder: Path, name: str, settings: list[str], ranks: int) -> list[Rank]:
    """`python train.py` on several ranks in a folder, with their output in a file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    time_of_start = f"{time.time():.3f}"
    overrides = [
        *settings,
        f"name={name}",
        f"hydra.run.dir=logs/runs/{name}/{time_of_start}",
        f"trainer.devices={ranks}",
    ]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0, "NODE_RANK": 0}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "kill"}
    processes = [
        FORKS.Process(
            target=train, args=(folder, f"{name}.log", overrides, {**shared, "RANK": rank, "LOCAL_RANK": rank})
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def train(folder: Path, log_name: str, overrides: list[str], places: dict[str, Any]) -> None:
    """Be one rank of `python train.py <overrides>`."""
    multiprocessing.set_start_method("fork", force=True)  # for loader workers: what it is in a process by itself
    os.chdir(folder)
    log = os.open(log_name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update({key: str(value) for key, value in places.items()})
    sys.argv = [str(REPOSITORY / "train.py"), *overrides]
    runpy.run_path(sys.argv[0], run_name="__main__")


def wait(processes: list[Rank]) -> None:
    """Wait for the end, which must be a good one."""
    for process in processes:
        process.join()
        if process.exitcode != 0:
            stop(processes)
            raise SystemExit(f"train.py ended with status {process.exitcode}: see the .log files of --folder")


def runs(folder: Path, name: str) -> list[Path]:
    """The run folders of a name."""
    return sorted(path for path in (folder / "logs" / "runs" / name).glob("*") if (path / "metrics.csv").exists())


def rows(run: Path) -> dict[int, dict[str, Any]]:
    """What metrics.csv says of each step, without times."""
    found: dict[int, dict[str, Any]] = {}
    for row in read_rows(run / "metrics.csv")[1]:
        kept = {name: value for name, value in row.items() if value and name not in ("tokens_per_second", "mfu")}
        found.setdefault(int(row["step"]), {}).update(kept)
    return found


def kill_at(processes: list[Rank], folder: Path, step: int, fraction: float) -> None:
    """Kill all processes of a run with SIGKILL, some time after a step was logged."""
    deadline, times, size = time.monotonic() + SECONDS, [], 0
    while True:
        if any(process.exitcode is not None for process in processes):
            stop(processes)
            raise SystemExit(f"train.py ended before step {step}: see the .log files of --folder")
        if time.monotonic() > deadline:
            stop(processes)
            raise SystemExit(f"step {step} did not come in {SECONDS} s")
        time.sleep(0.002)
        files = runs(folder, "killed")
        if not files or (files[-1] / "metrics.csv").stat().st_size == size:
            continue
        size = (files[-1] / "metrics.csv").stat().st_size
        times.append(time.monotonic())
        if len(times) > 1 and max(rows(files[-1]), default=0) >= step:
            break
    time.sleep(fraction * (times[-1] - times[-2]))  # somewhere in the step that follows
    stop(processes)


def stop(processes: list[Rank]) -> None:
    """Kill processes and all that they started, and wait until none is left."""
    victims = [pid for process in processes if process.pid for pid in (process.pid, *descendants(process.pid))]
    for victim in victims:
        if is_alive(victim):
            os.kill(victim, signal.SIGKILL)
    for process in processes:
        process.join()
    while any(is_alive(victim) for victim in victims):
        time.sleep(0.01)


def descendants(pid: int) -> list[int]:
    """All processes that a process started, and theirs."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        children.setdefault(int(fields[1]), []).append(int(status.parent.name))
    found = list(children.get(pid, []))
    for child in found:
        found += children.get(child, [])
    return found


def is_alive(pid: int) -> bool:
    """Whether a process still runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    main()
