"""Words of other projects: what they are told to lead to is there."""

import re
import shlex

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf

from thunderhead import familiar, suggestions
from thunderhead.core import config
from thunderhead.core.config import CONF_DIR, Problem
from thunderhead.training.run import find_problems

DOCS = CONF_DIR.parent / "docs"
TABLE = re.findall(r"^\| (\w.*) \| `(.+?)` \| (.+?) \|$", (DOCS / "coming_from.md").read_text(encoding="utf-8"), re.M)


def known(*choices: str) -> set[str]:
    return suggestions.paths(OmegaConf.to_container(config.compose(choices), resolve=False))


def answers(typed: str, monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """What train.py refuses, as command_line.run has it."""
    arguments = shlex.split(typed)
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    if problems := suggestions.not_settings(arguments, "train"):
        return problems
    with pytest.raises((HydraException, ValueError)) as refused:
        config.compose(arguments)
    if isinstance(refused.value, HydraException):
        return suggestions.composition_problems(refused.value, "train")
    return suggestions.unknown_options()


@pytest.mark.parametrize("ours", sorted(set(familiar.FAMILIAR.values())))
def test_what_is_answered_exists(ours: str) -> None:
    *choices, last = shlex.split(re.sub(r"\{\w*\}|…", "0.9", ours))
    path = last.partition("=")[0]
    if "=" in last:
        assert path.startswith(("hydra", "init_from")) or known(*choices, last)
    else:
        assert config.options(path) or path in known(*choices) or path.startswith("hydra.")


def test_no_setting_of_ours_is_taken_for_another() -> None:
    assert not known() & {*familiar.FAMILIAR, *familiar.REMARKS}
    assert not familiar.FAMILIAR.keys() & familiar.REMARKS.keys()


@pytest.mark.parametrize("group", familiar.OPTIONS)
def test_options_by_the_names_of_others(group: str) -> None:
    for name in familiar.OPTIONS[group]:
        assert name == name.lower()
        assert name not in config.options(group)
        assert familiar.option(group, name.upper()) == (said := familiar.option(group, name))
        assert group.startswith("hydra") or known(*shlex.split(said.replace("…", "x")))
    assert not familiar.option(group, "something")


def test_settings_of_others_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    for typed, answer in {
        "fsdp=true": "strategy=fsdp",
        "trainer.strategy=fsdp2": "strategy=fsdp",
        "fsdp_config.fsdp_sharding_strategy=SHARD_GRAD_OP": "strategy=fsdp strategy.reshard_after_forward=false",
        "parallelism.tensor_parallel_degree=4": "strategy=fsdp_tp strategy.tensor_parallel_size=4",
        "trainer.precision=16": "precision=fp16-mixed",
        "model.attention=mqa": "attention=mqa",
        "learning_rate=1e-3": "optimizer.lr=1e-3",
        "gradient_checkpointing=false": "activation_checkpointing=none",
        "swiglu=false": "to be left out",
        "limit_train_batches=0.5": "data.max_training_tokens=…",
    }.items():
        [(path, message)] = answers(typed, monkeypatch)
        assert (path, message) == (typed.partition("=")[0], f"is unknown; here it is {answer}")


def test_flags_are_told_to_be_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    arguments = ["attention=gqa", "--epochs", "3", "--lr=1e-3", "--dry-run", "--strategy=fsdp2", "--foo"]
    arguments += ["-m", "--cfg", "job", "mqa", "x.yaml", "anything"]
    *found, mqa, file, anything = suggestions.not_settings(arguments, "train")
    assert mqa == Problem("mqa", "is no setting; here it is attention=mqa")
    assert file == Problem("x.yaml", f"is no setting; {familiar.REMARKS['config']}")
    assert anything == Problem("anything", "is no setting; settings are written as name=value (see --help)")
    assert [(flag, hint.partition(": ")[2]) for flag, hint in found] == [
        ("--epochs", "budget=epochs budget.epochs=3"),
        ("--lr", "optimizer.lr=1e-3"),
        ("--dry-run", "dry_run=true"),
        ("--strategy", "strategy=fsdp"),
        ("--foo", ""),
    ]
    assert suggestions.not_settings(["--multirun", "seed=1,2", "--config-dir", "mine"], "train") == []


def test_what_hydra_cannot_read_is_told_with_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    for typed, said in {
        "name=日本語": """日本語 cannot be read without quotes: "name='日本語'\"""",
        "name=a(": """a( cannot be read without quotes: "name='a('\"""",
        "budget.steps=…": "needs a value in place of …: budget.steps=…",
    }.items():
        assert answers(typed, monkeypatch) == [Problem(typed.partition("=")[0], said)]


def told(problem: Problem) -> str:
    """What a refusal says is to be typed, or what to do."""
    message = re.sub(r" \(\d.*|; Options: .*| Options: .*", "", problem.message)
    if near := re.search(r"did you mean (\S+)\?", message):
        return f"{problem.path}={near[1]}"
    return re.sub(r"^.*?(without dashes: |here it is |; (?:type|there is(?! none)) |; )(?!settings|here)", "", message)


@pytest.mark.parametrize(("project", "typed", "here"), TABLE)
def test_the_table_is_what_is_answered_and_is_accepted(
    project: str, typed: str, here: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [told(problem) for problem in answers(typed, monkeypatch)]
    if said == [here.replace("`", "")] and "=" not in said[0].split()[0]:
        return
    words = [*dict.fromkeys(word for setting in said for word in shlex.split(setting))]
    assert words == shlex.split(here.strip("`"))
    overrides = [word for word in words if not word.startswith(("hydra", "init_from=", "resume="))]
    assert find_problems(config.plain(config.compose(overrides))) == []


def test_the_table_has_many_projects() -> None:
    assert len(TABLE) > 30
    assert len({project for project, *_ in TABLE}) == 8
