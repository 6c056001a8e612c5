"""What a training step of `train.py` costs above a bare PyTorch loop of the same decoder.

    python benchmarks/overhead.py --steps 40 --rounds 5 [overrides of train.py, e.g. model=micro trainer=gpu]

Both train the same decoder from the same weights on the same batches, with the same optimizer, schedule, clipping,
autocast and allocator. `train.py`'s side is LanguageModel under the Trainer of `make_trainer`, with the default
callbacks, metrics and loggers, and reads its batches from the shards; the bare loop has them in memory. Rounds of both
alternate in one process, each from scratch; the first steps of a round are left out, and so is validation. A step lasts
from the start of its first micro-batch to that of the next step's.
"""

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from results_folder import RESULTS, hardware_slug

from thunderhead.core import config as configuration
from thunderhead.core.config import Config
from thunderhead.core.run import Run
from thunderhead.training import hardware
from thunderhead.training.fit import assemble
from thunderhead.training.plan import Plan
from thunderhead.training.run import plan_config

WARMUP = 3  # steps at the start of a round that are not timed


class Stamps(Callback):
    """Times at which steps begin; a GPU is waited for at the first and the last one only."""

    def __init__(self, accumulation: int, last: int):
        self.accumulation, self.last, self.times, self._batches = accumulation, last, [], 0

    def mark(self) -> None:
        """Note that a step begins."""
        if torch.cuda.is_available() and len(self.times) in (WARMUP, self.last):
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def on_train_batch_start(self, *_: Any) -> None:
        """Note the first micro-batch of each step."""
        if self._batches % self.accumulation == 0:
            self.mark()
        self._batches += 1

    def seconds(self) -> list[float]:
        """Of each step after the warm-up."""
        kept = self.times[WARMUP:]
        return [end - start for start, end in itertools.pairwise(kept)]


class Recorder(Callback):
    """Keeps the batches and losses of a run."""

    def __init__(self) -> None:
        self.batches: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: torch.Tensor, batch_idx: int) -> None:
        """Keep the batch."""
        self.batches.append(batch.clone())


def planned(config: Config, folder: Path) -> tuple[Run, Plan]:
    """The run, its data prepared, and its plan."""
    run, plan = plan_config(config, folder)
    run.data.prepare_data()
    return run, plan


def through_train_path(config: Config, extra: list[Callback]) -> tuple[list[float], float | None]:
    """One round of `train.py`'s own path: the seconds of its steps, and the last loss that it logged."""
    with tempfile.TemporaryDirectory() as folder:
        run, plan = planned(config, Path(folder))
        model, trainer, log_metrics, *_ = assemble(run, plan)
        stamps = Stamps(plan.accumulation, plan.steps - 1)
        trainer.callbacks += [stamps, *extra]
        trainer.fit(model, datamodule=run.data)
    return stamps.seconds(), log_metrics.last_terms.get("loss")


def bare_loop(run: Run, plan: Plan, batches: list[torch.Tensor]) -> tuple[list[float], float]:
    """One round of a plain PyTorch loop: the seconds of its steps, and the loss of the last one."""
    device, precision = torch.device(run.accelerator), run.precision.of_kind(plan.precision)
    decoder = run.model.decoder(run.data.vocab_size, run.data.eos_id).to(device)
    run.compile.of_scope(plan.compile).apply(decoder)
    decoder.initialize(run.seed)
    optimizer = run.model.optimizer(decoder)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: run.model.schedule(step, plan.steps))
    clip = run.config["trainer"]["gradient_clip_val"] or math.inf
    stamps = Stamps(1, plan.steps - 1)
    decoder.train()
    for step in range(plan.steps):
        stamps.mark()
        total = torch.zeros((), device=device)
        for batch_BT1 in batches[step * plan.accumulation : (step + 1) * plan.accumulation]:
            with precision.autocast(run.accelerator):
                terms = decoder(batch_BT1[:, :-1], batch_BT1[:, 1:])
            (terms.loss / plan.accumulation).backward()
            total += terms.cross_entropy.detach() / plan.accumulation
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return stamps.seconds(), total.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("overrides", nargs="*", help="as for train.py: model=micro attention=mha …")
    args = parser.parse_args()
    if args.steps < WARMUP + 2:
        parser.error(f"--steps: at least {WARMUP + 2}")

    fixed = ["budget=steps", f"budget.steps={args.steps}", f"validation.every={args.steps}"]
    fixed += [] if any(o.startswith("compile") for o in args.overrides) else ["compile=none"]
    overrides = [*fixed, "data.max_validation_tokens=2048", *args.overrides]
    config = configuration.plain(configuration.compose(overrides))
    run, plan = planned(config, Path("nowhere"))
    if config["keep_freed_memory"]:
        hardware.keep_freed_memory()

    recorder = Recorder()
    through_train_path(config, [recorder])  # the batches; and both sides start warm
    assert len(recorder.batches) == plan.steps * plan.accumulation
    rounds = []
    for number in range(args.rounds):
        sides: dict[str, list[float]] = {}
        losses: dict[str, float | None] = {}
        for side in ("thunderhead", "bare") if number % 2 == 0 else ("bare", "thunderhead"):
            if side == "bare":
                sides[side], losses[side] = bare_loop(run, plan, recorder.batches)
            else:
                sides[side], losses[side] = through_train_path(config, [])
        # The same loss shows that both did the same work; float32 sums of metrics may differ in the last digits.
        assert losses["thunderhead"] is not None
        assert math.isclose(losses["thunderhead"], losses["bare"] or 0.0, rel_tol=1e-3), losses
        rounds.append(sides | {"losses": losses})
    report(args, run, plan, rounds)


def report(args: argparse.Namespace, run: Run, plan: Plan, rounds: list[dict[str, Any]]) -> None:
    device = hardware.device_name(run.accelerator)
    tokens = plan.tokens_per_step
    median = {side: statistics.median(s for r in rounds for s in r[side]) for side in ("bare", "thunderhead")}
    mean = {side: statistics.median(statistics.mean(r[side]) for r in rounds) for side in ("bare", "thunderhead")}
    ratios = [statistics.mean(r["thunderhead"]) / statistics.mean(r["bare"]) for r in rounds]
    print(
        f"{device}, {plan.precision}, {args.rounds} rounds of {args.steps} steps of {tokens:,} tokens",
        *args.overrides,
    )
    print(f"{'':14}{'median step':>13}{'mean step*':>13}{'tokens/s*':>12}")
    for side in ("bare", "thunderhead"):
        print(f"{side:14}{median[side] * 1e3:10.1f} ms{mean[side] * 1e3:10.1f} ms{tokens / mean[side]:12,.0f}")
    over_median, over_mean = (median["thunderhead"] / median["bare"] - 1), (mean["thunderhead"] / mean["bare"] - 1)
    print(f"{'overhead':14}{over_median:12.1%} {over_mean:12.1%}")
    print(
        "* of a round, logged steps included; median over rounds. By round: "
        + " ".join(f"{r - 1:+.1%}" for r in ratios)
    )
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"overhead-{hardware_slug(device)}.json"
    settings = {
        "device": device,
        "torch": torch.__version__,
        "precision": plan.precision,
        "steps": args.steps,
    }
    outcome = {"overhead_of_median_step": over_median, "overhead_of_mean_step": over_mean, "ratio_by_round": ratios}
    content = settings | {"overrides": args.overrides, "tokens_per_step": tokens} | outcome | {"rounds": rounds}
    file.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
