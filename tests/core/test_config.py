"""Plain dicts: composed, quoted, read and written."""

from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from omegaconf import OmegaConf

import awkward
from thunderhead.core import config, resolvers
from thunderhead.core.config import ConfigError


def test_missing_values_of_the_composition() -> None:
    with pytest.raises(ConfigError, match=r"^data.path: needs a value: data.path=…$"):
        config.plain(config.compose(["data=text"]))


def test_an_interpolation_to_nowhere_is_refused() -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        config.plain(config.compose(["name=${nowhere}"]))


def test_yaml_gives_the_configuration_back() -> None:
    resolved = config.plain(config.compose([]))
    assert yaml.safe_load(config.to_yaml(resolved)) == resolved


@given(awkward.TEXT)
@example("${HOME}")
@example("run (1)")
@example("\\\n")
@example("null")
@example("1e3")
@example("")
def test_a_quoted_text_is_read_by_hydra_as_it_is(text: str) -> None:
    read = OverridesParser.create().parse_override(f"key={config.quoted(text)}").value()
    assert OmegaConf.to_container(OmegaConf.create({"key": read}), resolve=True) == {"key": text}


def test_starts_in_the_same_second_get_folders_of_their_own(tmp_path: Path) -> None:
    """The folder is made when its name is asked for, by whoever asks first."""
    asked = {"dir": f"${{new_folder:{tmp_path}/logs/12-00}}"}
    first = OmegaConf.create(asked)
    assert [first.dir, first.dir] == [f"{tmp_path}/logs/12-00"] * 2  # Hydra asks more than once
    for number in (2, 3):
        resolvers.new_folder.cache_clear()  # another process
        assert OmegaConf.create(asked).dir == f"{tmp_path}/logs/12-00-{number}"
    assert {folder.name for folder in (tmp_path / "logs").iterdir()} == {"12-00", "12-00-2", "12-00-3"}


@pytest.mark.parametrize(
    "text", ["[" * 100_000 + "]" * 100_000, "- " * 100_000 + "1", "{a: " * 100_000 + "}" * 100_000]
)
def test_a_file_of_any_depth_is_damaged(text: str, tmp_path: Path) -> None:
    """libyaml ends the whole process there."""
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged .*(levels|depth)"):
        config.read_mapping(tmp_path / "config.yaml")
