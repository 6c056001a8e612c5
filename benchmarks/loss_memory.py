"""Peak memory and time of the training loss (head + cross-entropy, forward and backward) with and without chunks.

    python benchmarks/loss_memory.py --tokens 4096 --vocab 32768

Each variant runs in fresh processes, since a process's peak (ru_maxrss) never falls. What is reported is the rise of
the peak above what the process holds before the loss: hidden states, weights and their gradients are there beforehand.
The parent's peak would be handed on to a child, so that children are started through a small launcher (`spawn`).
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from thunderhead.model.loss import NextTokenLoss
from thunderhead.training import hardware

RESULTS = Path(__file__).parent / "results"


def measure(chunk_size: str, tokens: int, vocab: int, width: int, dtype: str) -> dict[str, float]:
    """One forward and backward pass; in a process of its own."""
    torch.manual_seed(0)
    weight = torch.randn(vocab, width).mul_(0.02).requires_grad_()
    hidden = torch.randn(1, tokens, width).requires_grad_()
    targets = torch.randint(vocab, (1, tokens))
    weight.grad, hidden.grad = torch.zeros_like(weight), torch.zeros_like(hidden)  # as from the step before
    size: int | None = None if chunk_size == "none" else int(chunk_size)

    def step(n: int) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            terms = NextTokenLoss(chunk_size=size)(hidden[:, :n], weight, targets[:, :n], vocab)
        terms.loss.backward()
        return terms.loss.item()

    step(16)  # libraries get ready
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    loss = step(tokens)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"loss": loss, "seconds": seconds, "mib": (peak - before) / 1024}


def spawn(arguments: list[str]) -> dict[str, float]:
    """Measure in a fresh process, whose peak does not begin at this one's: `exec` by a small process."""
    command = [sys.executable, __file__, *arguments]
    launcher = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"
    done = subprocess.run([sys.executable, "-c", launcher, *command], capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--width", type=int, default=512, help="d_model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunks", nargs="+", default=["none", "auto", "512"], help="none, auto or tokens")
    parser.add_argument("--measure", nargs=2, metavar=("CHUNK", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], args.tokens, args.vocab, args.width, args.measure[1])))
        return

    size = ["--tokens", str(args.tokens), "--vocab", str(args.vocab), "--width", str(args.width)]
    rows = []
    for dtype in ("fp32", "bf16"):
        variants = {}
        for name in args.chunks:
            tokens = NextTokenLoss(chunk_size="auto").tokens_per_chunk(args.tokens, args.vocab)
            variants[name] = str(tokens) if name == "auto" else name
        rounds = [  # interleaved, so that a busy machine is slow for all of them
            {name: spawn([*size, "--measure", chunk, dtype]) for name, chunk in variants.items()}
            for _ in range(args.rounds)
        ]
        for name, chunk in variants.items():
            row = {key: statistics.median(r[name][key] for r in rounds) for key in ("mib", "seconds", "loss")}
            rows.append({"dtype": dtype, "chunk_size": name, "tokens_a_chunk": chunk, **row})
    print(f"N = {args.tokens} tokens, V = {args.vocab}, D = {args.width}; medians of {args.rounds} processes")
    print(f"{'dtype':6} {'chunk_size':>10} {'tokens':>7} {'peak rise':>11} {'seconds':>8} {'loss':>9}")
    for row in rows:
        chunk, mib = row["tokens_a_chunk"], f"{row['mib']:,.0f} MiB"
        print(f"{row['dtype']:6} {row['chunk_size']:>10} {chunk:>7} {mib:>11} {row['seconds']:8.2f} {row['loss']:9.5f}")
    device = hardware.device_name("cpu")
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"loss_memory-{hardware_slug(device)}.json"
    settings = {"tokens": args.tokens, "vocab": args.vocab, "width": args.width, "rounds": args.rounds}
    file.write_text(
        json.dumps({"device": device, "torch": torch.__version__, **settings, "rows": rows}, indent=2) + "\n"
    )
    print(f"written to {file}")


def hardware_slug(device: str) -> str:
    """A device's name as a part of a file name."""
    return "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())


if __name__ == "__main__":
    main()
