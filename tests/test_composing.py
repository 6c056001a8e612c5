"""Configurations of the same groups, composed once."""

from pathlib import Path
from unittest.mock import patch

import pytest
from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import HydraException
from omegaconf import OmegaConf

from thunderhead import composing
from thunderhead.composing import groups_composed_once
from thunderhead.core import config
from tiny import OPTIONS

COMPOSED = (
    [],
    ["attention=gqa", "budget.steps=3"],
    ["budget.steps=4", "attention=gqa", "optimizer.lr=0.1", "optimizer=lion"],
    ["attention=gqa", "+more.deep=3", "~callbacks.best"],
    ["~scheduler", "logger=csv", "name=x"],
    ["+callbacks.z={a: 1}", "++model.d_model=8"],
    ["experiment=ablation_attention", "attention=mla"],
    *([f"{group}={OPTIONS[group][-1]}"] for group in ("data", "strategy", "callbacks", "scheduler")),
)


def compose(overrides: list[str]) -> str:
    return OmegaConf.to_yaml(config.compose(overrides))


def test_the_same_as_without() -> None:
    with (  # without what tests/conftest.py does for all tests
        patch.object(config_loader_impl, "create_defaults_list", defaults_list.create_defaults_list),
        patch.object(ConfigLoaderImpl, "_compose_config_from_defaults_list", composing.merge),
    ):
        plain = [compose(overrides) for overrides in COMPOSED]
    with groups_composed_once():
        assert [compose(overrides) for overrides in COMPOSED] == plain
        assert [compose(overrides) for overrides in reversed(COMPOSED)] == plain[::-1]


def test_what_is_refused_stays_so() -> None:
    with groups_composed_once():
        compose(["attention=gqa"])
        for wrong in ("attention.n_kv_heads=x.y=1", "attention.no_such=1", "attention=no_such", "~attention=mha"):
            for _ in range(2):
                with pytest.raises(HydraException):
                    compose(["attention=gqa", wrong])
        compose(["attention=gqa"])


def test_files_that_change_meanwhile_change_nothing(tmp_path: Path) -> None:
    option = tmp_path / "attention" / "own.yaml"
    option.parent.mkdir()
    overrides = [f"hydra.searchpath=[{tmp_path}]", "attention=own"]

    def of_file(n: int) -> str:
        option.write_text(f"own: {n}\n")
        return str(config.compose(overrides).attention.own)

    with groups_composed_once():
        assert [of_file(1), of_file(2)] == ["1", "1"]
    with groups_composed_once():
        assert of_file(3) == "3"
