"""Every option that test_pairwise has in no row trains two steps on a CPU, or is refused with the reason."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from thunderhead.core.config import ConfigError
from thunderhead.training.record import read_rows, read_summary
from tiny import OF_THE_HUB, OPTIONS, PAIRED

# Dynamo hides this warning of its own look at activations, which does not help where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

# Every run has the one option of a group, and the published sizes differ in numbers only, which tiny runs overwrite.
HAD = {group: options for group, options in OPTIONS.items() if len(options) == 1 or group == "model"}
HAD |= {"match": ["none"], "tune": ["none"]}
HAD |= {"callbacks": ["evaluation"]}  # of tests/release/test_task_evaluation.py
HAD |= {"logger": OPTIONS["logger"]}  # of pairwise, and those of services of tests/training/test_services.py
# tests/lab/test_named.py plans their arms, which are options that others train
HAD |= {"experiment": [name for name in OPTIONS["experiment"] if name.startswith("ablation_")]}
NAMES = [f"{group}={name}" for group in OPTIONS for name in OPTIONS[group] if name not in (PAIRED | HAD).get(group, ())]
NO_GPU = "^trainer.accelerator=gpu: PyTorch finds no cuda device here, only cpu: use trainer=auto$"
NO_MPS = "^trainer.accelerator=mps: PyTorch finds no mps device here, only cpu: use trainer=auto$"
NO_FP8 = r"^precision=fp8 needs a GPU with float8 tensor cores .* on cpu: use precision=bf16-mixed$"
NO_NETWORK = (
    r"^data\.sources\.[\w-]+\.dataset=\S+ is read from huggingface\.co, over the network, and HF_HUB_OFFLINE is set:"
    r" unset it, use data=text with files of your own, or name a folder$"
)
# What this machine cannot do, and what the refusal says.
REFUSED = {
    **{
        f"{group}={option}": f"^{group}: acts on the arms of a sweep, and this is a single run"
        for group in ("match", "tune")
        for option in OPTIONS[group]
        if option != "none"
    },
    **({"precision=fp8": NO_FP8} if not torch.cuda.is_available() else {}),
    **({"trainer=gpu": NO_GPU} if not torch.cuda.is_available() and not torch.backends.mps.is_available() else {}),
    **({"trainer=mps": NO_MPS} if not torch.backends.mps.is_available() else {}),
    **{f"data={name}": NO_NETWORK for name in OF_THE_HUB},  # tests/data/test_huggingface.py reads local copies
}
# Settings beside the groups that only some machines or combinations can take.
REFUSED_VALUES = {
    "attention.logit_softcap=30.0": "^attention.logit_softcap: needs flex_attention, which trains on CUDA only",
    "attention.backend=flex": "^attention.backend=flex: needs flex_attention, which trains on CUDA only",
    "attention.n_kv_heads=3": "^attention.n_kv_heads=3 does not divide model.n_heads=4: use 1, 2 or 4$",
    "activation.beta=2.0": r"^activation.beta=2 is Swish's and needs activation.activation=silu, not gelu$",
    "model.d_model=30": "^model.n_heads=4 does not divide model.d_model=30",
    "model.vocab_size=100": "^model.vocab_size=100 is smaller than the tokenizer's 257 tokens",
    "optimizer.lr=-1.0": "^optimizer: Invalid learning rate: -1.0$",
    "parameter_groups.no_decay=[nothing.*]": "^parameter_groups.no_decay",
    "+trainer.max_steps=3": "^trainer.max_steps: follows from other settings: set budget instead$",
    "+trainer.fast_dev_run=true": "^trainer.fast_dev_run: follows from other settings: set debug=fast instead$",
    "validation.every=1.5": "^validation.every: 1.5 is not accepted: .* should be less than 1 or should be 'auto'$",
}


@pytest.mark.parametrize("option", NAMES)
@pytest.mark.usefixtures("fresh_compiler", "memory_is_counted")
def test_option_trains(option: str, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if option in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[option]):
            run(option)
        return
    folder = run(option)
    summary = read_summary(folder)
    assert summary is not None
    assert summary["steps"] == 2
    assert math.isfinite(summary["val_loss"])
    losses = [float(row["train/loss"]) for row in read_rows(folder / "metrics.csv")[1] if row["train/loss"]]
    assert len(losses) == 2


@pytest.mark.parametrize("setting", REFUSED_VALUES)
def test_value_is_refused(setting: str, run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=REFUSED_VALUES[setting]):
        run("activation=gelu", setting)
    assert not (tmp_path / "runs").exists()  # no folder is left of a run that never was


def test_fused_sgd_is_refused_under_loss_scaling(run: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"^optimizer\.fused: takes unset memory"):
        run("optimizer=sgd", "optimizer.fused=true", "precision=fp16-mixed")


def test_a_run_leaves_its_record(run: Callable[..., Path]) -> None:
    folder = run("callbacks=default", "logger=default", "callbacks.checkpoint.every_n_train_steps=1")
    names = {path.name for path in folder.iterdir()}
    files = {"config.yaml", "plan.json", "environment.json", "metrics.csv", "summary.json", "sample.txt", "checkpoints"}
    assert files <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert {"best.ckpt", "last.ckpt"} <= {path.name for path in (folder / "checkpoints").iterdir()}
    summary = read_summary(folder)
    assert summary is not None
    wanted = {
        "val_loss",
        "perplexity",
        "bits_per_byte",
        "tokens",
        "tokens_per_second",
        "parameters",
        "steps",
        "seconds",
    }
    assert wanted <= summary.keys()
    assert summary["tokens"] == 2 * 128
    assert summary["perplexity"] == pytest.approx(math.exp(summary["val_loss"]))
    assert summary["attention_kernel"] == "FLASH_ATTENTION"  # in float32 on a CPU


def test_a_dry_run_writes_nothing(run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("dry_run=true")
    assert not (tmp_path / "runs").exists()
    assert "128" in capsys.readouterr().out  # tokens a step
