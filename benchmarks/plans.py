"""The table of docs/scaling.md: what a GPU holds and how fast many are, by `dry_run=true`'s own plan; takes no GPU.

python benchmarks/plans.py
"""

from pathlib import Path
from typing import Any

from thunderhead.core import config
from thunderhead.training import memory
from thunderhead.training.run import plan_config

GIB = 2**30
PARTS = ("parameters", "gradients", "optimizer_state", "gathered", "activations")
MODELS = {
    "1B": ("experiment=llama-1b",),
    "7B": ("experiment=llama", "model=llama-7b"),
    "70B": ("experiment=llama-70b",),
}
EACH_STEP = "strategy.sync_every_micro_batch=true"
RUNS = [  # model, GPUs, strategy
    ("1B", 8, ("strategy=ddp",)),
    ("1B", 8, ("strategy=fsdp",)),
    ("1B", 64, ("strategy=fsdp",)),
    ("1B", 1024, ("strategy=hsdp", "strategy.replicate_size=128")),
    ("7B", 8, ("strategy=ddp",)),
    ("7B", 8, ("strategy=fsdp",)),
    ("7B", 8, ("strategy=fsdp", EACH_STEP)),
    ("7B", 8, ("strategy=fsdp", EACH_STEP, "strategy.reshard_after_forward=false")),
    ("7B", 64, ("strategy=fsdp", EACH_STEP)),
    ("7B", 1024, ("strategy=hsdp", "strategy.replicate_size=128", EACH_STEP)),
    ("70B", 8, ("strategy=fsdp", EACH_STEP)),
    ("70B", 64, ("strategy=fsdp", EACH_STEP)),
    ("70B", 64, ("strategy=fsdp_tp", "strategy.tensor_parallel_size=8", EACH_STEP)),
    ("70B", 1024, ("strategy=fsdp", EACH_STEP)),
    ("70B", 1024, ("strategy=hsdp", "strategy.replicate_size=16", EACH_STEP)),
    ("70B", 1024, ("strategy=fsdp_tp", "strategy.tensor_parallel_size=8", EACH_STEP)),
]


count, counted = memory._activations_at_peak, {}


def count_once(decoder: Any, *settings: Any) -> int | None:
    """Activations are alike under all strategies; counting them takes most of the time."""
    key = (decoder.n_layers, decoder.embedding.weight.shape, *settings)
    if key not in counted:
        counted[key] = count(decoder, *settings)
    return counted[key]


def main() -> None:
    memory._activations_at_peak = count_once
    print(f"| model | GPUs | strategy | {' | '.join(part.replace('_', ' ') for part in PARTS)} | sum | tokens/day |")
    print("|---|--:|---|" + "--:|" * 7)
    for model, gpus, strategy in RUNS:
        overrides = [
            *("dry_run=true", "trainer.accelerator=gpu", "trainer.devices=8", f"trainer.num_nodes={gpus // 8}"),
            *("batch.global_tokens=8388608", "batch.micro_size=1", "activation_checkpointing=block"),
            *("budget=tokens", "budget.tokens=1.0e+12", *MODELS[model], *strategy),
        ]
        _, plan = plan_config(config.plain(config.compose(overrides)), Path("nowhere"))
        settings = [value.removeprefix("strategy.").removeprefix("strategy=") for value in strategy]
        sizes = [f"{plan.memory[part] / GIB:,.1f}" if part in plan.memory else "" for part in PARTS]
        total = sum(plan.memory.values()) / GIB
        fits = "" if total <= 0.9 * 80 else " ✗"
        assert plan.tokens_per_day is not None
        low, high = (n / 1e9 for n in plan.tokens_per_day)
        row = [model, f"{gpus:,}", " ".join(settings), *sizes, f"{total:,.1f}{fits}", f"{low:,.1f}–{high:,.1f} G"]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
