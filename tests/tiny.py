"""Runs of a second: any choice of options at a size that trains two steps on a CPU."""

from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

from thunderhead import config
from thunderhead.config import CONF_DIR
from thunderhead.training import hardware
from thunderhead.training.run import train

OPTIONS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
    for folder in sorted(CONF_DIR.iterdir())
    if any(folder.glob("*.yaml"))
}
"""Every group of conf/ with its options."""

ABLATIONS = [f"experiment={name}" for name in OPTIONS["experiment"] if name.startswith("ablation_")]
DEFAULTS = {
    "model": (
        "model=nano",
        "model.n_layers=2",
        "model.d_model=32",
        "model.n_heads=4",
        "model.context_length=32",
        "model.vocab_size=null",
        "model.d_ff=null",
    ),
    "batch": ("batch.global_tokens=128", "batch.micro_size=2"),
    "budget": ("budget=steps", "budget.steps=2"),
    "data": ("data=text", "data.max_validation_tokens=256"),
    "tokenizer": ("tokenizer=byte",),
    "trainer": ("trainer=cpu", "trainer.log_every_n_steps=1"),
    "precision": ("precision=fp32",),
    "logger": ("logger=csv",),
    "callbacks": ("callbacks=none",),
    "generation": ("generation.max_new_tokens=4",),
    "keep_freed_memory": ("keep_freed_memory=false",),  # a setting of the process: leave pytest's alone
}
# What an option needs to be tiny, instead of the defaults of its group.
INSTEAD = {
    **{f"model={size}": (f"model={size}", *DEFAULTS["model"][1:]) for size in OPTIONS["model"]},
    "data=text": DEFAULTS["data"],
    "batch=default": ("batch=default", *DEFAULTS["batch"]),
    "trainer=cpu": DEFAULTS["trainer"],
    "generation=default": ("generation=default", *DEFAULTS["generation"]),
    "budget=steps": ("budget=steps", "budget.steps=2"),
    "budget=tokens": ("budget=tokens", "budget.tokens=256"),
    "budget=epochs": ("budget=epochs", "budget.epochs=0.001"),
    "budget=chinchilla": ("budget=chinchilla", "budget.tokens_per_parameter=0.008"),
    "budget=flops": ("budget=flops", "budget.flops=7.0e+7"),
    # the prose of the standard library: half a MB instead of 12
    "data=stdlib": ("data=stdlib", "data.sources.stdlib.include_code=false", *DEFAULTS["data"][1:]),
    "tokenizer=bpe": ("tokenizer=bpe", "tokenizer.vocab_size=300"),
    "trainer=auto": ("trainer=auto", "trainer.log_every_n_steps=1"),
    # inductor takes half a minute to compile on a CPU, and is torch's business
    "compile=block": ("compile=block", "compile.backend=eager"),
    "compile=model": ("compile=model", "compile.backend=eager"),
    # a sweep's; here its first arm alone
    **{name: (name, "match=none", "tune=none") for name in ABLATIONS},
    # publishes n_kv_heads=8
    "experiment=llama-1b": ("experiment=llama-1b", "model.n_heads=8"),
}


def tiny(corpus: Path, shards_dir: Path, *overrides: str) -> list[str]:
    """Overrides of a tiny run; `group=option` among `overrides` takes the place of the group's tiny defaults."""
    chosen = {o.partition("=")[0] for o in overrides}
    lines = [line for group, defaults in DEFAULTS.items() if group not in chosen for line in defaults]
    lines += [line for o in overrides for line in INSTEAD.get(o, (o,))]
    paths = [f"data.shards_dir={shards_dir}"]
    if not any(o.startswith("data.path=") for o in overrides) and "data=stdlib" not in overrides:
        paths.append(f"data.path={corpus}")
    return lines + paths


def train_here(overrides: Sequence[str], run_dir: Path) -> float | None:
    """`python train.py <overrides>` in this process, with its record in `run_dir`."""
    with patch.object(hardware, "measured_matmul_flops", lambda dtype: 1e12):  # 0.3 s a run
        return train(config.compose(overrides), run_dir)
