"""Words of other projects: what they are told to lead to is there."""

import pytest
from lightning.pytorch import loggers
from omegaconf import OmegaConf

from thunderhead import command_line, familiar
from thunderhead.core import config


def known(*choices: str) -> set[str]:
    return command_line._paths(OmegaConf.to_container(config.compose(choices), resolve=False))


@pytest.mark.parametrize("ours", sorted(set(familiar.FAMILIAR.values())))
def test_what_is_answered_exists(ours: str) -> None:
    *choices, path = ours.split()
    assert path in known(*choices) or path.startswith("hydra.")


def test_no_setting_of_ours_is_taken_for_another() -> None:
    assert not known() & familiar.FAMILIAR.keys()


def test_loggers_that_one_would_choose() -> None:
    for name, target in familiar.LOGGERS.items():
        assert hasattr(loggers, target)
        (typed,) = [part for part in familiar.option("logger", name).split("'") if part.startswith("+")]
        composed = config.compose([typed])
        assert composed.logger[name]["_target_"] == f"lightning.pytorch.loggers.{target}"
    assert familiar.option("logger", "nothing") == familiar.option("optimizer", "wandb") == ""


def test_flags_are_told_to_be_settings() -> None:
    arguments = ["attention=gqa", "--epochs", "3", "--lr=1e-3", "--dry-run", "--foo", "-m", "--cfg", "job"]
    found = [(flag, hint.partition(": ")[2]) for flag, hint in command_line._no_flags(arguments, "train")]
    assert found == [
        ("--epochs", "budget=epochs budget.epochs=…"),
        ("--lr", "optimizer.lr=1e-3"),
        ("--dry-run", "dry_run=true"),
        ("--foo", ""),
    ]
    assert command_line._no_flags(["--multirun", "seed=1,2", "--config-dir", "mine"], "train") == []
