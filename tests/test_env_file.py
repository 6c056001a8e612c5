"""Keys of loggers come from `.env`, and nothing else does."""

import os
from pathlib import Path

import pytest

from thunderhead import env_file
from thunderhead.core.config import ConfigError


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ends with the test."""
    monkeypatch.setattr(os, "environ", {"WANDB_ENTITY": "mine"})


def test_keys_are_read(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text(
        "# keys\nexport WANDB_API_KEY='a b'  # of the team\nCOMET_API_KEY=c#d\n\nMLFLOW_TRACKING_PASSWORD=\n"
        "WANDB_ENTITY=theirs\nPYTHONPATH=/tmp\nthis is no line\nMLFLOW_TRACKING_URI=http://localhost:5000"
    )
    env_file.load(file)
    assert keys() == {
        "WANDB_API_KEY": "a b",
        "WANDB_ENTITY": "mine",  # as before: the environment comes first
        "COMET_API_KEY": "c#d",
        "MLFLOW_TRACKING_PASSWORD": "",
        "MLFLOW_TRACKING_URI": "http://localhost:5000",
    }


def test_a_folder_of_this_name_and_none_are_fine(tmp_path: Path) -> None:
    env_file.load(tmp_path)
    env_file.load(tmp_path / ".env")
    assert keys() == {"WANDB_ENTITY": "mine"}


def keys() -> dict[str, str]:
    """The environment, without what pytest writes into it."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}


@pytest.mark.parametrize("value", ["two words", "it's", " spaced"])
def test_a_line_that_no_shell_takes_is_refused_without_its_value(value: str, tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text(f"A=1\nWANDB_API_KEY={value}\n")
    with pytest.raises(ConfigError, match=r"line 2: the value of WANDB_API_KEY has spaces or quotes") as refused:
        env_file.load(file)
    assert value not in str(refused.value)
