"""Training speed, MFU and memory on a GPU: GPT-2 124M, and Llama-like models of 350M and 1.3B parameters.

    python benchmarks/gpu.py                          # one GPU, about half an hour
    python benchmarks/gpu.py --models gpt2-124m       # some of the models
    python benchmarks/gpu.py --smoke                  # everything once, tiny, on the CPU: the figures mean nothing

For each model, in a process of its own: a bare loop of our decoder uncompiled, compiled by block and as a whole, with
several micro-batches and with activation checkpointing; the fastest of these again with scaled_dot_product_attention
held to cuDNN and to flash; `train.py` with the same settings; Hugging Face's model of the same shape, compiled.

MFU: FLOPs of the model (PaLM's convention, without recomputation) a second over the dense bfloat16 peak of the card in
hand, 989 TFLOP/s for an H100, and over the best square matmul measured on it. Memory is the most that tensors took.
Written: results/gpu.json and .md. A case that runs out of memory says so and the rest goes on.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results_folder import RESULTS

from thunderhead.core import config as configuration
from thunderhead.core.components import build
from thunderhead.core.model_spec import build_decoder, build_optimizer
from thunderhead.training import hardware
from thunderhead.training.record import read_rows

ROOT = Path(__file__).resolve().parents[1]
VOCAB, CLIP = 50_304, 1.0
LLAMA = ["experiment=llama", "model=nano", "model.tie_embeddings=false", "model.init_std=0.02"]
MODELS: dict[str, list[str]] = {
    "gpt2-124m": ["experiment=gpt2", "model=gpt2-124m", "dropout=none", "attention.dropout=0.0"],
    "llama-350m": [*LLAMA, "model.n_layers=22", "model.d_model=1024", "model.n_heads=16", "model.d_ff=2752"],
    "llama-1.3b": [*LLAMA, "model.n_layers=24", "model.d_model=2048", "model.n_heads=16", "model.d_ff=5504"],
}
CONTEXT = {"gpt2-124m": 1024, "llama-350m": 2048, "llama-1.3b": 2048}
MICRO_BATCHES = {"gpt2-124m": (16, 32, 64), "llama-350m": (8, 16, 32), "llama-1.3b": (2, 4, 8)}
TINY = ["model.n_layers=2", "model.d_model=32", "model.n_heads=4", "model.d_ff=64"]


def settings(case: dict[str, Any]) -> list[str]:
    """A case as overrides of train.py."""
    smoke, context = case["smoke"], 32 if case["smoke"] else CONTEXT[case["model"]]
    return [
        *MODELS[case["model"]],
        *(TINY if smoke else []),
        f"model.context_length={context}",
        f"model.vocab_size={VOCAB // 64 if smoke else VOCAB}",
        "model.vocab_multiple=1",
        f"compile={case['compile']}",
        *(["compile.backend=eager"] if smoke and case["compile"] != "none" else []),
        f"activation_checkpointing={case['checkpointing']}",
        f"batch.micro_size={case['micro_batch']}",
        f"batch.global_tokens={case['micro_batch'] * context}",
        "precision=bf16-mixed",
        f"trainer={'cpu' if smoke else 'gpu'}",
        "budget=steps",
        f"budget.steps={case['steps']}",
        f"validation.every={case['steps']}",
        "data.max_validation_tokens=8192",
        "trainer.log_every_n_steps=10",
        "optimizer.lr=3e-4",
        "name=gpu",
        *(["data=modular_addition", "logger=csv"] if smoke else []),
    ]


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second and peak memory of one case, in a process of its own."""
    side = {"bare": bare, "huggingface": huggingface, "train.py": train_py}[case["side"]]
    found = side(case, configuration.plain(configuration.compose(settings(case))))
    peak = None if case["smoke"] else hardware.peak_flops("cuda", "bf16-mixed")
    achieved = found["tokens_per_second"] * found["flops_per_token"]
    return found | {
        "mfu": achieved / (peak or 989e12),
        "share_of_matmul": achieved / matmul_flops(torch.device("cpu" if case["smoke"] else "cuda")),
    }


def matmul_flops(device: torch.device) -> float:
    """FLOP/s of the best square bfloat16 matmul."""
    size = 256 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    best = min(timed(lambda: a @ b, 10, device) for _ in range(5))
    return 2 * size**3 / best


def timed(act: Callable[[], Any], count: int, device: torch.device) -> float:
    """Seconds of one of `count` calls."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    for _ in range(count):
        act()
    wait()
    return (time.perf_counter() - start) / count


def loop(case: dict[str, Any], parameters: Any, optimizer: Any, loss_of: Any, device: torch.device) -> dict[str, Any]:
    """A plain loop on random tokens: speed after a warm-up, and memory."""
    context, parameters = 32 if case["smoke"] else CONTEXT[case["model"]], list(parameters)
    vocab = VOCAB // 64 if case["smoke"] else VOCAB
    batches = torch.randint(vocab, (8, case["micro_batch"], context + 1), device=device)
    count = 0

    def step() -> None:
        nonlocal count
        batch = batches[count % len(batches)]
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(batch[:, :-1], batch[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        count += 1

    timed(step, max(1, case["steps"] // 5), device)  # compiling, and the allocator's first blocks
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(timed(step, max(1, case["steps"] // 5), device) for _ in range(4))
    return {
        "tokens_per_second": case["micro_batch"] * context / seconds,
        "peak_bytes": hardware.peak_memory(device.type),
        "parameters": sum(p.numel() for p in parameters),
    }


def bare(case: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Our decoder in a plain loop; `kernel` holds attention to one implementation."""
    device = torch.device("cpu" if case["smoke"] else "cuda")
    if case.get("kernel") and device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(case["kernel"] == "cudnn")
        torch.backends.cuda.enable_flash_sdp(case["kernel"] == "flash")
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_math_sdp(False)
    decoder = build_decoder(config, config["model"]["vocab_size"], None).to(device)
    build(config["compile"]).apply(decoder)
    decoder.initialize(1)
    optimizer = build_optimizer(config, decoder)
    found = loop(case, decoder.parameters(), optimizer, lambda x, y: decoder(x, y).loss, device)
    kernel = decoder.attention_kernel(device, torch.bfloat16)
    return found | {"flops_per_token": 3 * decoder.forward_flops_per_token(), "attention_kernel": kernel}


def huggingface(case: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face's model of the same shape in the same plain loop, the loss inside of the compiled region."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    device, shape = torch.device("cpu" if case["smoke"] else "cuda"), config["model"]
    decoder = build_decoder(config, shape["vocab_size"], None)
    flops = 3 * decoder.forward_flops_per_token()
    if case["model"].startswith("gpt2"):
        gpt2 = GPT2Config(
            vocab_size=shape["vocab_size"],
            n_positions=shape["context_length"],
            n_embd=shape["d_model"],
            n_layer=shape["n_layers"],
            n_head=shape["n_heads"],
            n_inner=shape["d_ff"],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )
        model = GPT2LMHeadModel(gpt2).to(device)
    else:
        llama = LlamaConfig(
            vocab_size=shape["vocab_size"],
            hidden_size=shape["d_model"],
            intermediate_size=shape["d_ff"],
            num_hidden_layers=shape["n_layers"],
            num_attention_heads=shape["n_heads"],
            max_position_embeddings=shape["context_length"],
            tie_word_embeddings=False,
            use_cache=False,
        )
        model = LlamaForCausalLM(llama).to(device)

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=inputs).logits.flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits.float(), targets.flatten())

    compiled = torch.compile(loss_of, dynamic=False) if case["compile"] != "none" and not case["smoke"] else loss_of
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)
    found = loop(case, model.parameters(), optimizer, compiled, device)
    return found | {"flops_per_token": flops, "attention_kernel": model.config._attn_implementation}


def train_py(case: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """A run of train.py; the speed of its last logged steps."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", *settings(case), f"hydra.run.dir={folder}/run"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{done.stdout[-1500:]}{done.stderr[-1500:]}")
        rows = read_rows(Path(folder) / "run" / "metrics.csv")[1]
        speeds = [float(row["tokens_per_second"]) for row in rows if row["tokens_per_second"]]
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
        plan = json.loads((Path(folder) / "run" / "plan.json").read_text())
    said = next((line for line in done.stdout.splitlines() if "Attention kernel" in line), "")
    return {
        "tokens_per_second": statistics.median(speeds[len(speeds) // 2 :]),
        "peak_bytes": summary["peak_memory_bytes"],
        "parameters": summary["parameters"],
        "flops_per_token": plan["flops_per_token"],
        "attention_kernel": said.rpartition(" ")[2],
    }


def cases(model: str, smoke: bool) -> list[dict[str, Any]]:
    """What is measured of a model, before the fastest is known."""
    small, middle, large = (1, 2, 4) if smoke else MICRO_BATCHES[model]
    grid = [("none", middle, "none"), ("block", middle, "none")]
    grid += [("model", micro, "none") for micro in (small, middle, large)]
    grid += [("model", large, "block")]
    names = ("compile", "micro_batch", "checkpointing")
    common = {"model": model, "smoke": smoke, "steps": 5 if smoke else 50}
    return [common | {"side": "bare"} | dict(zip(names, row, strict=True)) for row in grid]


def attempt(case: dict[str, Any]) -> dict[str, Any]:
    """A case in a process of its own (--smoke: in this one): its figures, or what went wrong."""
    if case["smoke"] and case["side"] != "train.py":
        torch.compiler.reset()  # one process for all: Dynamo gives up on code that it saw in too many variants
        found: dict[str, Any] = measure(case)
    else:
        command = [sys.executable, __file__, "--case", json.dumps(case)]
        allocator = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | allocator, check=False)
        if done.returncode == 0:
            found = json.loads(done.stdout.splitlines()[-1])
        else:
            lines = (done.stderr.strip() or "no message").splitlines()
            found = {"error": "out of memory" if "OutOfMemoryError" in done.stderr else lines[-1][:200]}
    label = " ".join(
        str(case.get(key, "")) for key in ("model", "side", "compile", "micro_batch", "checkpointing", "kernel")
    )
    print(f"{label}: {found.get('error') or format(found['tokens_per_second'], ',.0f') + ' tokens/s'}", flush=True)
    return case | found


def markdown(rows: list[dict[str, Any]], device: str) -> str:
    """The table of all cases."""
    lines = [
        f"{device}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; bf16-mixed, fused AdamW, clipping.",
        "",
        "| model | side | compile | micro-batch | activation checkpointing | attention | tokens/s | MFU | of a matmul "
        "| memory |",
        "|---|---|---|--:|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        start = f"| {row['model']} | {row['side']} | {row['compile']} | {row['micro_batch']} | {row['checkpointing']} "
        if "error" in row:
            lines.append(start + f"| {row.get('kernel', '')} | {row['error']} | | | |")
            continue
        kernel = f"{row['attention_kernel']}{', held to ' + row['kernel'] if row.get('kernel') else ''}"
        lines.append(
            start + f"| {kernel} | {row['tokens_per_second']:,.0f} | {row['mfu']:.1%} | {row['share_of_matmul']:.1%} "
            f"| {row['peak_bytes'] / 2**30:.1f} GiB |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU; nothing is written")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(json.loads(args.case))))
        return
    if not args.smoke and not torch.cuda.is_available():
        parser.error("no CUDA device is here: --smoke runs everything once, tiny, on the CPU")

    rows = []
    for model in args.models:
        rows += (own := [attempt(case) for case in cases(model, args.smoke)])
        worked = [row for row in own if "error" not in row]
        if not worked:
            continue
        keys = ("model", "smoke", "steps", "side", "compile", "micro_batch", "checkpointing")
        best = {key: max(worked, key=lambda row: row["tokens_per_second"])[key] for key in keys}
        rows += [attempt(best | {"kernel": kernel}) for kernel in ("cudnn", "flash")]
        rows += [attempt(best | {"side": side}) for side in ("train.py", "huggingface")]
    device = hardware.device_name("cpu" if args.smoke else "cuda")
    text = markdown(rows, device)
    print(f"\n{text}")
    if args.smoke:
        if errors := [row["error"] for row in rows if "error" in row]:
            raise SystemExit("\n".join(errors))
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gpu.json").write_text(json.dumps({"device": device, "rows": rows}, indent=1) + "\n")
    (RESULTS / "gpu.md").write_text(f"# benchmarks/gpu.py\n\n{text}")


if __name__ == "__main__":
    main()
