"""Run folders with known losses, written through the functions that write real ones."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from thunderhead import disk
from thunderhead.core import config
from thunderhead.training import record
from thunderhead.training.record import MetricsCsv

STEPS, TOKENS_PER_STEP, FLOPS_PER_TOKEN, VOCAB_SIZE = 100, 1000, 50_000, 256
SPEED = 5000.0  # tokens a second


@cache
def composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    small = ("tokenizer=byte", "model.n_layers=2", "model.d_model=32", "model.n_heads=4", "model.context_length=32")
    return config.plain(config.compose([*small, *overrides]))


def write_run(
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    seed: int = 1,
    loss: float = 3.0,
    steps: int | None = STEPS,
    planned_steps: int = STEPS,
    summary: dict[str, Any] | None = None,
    match: dict[str, Any] | None = None,
    plan: dict[str, Any] | None = None,
    commit: str = "0123456789abcdef",
    changed_files: Sequence[str] = (),
) -> Path:
    """A run whose validation loss falls as 2 · (planned steps / step) ^ 0.1 down to `loss` at its last step.

    With `steps` below `planned_steps` it stopped there, without a summary.
    """
    settings = composed(tuple(overrides)) | {"seed": seed}
    folder.mkdir(parents=True)
    disk.write_text(folder / "config.yaml", config.to_yaml(settings))
    disk.write_text(folder / "tokenizer.json", "{}")
    planned = {"steps": planned_steps, "tokens_per_step": TOKENS_PER_STEP, "flops_per_token": FLOPS_PER_TOKEN}
    planned |= {"vocab_size": VOCAB_SIZE, "memory": {"parameters": 10_000}}
    record.write_json(folder / "plan.json", planned | (plan or {}))
    git = {"commit": commit, "changed_files": list(changed_files)}
    environment = {"packages": {"torch": "2.13.0"}, "git": git, "overrides": list(overrides)}
    record.write_json(folder / "environment.json", environment)
    if match is not None:
        record.write_json(folder / "match.json", match)
    logger = MetricsCsv(str(folder))
    noise = np.random.default_rng(seed).normal(0, 0.01, planned_steps + 1)
    for step in range(10, (steps or planned_steps) + 1, 10):
        tokens = step * TOKENS_PER_STEP
        counters = {"tokens": tokens, "flops": float(tokens * FLOPS_PER_TOKEN)}
        value = loss * (planned_steps / step) ** 0.1
        row = {"train/loss": value + noise[step], "tokens_per_second": SPEED, "lr-AdamW": 0.1}
        if step % 20 == 0:
            row |= {"val/loss": value, "val/bits_per_byte": value / 2}
        logger.log_metrics(counters | row, step=step)
    if steps == planned_steps:
        tokens = planned_steps * TOKENS_PER_STEP
        results = {
            "val_loss": loss,
            "perplexity": float(np.exp(loss)),
            "bits_per_byte": loss / 2,
            "tokens": tokens,
            "steps": planned_steps,
            "parameters": 30_000,
            "flops": tokens * FLOPS_PER_TOKEN,
            "tokens_per_second": SPEED,
            "seconds": tokens / SPEED,
            "peak_memory_bytes": 300_000_000,
            "cache_bytes_per_token": 2 * 2 * 32 * 2 * (settings["attention"].get("n_kv_heads") or 1),
            "validation_data": "data",
            "validation_text": "text",
            "precision": "fp32",
            "device": "a CPU",
        }
        record.write_json(folder / "summary.json", results | (summary or {}))
    return folder


def write_arms(folder: Path, losses: dict[str, Sequence[float]]) -> Path:
    """Runs with `overrides` as the keys say ("attention=mha"), and these losses for seeds 1, 2, …"""
    number = 0
    for overrides, by_seed in losses.items():
        for seed, loss in enumerate(by_seed, 1):
            write_run(folder / str(number), overrides.split(), seed=seed, loss=loss)
            number += 1
    return folder
