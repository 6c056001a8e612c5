"""Peak memory and time of a training step with each kind of activation checkpointing, and with the loss in chunks.

    python benchmarks/memory.py [--rounds 5] [overrides of train.py, e.g. model=micro trainer=gpu]

Each measurement is a process of its own, whose peak begins at nothing; rounds go through all variants in turn, so that
a busy machine is slow for all of them. Memory is the rise of the process's peak (on CUDA of the GPU's allocated memory)
in a step above what weights, gradients and optimizer state take, which are there already. Time is the CPU time of a
later step, when freed memory is kept as in training (on CUDA the time that passes), as a ratio to that of the first
variant in the same round. Medians over rounds.
"""

import argparse
import math
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from results_folder import RESULTS

from thunderhead.core import components
from thunderhead.core import config as configuration
from thunderhead.core.model_spec import build_decoder, build_optimizer
from thunderhead.parallel.strategies import single
from thunderhead.training import hardware, memory

LLAMA_LIKE = [
    *("model=nano", "model.n_layers=6", "model.d_model=384", "model.n_heads=6", "model.context_length=256"),
    *("model.d_ff=null", "attention=gqa", "attention.n_kv_heads=2", "optimizer=adamw", "precision=bf16-mixed"),
]
VARIANTS: dict[str, list[str]] = {
    "none": [],
    "selective": ["activation_checkpointing=selective"],
    "selective, every 2nd matmul": [
        "activation_checkpointing=selective",
        "activation_checkpointing.keep_every_matmul=2",
    ],
    "every_kth (k = 2)": ["activation_checkpointing=every_kth"],
    "block": ["activation_checkpointing=block"],
    "none, loss in chunks of 256": ["loss.chunk_size=256"],
    "block, loss in chunks of 256": ["activation_checkpointing=block", "loss.chunk_size=256"],
}


def measure(overrides: list[str], micro_size: int, vocab: int, steps: int) -> dict[str, float]:
    """Steps of one variant, in a process of its own."""
    config = configuration.plain(configuration.compose(overrides))
    accelerator = hardware.resolve_accelerator(config["trainer"].get("accelerator", "auto"))
    precision = components.build(config["precision"])
    precision = precision.of_kind(precision.resolve(accelerator)[0])
    decoder = build_decoder(config, vocab, None).to(accelerator)
    decoder.initialize(config["seed"])
    optimizer = build_optimizer(config, decoder.train())
    context, losses, times = decoder.context_length, [], []
    torch.manual_seed(0)
    tokens = torch.randint(vocab, (steps + 3, micro_size, context + 1), device=accelerator)
    is_cuda = accelerator == "cuda"

    def clock() -> float:
        if not is_cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def step(batch_BT1: torch.Tensor) -> None:
        with precision.autocast(accelerator):
            loss = decoder(batch_BT1[:, :-1], batch_BT1[:, 1:]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        for parameter in decoder.parameters():  # kept, so that they are there before the peak
            assert parameter.grad is not None
            parameter.grad.zero_()
        losses.append(loss.item())

    step(tokens[0, :1, :33])  # libraries get ready; optimizer state and gradients are there
    before = torch.cuda.memory_allocated() if is_cuda else resident()
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    step(tokens[1])
    peak = hardware.peak_memory(accelerator) - before  # later steps meet a heap with holes
    hardware.keep_freed_memory()  # as train.py does: page faults would hide what computing again costs
    step(tokens[2])
    for batch in tokens[3:]:
        start = clock()
        step(batch)
        times.append(clock() - start)
    estimated = memory.estimate(
        build_decoder(config, vocab, None),
        lambda built: build_optimizer(config, built),
        micro_batch_size=micro_size,
        precision=precision,
        parallelism=single(1),
    )
    return {
        "seconds": statistics.median(times),
        "peak": peak,
        "estimate": estimated["activations"],
        "loss": losses[-1],
        "parameters": sum(p.numel() for p in decoder.parameters()),
    }


def resident() -> int:
    """Bytes of memory that this process holds now."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return hardware.peak_memory("cpu")


def spawn(overrides: list[str], *arguments: int) -> dict[str, float]:
    """Measure in a process forked from this one, which has imported everything and computed nothing."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        sender.send(measure(overrides, *arguments))

    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        result: dict[str, float] = receiver.recv()
    except EOFError:
        sys.exit(f"no result with {overrides}")
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a process, after two others")
    parser.add_argument("--micro", type=int, default=8, help="sequences of a micro-batch")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("overrides", nargs="*", help="as for train.py")
    args = parser.parse_args()
    base = [*LLAMA_LIKE, "compile=none", *args.overrides]
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(args.rounds):
        rounds.append({})
        for name, overrides in VARIANTS.items():
            rounds[-1][name] = spawn([*base, *overrides], args.micro, args.vocab, args.steps)
            print(f"round {number + 1} {name}: {rounds[-1][name]}", flush=True)
    losses = {result["loss"] for r in rounds for result in r.values()}
    assert math.isclose(min(losses), max(losses), rel_tol=1e-3), losses  # all did the same work
    write(args, base, rounds)


def write(args: argparse.Namespace, base: list[str], rounds: list[dict[str, dict[str, float]]]) -> None:
    def median(name: str, key: str, relative: bool = False) -> float:
        return statistics.median(r[name][key] / (r["none"][key] if relative else 1) for r in rounds)

    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    lines = [
        "# Memory of a training step",
        "",
        f"{hardware.device_name(accelerator)}, torch {torch.__version__}, uncompiled; `benchmarks/memory.py`.",
        f"{median('none', 'parameters'):,.0f} parameters, micro-batch of {args.micro}, vocabulary of {args.vocab:,}.",
        f"Medians of {args.rounds} rounds of processes, {args.steps} timed steps each; times are"
        f" {'wall' if accelerator == 'cuda' else 'CPU'} time, as ratios within a round.",
        "",
        "| activation_checkpointing | peak rise | ratio | the plan's estimate | time | ratios by round |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name in VARIANTS:
        by_round = " ".join(f"{r[name]['seconds'] / r['none']['seconds']:.2f}" for r in rounds)
        peak, estimate = (f"{median(name, key) / 2**20:,.0f} MiB" for key in ("peak", "estimate"))
        ratios = (f"{median(name, key, relative=True):.2f}" for key in ("peak", "seconds"))
        memory_ratio, time_ratio = ratios
        lines.append(f"| {name} | {peak} | {memory_ratio} | {estimate} | {time_ratio} | {by_round} |")
    lines += ["", "Settings: `" + " ".join(base) + "`", ""]
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "memory.md"
    file.write_text("\n".join(lines))
    print("\n".join(lines))
    print(f"written to {file}")


if __name__ == "__main__":
    main()
