"""What TensorBoard's charts are called, and what every logger is told of a run."""

import json
from pathlib import Path

import pytest

from thunderhead.core import config
from thunderhead.training.about import about
from thunderhead.training.loggers import chart


@pytest.mark.parametrize(
    ("column", "name"),
    [
        ("train/loss", "loss/train"),
        ("train/z_loss", "loss/train_z_loss"),
        ("val/loss", "loss/val"),
        ("val/loss/code", "loss/val_loss/code"),
        ("val/bits_per_byte", "loss/val_bits_per_byte"),
        ("val/accuracy", "metric/val/accuracy"),
        ("tokens_per_second", "speed/tokens_per_second"),
        ("tokens/code", "usage/tokens/code"),
        ("lr", "training/lr"),
        ("grad_norm", "training/grad_norm"),
        ("lr-AdamW/matrices", "training/lr-AdamW/matrices"),
    ],
)
def test_names_of_charts(column: str, name: str) -> None:
    assert chart(column) == name


def test_sections_come_in_the_order_in_which_one_looks() -> None:
    sections = [chart(name).partition("/")[0] for name in ("val/loss", "val/accuracy", "mfu", "lr", "flops")]
    assert sections == sorted(sections)  # as TensorBoard has them


def test_a_run_of_a_sweep_is_called_by_what_differs(tmp_path: Path) -> None:
    sweep = tmp_path / "ablation" / "2026-01-01_00-00-00"
    folder = sweep / "attention_mqa-seed_1-0a1b2c3d"
    folder.mkdir(parents=True)
    (sweep / "sweep.json").write_text(json.dumps({"arguments": ["-m", "attention=mha,mqa"]}))
    environment = {"command": ["job"], "git": {"commit": "abc", "changed_files": ["M x.py"]}}
    (folder / "environment.json").write_text(json.dumps(environment))
    resolved = config.plain(config.compose(["attention=mqa", "optimizer.lr=0.5"]))
    told = about(folder, resolved)
    assert told["name"] == "attention_mqa-seed_1"
    assert told["group"] == "ablation/2026-01-01_00-00-00"
    assert told["tags"] == ["attention=mqa"]
    assert told["choices"]["optimizer"] == "adamw lr=0.5"
    assert told["commit"] == "abc+"
    assert told["command"] == "python train.py -m attention=mha,mqa"
    assert about(folder, resolved)["id"] == told["id"]  # of later starts, too


def test_a_single_run_is_called_like_its_folder(tmp_path: Path) -> None:
    told = about(tmp_path / "mqa_2026-01-01_00-00-00", {})
    assert (told["name"], told["group"], told["commit"], told["command"]) == (
        "mqa_2026-01-01_00-00-00",
        None,
        "unknown",
        "",
    )
