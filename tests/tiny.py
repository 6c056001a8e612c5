"""Runs of a second: any choice of options at a size that trains two steps on a CPU."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from omegaconf import DictConfig

from thunderhead.core import config
from thunderhead.core.config import CONF_DIR, Config
from thunderhead.core.run import build_data
from thunderhead.corpus.text_data import TextData
from thunderhead.corpus.trained_tokenizers import BpeTokenizer
from thunderhead.training import fit, hardware, memory
from thunderhead.training.plan import Plan
from thunderhead.training.run import plan_config, train

OPTIONS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
    for folder in sorted(CONF_DIR.iterdir())
    if any(folder.glob("*.yaml")) and folder.name != "engine"
}
"""Every group of conf/ with its options, but engine, which is prepare.py's: tests/corpus/test_engines.py."""

OF_THE_HUB = ("c4", "fineweb-edu", "tinystories", "wikitext")
"""Options of `data` that need the network."""

_LEFT_OUT = {
    "experiment",  # sets the other groups; test_options has each
    "generation",  # one option
    "plan",  # one option
    "batch",  # one option
    "loss",  # one option
    "init_from",  # reads a model from a folder: tests/release/test_pretrained.py
    "validation",  # one option
    "match",  # of sweeps
    "tune",  # of sweeps
}
_FEWER = {
    "model": ["nano", "micro"],  # the published ones differ in numbers only, which tiny runs overwrite
    "data": ["stdlib", "text", "induction"],  # the others differ from these in texts or sequences only
    "tokenizer": ["byte", "bpe"],  # the others are read from files, which is all the difference
    "trainer": ["auto", "cpu"],  # gpu and mps are refused here
    "compile": ["none", "block", "model"],
    "curation": [option for option in OPTIONS["curation"] if option != "fineweb"],  # keeps none of these texts
    "logger": ["csv", "default"],  # the others are services: tests/training/test_services.py
    # these with one process; the others train by themselves, and on several processes in test_strategy_runs
    "strategy": ["single", "ddp", "zero1", "fsdp", "tensor_parallel"],
    "activation": ["gelu", "relu2", "swiglu"],  # plain and gated
    "callbacks": ["default", "ema", "none"],  # tasks need files: tests/release/test_task_evaluation.py
    "precision": [option for option in OPTIONS["precision"] if option != "fp8"],  # refused here
}
PAIRED = {group: _FEWER.get(group, options) for group, options in OPTIONS.items() if group not in _LEFT_OUT}
"""Options that tests/integration/test_pairwise.py has in rows, each beside all others."""

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
    "data": ("data=text", "data.max_validation_bytes=256"),
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
    "data=shards": ("data=shards", *DEFAULTS["data"][1:]),
    # a part of them: 0.2 MB and half a MB instead of 16 and 12
    "data=sympy": (
        *("data=sympy", "data.sources.sympy.package=sympy.logic", "data.validation_fraction=0.3"),
        *DEFAULTS["data"][1:],
    ),
    "data=stdlib": ("data=stdlib", "data.sources.stdlib.include_code=false", *DEFAULTS["data"][1:]),
    # made-up prose has none of the English words
    "curation=gopher": ("curation=gopher", "curation.filters.gopher_quality.min_required_words=0"),
    "curation=c4": ("curation=c4", "curation.filters.english.min_common_words=0.0", "curation.filters.c4.forbidden=[]"),
    "curation=fineweb": ("curation=fineweb", "+curation.filters.fineweb.steps.GopherQualityFilter.min_stop_words=0"),
    # short sequences
    "data=induction": ("data=induction", "data.max_validation_tokens=256"),
    "data=associative_recall": ("data=associative_recall", "data.max_validation_tokens=256"),
    "data=modular_addition": ("data=modular_addition", "data.max_validation_tokens=256"),
    "data=mixture": (
        *("data=mixture", "data.sources.code.include_code=false", "data.sources.code.include_topics=true"),
        *DEFAULTS["data"][1:],
    ),
    "tokenizer=bpe": ("tokenizer=bpe", "tokenizer.vocab_size=300"),
    **{f"data={name}": (f"data={name}", *DEFAULTS["data"][1:]) for name in OF_THE_HUB},
    "trainer=auto": ("trainer=auto", "trainer.log_every_n_steps=1"),
    # inductor takes half a minute to compile on a CPU, and is torch's business
    "compile=block": ("compile=block", "compile.backend=eager"),
    "compile=model": ("compile=model", "compile.backend=eager"),
    # a sweep's; here its first arm alone
    **{name: (name, "match=none", "tune=none") for name in ABLATIONS},
    # publish n_kv_heads=8
    "experiment=llama-1b": ("experiment=llama-1b", "model.n_heads=8"),
    "experiment=llama-70b": ("experiment=llama-70b", "model.n_heads=8"),
    # one process
    "strategy=hsdp": ("strategy=hsdp", "strategy.replicate_size=1"),
    "strategy=fsdp_tp": ("strategy=fsdp_tp", "strategy.tensor_parallel_size=1"),
}


def tiny(corpus: Path, shards_dir: Path, *overrides: str) -> list[str]:
    """Overrides of a tiny run; `group=option` among `overrides` takes the place of the group's tiny defaults."""
    chosen = {o.partition("=")[0] for o in overrides}
    lines = [line for group, defaults in DEFAULTS.items() if group not in chosen for line in defaults]
    lines += [line for o in overrides for line in INSTEAD.get(o, (o,))]
    if "dropout=gpt2" in overrides and any("activation_checkpointing=" in o and "=none" not in o for o in overrides):
        lines = [line.replace("backend=eager", "backend=aot_eager") for line in lines]  # eager is refused
    if "data=shards" in overrides:
        tokenizer = [line for line in lines if line.startswith("tokenizer")]
        lines = lines if "tokenizer" in chosen else [line for line in lines if line not in tokenizer]
        known = any(o.startswith("data.path=") for o in overrides)
        return lines if known else [*lines, f"data.path={prepared(corpus, shards_dir, tokenizer)}"]
    if any(f"data={task}" in overrides for task in ("induction", "associative_recall", "modular_addition")):
        return lines  # made by rule: no path, no shards
    paths = [f"data.shards_dir={shards_dir}"]
    without_path = {"data=sympy", "data=stdlib", "data=mixture", *(f"data={name}" for name in OF_THE_HUB)}
    if not any(o.startswith("data.path=") for o in overrides) and without_path.isdisjoint(overrides):
        paths.append(f"data.path={corpus}")
    from_file = {"tokenizer=huggingface", "tokenizer=tiktoken"}.intersection(overrides)
    if from_file and not any(o.startswith("tokenizer.path=") for o in overrides):
        paths.append(f"tokenizer.path={tokenizer_file(from_file.pop(), shards_dir.parent)}")
    return lines + paths


def prepared(corpus: Path, shards_dir: Path, tokenizer: Sequence[str]) -> Path:
    """The folder of the corpus's shards, made if need be."""
    overrides = ["data=text", f"data.path={corpus}", f"data.shards_dir={shards_dir}", *tokenizer]
    data = build_data(config.plain(config.compose(overrides)), context_length=1, sequences_per_step=1)
    assert isinstance(data, TextData)
    data.prepare_data()
    return data.manifest.folder


def tokenizer_file(option: str, folder: Path) -> Path:
    """A file of the kind that an option of `tokenizer` reads, of all bytes and no more."""
    if option == "tokenizer=tiktoken":
        file = folder / "p50k_base.tiktoken"
        file.write_text("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))
    else:
        file = folder / "tokenizer.json"
        file.write_text(BpeTokenizer(vocab_size=257).train([]).to_json())
    return file


def one_mebibyte(*arguments: Any, **settings: Any) -> dict[str, int]:
    """For the plan's estimate of memory, which takes longer than a tiny run."""
    return {"activations": 2**20}


estimate = one_mebibyte  # the fixture `memory_is_counted` has the real one instead


def train_here(overrides: Sequence[str], run_dir: Path) -> float | None:
    """`python train.py <overrides>` in this process, with its record in `run_dir`."""
    return train_composed(config.compose(overrides), run_dir)


def train_composed(composed: DictConfig, run_dir: Path) -> float | None:
    """The same with what Hydra has composed."""
    with (  # which measure something, for half a second each
        patch.object(hardware, "measured_matmul_flops", lambda dtype: 1e12),
        patch.object(fit, "decode_tokens_per_second", lambda decoder, device: 100.0),
        patch.object(memory, "estimate", estimate),
    ):
        return train(composed, run_dir)


def plan_of(resolved: Config) -> Plan:
    """The plan of a run with a resolved configuration."""
    return plan_config(resolved, Path("nowhere"))[1]
