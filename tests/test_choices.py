"""Options by the values of a configuration, and names made of what was typed."""

import pytest

from thunderhead import choices
from thunderhead.core import config


def test_the_options_of_a_composed_run() -> None:
    found = choices.choices(config.plain(config.compose(["experiment=gpt2", "attention=mqa", "optimizer.lr=0.5"])))
    assert found["attention"] == ("mqa", {"dropout": 0.1})
    assert found["optimizer"] == ("adamw", {"lr": 0.5})
    assert found["position"] == ("learned", {})
    assert not {"match", "tune", "callbacks", "logger"} & found.keys()


def test_each_option_is_found_again() -> None:
    for option in config.options("attention"):
        resolved = config.plain(config.compose([f"attention={option}"]))
        assert choices.choices(resolved)["attention"] == (option, {})


def test_a_component_of_ones_own_has_its_own_name() -> None:
    node = {"_target_": "mine.gated.Gated", "bias": True}
    assert choices.choices({"attention": node}) == {"attention": ("Gated", {})}


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        ([], ""),
        (["attention=mqa", "optimizer=lion"], "mqa-lion_"),
        (["optimizer.lr=1e-3", "seed=2", "name=x", "+trainer.x=1", "logger=csv", "dry_run=true"], "lr_1e-3-seed_2_"),
        (["dropout=none", "strategy=auto"], "dropout_none-strategy_auto_"),
        (["data=text", "data.path=secret", "tokenizer.path=/x", "loss={_target_: x}", "~metrics"], "text_"),
        ([f"model.d_model={10**70}"], "d_model_1" + "0" * 51 + "_"),
    ],
)
def test_labels(overrides: list[str], label: str) -> None:
    assert choices.label(overrides) == label
