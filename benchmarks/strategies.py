"""Every strategy against one process: losses, and the bytes that a rank stores; on CPUs (gloo), with 2 and 4 ranks.

    python benchmarks/strategies.py [--steps 10]

Writes benchmarks/results/strategies.md. Bytes are those of the local shards that a rank holds after training, measured;
nothing here is a time.
"""

import argparse
import platform
import sys
import tempfile
from pathlib import Path

import torch
from results_folder import RESULTS

from thunderhead.training import hardware
from thunderhead.training.record import REPOSITORY, read_rows

sys.path.insert(0, str(REPOSITORY / "tests"))
from ranks import Case, train_in_processes, train_one

MODEL = (
    *("model.n_layers=4", "model.d_model=128", "model.n_heads=4", "attention=mha", "model.d_ff=352"),
    *("model.context_length=128", "tokenizer=byte", "model.vocab_size=260"),
)
SETTINGS = (
    *("trainer=cpu", "precision=fp32", "compile=none", "callbacks=none", "logger=csv", "keep_freed_memory=false"),
    *("data=stdlib", "data.sources.stdlib.include_code=false"),
    *("data.max_validation_tokens=1024", "generation.max_new_tokens=1"),
    *("batch.global_tokens=2048", "batch.micro_size=2", "trainer.log_every_n_steps=1"),
)
ON_ANY = {
    "ddp": ("strategy=ddp",),
    "zero1 (ZeRO-1)": ("strategy=zero1",),
    "fsdp, reshard_after_forward=false (ZeRO-2)": ("strategy=fsdp", "strategy.reshard_after_forward=false"),
    "fsdp (ZeRO-3)": ("strategy=fsdp",),
    "tensor_parallel": ("strategy=tensor_parallel",),
}
PARTS = ("parameters", "gradients", "optimizer_state")
STRATEGIES = {2: ON_ANY, 4: ON_ANY | {"fsdp_tp 2 × 2": ("strategy=fsdp_tp",), "hsdp 2 × 2": ("strategy=hsdp",)}}


def losses(case: Case) -> torch.Tensor:
    """Of each step, in float64."""
    rows = read_rows(case.folder / "metrics.csv")[1]
    return torch.tensor([float(row["train/loss"]) for row in rows if row["train/loss"]], dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        common = (*MODEL, *SETTINGS, f"budget.steps={steps}", f"data.shards_dir={work / 'shards'}")
        one = Case(work / "one", [*common, "strategy=single"])
        whole = train_one(one)
        table = [f"| single | 1 | {losses(one)[-1]:.6f} | 0 | {_bytes(whole, whole)}"]
        for n, strategies in STRATEGIES.items():
            devices = f"trainer.devices={n}"
            cases = [Case(work / f"{n}-{i}", [*common, devices, *s]) for i, s in enumerate(strategies.values())]
            for name, case, said in zip(
                strategies, cases, train_in_processes(n, cases, work / f"ranks{n}"), strict=True
            ):
                apart = ((losses(case) - losses(one)).abs() / losses(one)).max()
                table.append(f"| {name} | {n} | {losses(case)[-1]:.6f} | {apart:.1e} | {_bytes(said, whole)}")
                print(table[-1], flush=True)
    processor = hardware.device_name("cpu").partition(" (")[0]
    text = f"""# Strategies against one process

{processor}, torch {torch.__version__}, Python {platform.python_version()}, gloo, float32: {steps} steps of 2,048
tokens, AdamW, gradients clipped at 1, the prose of the standard library in bytes; 4 layers, d_model 128.
`python benchmarks/strategies.py`

*Apart*: the largest relative difference of any step's training loss from one process'. *Parameters*, *gradients* and
*optimizer state*: KiB that the rank with most of them stores after a step, and the part of one process'.

| strategy | processes | last loss | apart | parameters | gradients | optimizer state |
|---|--:|--:|--:|--:|--:|--:|
""" + "\n".join(table)
    (RESULTS / "strategies.md").write_text(text + "\n")
    print(f"written to {RESULTS / 'strategies.md'}")


def _bytes(said: dict[str, int], whole: dict[str, int]) -> str:
    cells = (f"{said[part] / 1024:,.0f} ({said[part] / whole[part]:.3f})" for part in PARTS)
    return " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
