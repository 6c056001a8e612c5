"""Words of other projects: what they are told to lead to is there."""

import pytest
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from thunderhead import familiar, suggestions
from thunderhead.core import config


def known(*choices: str) -> set[str]:
    return suggestions.paths(OmegaConf.to_container(config.compose(choices), resolve=False))


@pytest.mark.parametrize("ours", sorted(set(familiar.FAMILIAR.values())))
def test_what_is_answered_exists(ours: str) -> None:
    *choices, path = familiar.typed(ours, "").removesuffix("=").split()
    if "=" in path:
        assert known(*choices, path)
        return
    assert path in known(*choices) or path.startswith("hydra.")


def test_no_setting_of_ours_is_taken_for_another() -> None:
    assert not known() & familiar.FAMILIAR.keys()


def test_strategies_by_the_names_of_others() -> None:
    for name, ours in familiar.STRATEGIES.items():
        assert name not in config.options("strategy")
        assert familiar.option("strategy", name.upper()) == f"type strategy={ours}"
    for ours in set(familiar.STRATEGIES.values()):
        assert known(*f"strategy={ours}".split())


def test_launchers_by_the_names_of_others() -> None:
    for name, ours in familiar.LAUNCHERS.items():
        assert ours in config.options("hydra/launcher")
        assert familiar.option("hydra/launcher", name).startswith(f"type hydra/launcher={ours} ")
    assert not familiar.option("hydra/launcher", "slrum")  # a misspelt one is ours


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("ckpt_path=a.ckpt", "resume=…"),
        ("trainer.max_epochs=3", "budget=epochs budget.epochs=…"),
        ("data.batch_size=8", "batch.micro_size=…"),
        ("learning_rate=1e-3", "optimizer.lr=…"),
        ("max_steps=10", "budget.steps=…"),
        ("hidden_size=64", "model.d_model=…"),
        ("model.num_layers=2", "model.n_layers=…"),
        ("fsdp=true", "strategy=fsdp"),
        ("trainer.strategy=fsdp2", "strategy=fsdp"),
        ("fsdp_config.fsdp_sharding_strategy=SHARD_GRAD_OP", "strategy=fsdp strategy.reshard_after_forward=false"),
        ("parallelism.tensor_parallel_degree=4", "strategy=fsdp_tp strategy.tensor_parallel_size=…"),
        ("trainer.precision=16", "precision=…"),
        ("model.attention=mqa", "attention=…"),
    ],
)
def test_settings_of_others_are_answered(typed: str, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", typed])
    with pytest.raises(ConfigCompositionException) as refused:
        config.compose([typed])
    [(path, message)] = suggestions.composition_problems(refused.value, "train")
    assert (path, message) == (typed.partition("=")[0], f"is unknown; here it is {answer}")


def test_flags_are_told_to_be_settings() -> None:
    arguments = ["attention=gqa", "--epochs", "3", "--lr=1e-3", "--dry-run", "--fsdp", "--strategy=fsdp2", "--foo"]
    arguments += ["-m", "--cfg", "job"]
    found = [(flag, hint.partition(": ")[2]) for flag, hint in suggestions.no_flags(arguments, "train")]
    assert found == [
        ("--epochs", "budget=epochs budget.epochs=…"),
        ("--lr", "optimizer.lr=1e-3"),
        ("--dry-run", "dry_run=true"),
        ("--fsdp", "strategy=fsdp"),
        ("--strategy", "strategy=fsdp"),
        ("--foo", ""),
    ]
    assert suggestions.no_flags(["--multirun", "seed=1,2", "--config-dir", "mine"], "train") == []
