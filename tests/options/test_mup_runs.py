"""parametrization=mup in runs: from the configuration to the losses."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from thunderhead import command_line
from thunderhead.core import config
from thunderhead.core.config import ConfigError, read_mapping
from thunderhead.core.model.attention import Attention
from thunderhead.core.model_spec import build_decoder
from thunderhead.core.module import LanguageModel
from thunderhead.lab.match import EqualParameters
from thunderhead.options.mup import MaximalUpdate
from thunderhead.training.record import read_rows, read_summary
from tiny import plan_of, tiny, train_here

MODEL = {"d_model": 512, "n_heads": 8, "d_ff": None, "n_layers": 2}
MUP = ("parametrization=mup", "parametrization.base_d_model=16")  # tiny runs are twice as wide


def base(base_d_model: int = 256, base_values: dict[str, Any] | None = None, **model: Any) -> dict[str, Any]:
    settings = {"model": MODEL | model, "attention": {"n_kv_heads": 8}}
    return MaximalUpdate(base_d_model=base_d_model, base_values=base_values).base(settings)


def test_the_base_is_in_proportion() -> None:
    assert base()["model"] == MODEL | {"d_model": 256, "n_heads": 4}
    assert base(d_ff=530)["model"] == MODEL | {"d_model": 256, "n_heads": 4, "d_ff": 265}
    assert base(1024)["model"] == MODEL | {"d_model": 1024, "n_heads": 16}  # the model is the narrower one
    values = {"model.n_heads": 8, "attention.n_kv_heads": 2}
    assert base(200, values) == {
        "model": MODEL | {"d_model": 200, "n_heads": 8},
        "attention": {"n_kv_heads": 2},
    }


def test_a_base_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"base_d_model=200 is no whole number of heads .*: use a multiple of 64, or"):
        base(200)
    with pytest.raises(
        ValueError, match=r"base_values: attention\.n_kv_head is .*; did you mean attention\.n_kv_heads\?$"
    ):
        base(256, {"attention.n_kv_head": 2})
    with pytest.raises(ValueError, match=r"base_values: optimizer\.lr is unknown to the model"):
        base(256, {"optimizer.lr": 2})


def test_refusals_come_with_the_plan(text_corpus: Path, shards_dir: Path) -> None:
    lines = tiny(text_corpus, shards_dir, *MUP, "attention=gqa", "attention.n_kv_heads=4", "optimizer=sgd")
    with pytest.raises(ConfigError) as refused:
        plan_of(config.plain(config.compose(lines)))
    assert [p.message for p in refused.value.problems] == [
        "parametrization: the base model (model.d_model=16) cannot be made: attention.n_kv_heads=4 does not divide "
        "model.n_heads=2: use 1 or 2 (change parametrization.base_d_model, or set its values in "
        "parametrization.base_values)"
    ]
    with pytest.raises(ConfigError, match="SGD does not say how its updates scale"):
        plan_of(config.plain(config.compose([*lines, "attention.n_kv_heads=1"])))


def rows(folder: Path) -> list[tuple[str, str, str]]:
    found = read_rows(folder / "metrics.csv")[1]
    return [(row["train/loss"], row["lr"], row["val/loss"]) for row in found]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_at_the_bases_width_a_run_is_the_standard_one(optimizer: str, run: Callable[..., Path]) -> None:
    settings = (f"optimizer={optimizer}", "budget.steps=4", "position=sinusoidal")
    standard = run(*settings)
    same = run(*settings, "parametrization=mup", "parametrization.base_d_model=32")
    assert rows(same) == rows(standard)  # every digit of losses and learning rates
    wider = run(*settings, *MUP)
    rates, configured = ([float(row[1]) for row in rows(folder) if row[1]] for folder in (wider, standard))
    assert rates == pytest.approx(configured)  # without the multipliers
    assert rows(wider) != rows(standard)
    assert "muP: 2 × the base width 16" in read_mapping(wider / "plan.json")["notes"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_goes_on_bit_for_bit(optimizer: str, text_corpus: Path, shards_dir: Path, tmp_path: Path) -> None:
    settings = (*MUP, f"optimizer={optimizer}", "budget.steps=4", "callbacks=default", "logger=csv")
    lines = tiny(text_corpus, shards_dir, *settings, "callbacks.checkpoint.every_n_train_steps=2")
    folders = [tmp_path / name for name in ("whole", "resumed")]
    for folder in folders:
        folder.mkdir()
    train_here(lines, folders[0])
    with pytest.raises(KeyError, match="pulled the plug"):
        train_here([*lines, "+callbacks.crash={_target_: crash.Crash, after: 3}"], folders[1])
    with patch.object(command_line, "invocation_overrides", lambda: ["callbacks.crash.after=1000"]):
        train_here([f"resume={folders[1]}"], folders[1])
    assert rows(folders[1]) == rows(folders[0])
    model = LanguageModel.load_from_checkpoint(folders[0] / "checkpoints" / "last.ckpt")
    assert model.decoder.output_scale == 1 / 2


def test_the_experiments_widths_keep_the_size_of_heads() -> None:
    composed = config.plain(config.compose(["experiment=mup_transfer", "model.d_model=512"]))
    assert composed["model"]["n_heads"] == 16
    with pytest.raises(ConfigError, match=r"^model\.n_heads: .*100 is no multiple of 32"):
        config.plain(config.compose(["experiment=mup_transfer", "model.d_model=100"]))


@pytest.mark.slow  # test_sharded.py has the optimizers
def test_sharded_weights_and_steps_are_those_of_one_device(run: Callable[..., Path]) -> None:
    settings = (*MUP, "budget.steps=4", "optimizer=adamw")
    sharded, single = (read_summary(run(*settings, f"strategy={name}")) for name in ("fsdp", "single"))
    assert sharded is not None
    assert single is not None
    assert sharded["val_loss"] == pytest.approx(single["val_loss"], abs=1e-5)  # float32 sums in another order


def test_equal_parameters_are_solved_for(text_corpus: Path, shards_dir: Path) -> None:
    lines = tiny(text_corpus, shards_dir, *MUP)
    plans = []
    for attention in ("mha", "mqa"):
        resolved = config.plain(config.compose([*lines, f"attention={attention}"]))
        plans.append((resolved, plan_of(resolved)))
    match = EqualParameters(count="total", multiple_of=1)
    target = match.target(*plans[0], lambda _: math.nan)
    solved, matched = match.apply(*plans[1], target, lambda _: math.nan)
    assert abs(matched.missed) < 0.002
    grown = build_decoder(solved, plans[1][1].vocab_size, None).growth["blocks.0.feedforward.down_proj.weight"]
    d_ff = solved["model"]["d_ff"]
    assert grown.shape == (32, d_ff)
    assert grown.base_shape == (16, round(d_ff / 2))


def test_an_attention_of_the_users_own_needs_no_code(text_corpus: Path, shards_dir: Path) -> None:
    lines = tiny(text_corpus, shards_dir, *MUP)
    resolved = config.plain(config.compose(lines))
    resolved["attention"] = {"_target_": f"{__name__}.OneMatrix"}
    with torch.device("meta"):
        grown = build_decoder(resolved, 257, None).growth["blocks.0.attention.mix.weight"]
    assert (grown.shape, grown.base_shape) == ((64, 32), (32, 16))


class OneMatrix(Attention):
    """Only its parameters matter."""

    def __init__(self, d_model: int, n_heads: int, context_length: int, bias: bool) -> None:
        super().__init__(d_model, n_heads, context_length, bias)
        self.mix = torch.nn.Linear(d_model, 2 * d_model, bias=bias)
