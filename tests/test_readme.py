"""The README's table of groups and options is the one that conf/ gives, and its Python runs."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from thunderhead import docs
from thunderhead.core.config import CONF_DIR


def test_the_table_is_up_to_date() -> None:
    readme = docs.README.read_text()
    assert docs.updated(readme) == readme, "run: .venv/bin/python -m thunderhead.docs"


def test_the_table_has_every_group_and_option() -> None:
    groups = {folder.name for folder in CONF_DIR.iterdir() if any(folder.glob("*.yaml"))}
    shown = [group for section in docs.sections().values() for group in section]
    assert sorted(shown) == sorted(groups)
    table = docs.table()
    for group in groups:
        for file in (CONF_DIR / group).glob("*.yaml"):
            assert f" {file.stem} |" in table or f" **{file.stem}** |" in table


def test_the_defaults_are_those_of_train_yaml() -> None:
    defaults = yaml.safe_load((CONF_DIR / "train.yaml").read_text())["defaults"]
    wanted = {group: option for entry in defaults if isinstance(entry, dict) for group, option in entry.items()}
    shown = {group: option for section in docs.sections().values() for group, option in section.items()}
    assert shown == {group: option for group, option in wanted.items() if not group.startswith("override ")}


@pytest.mark.parametrize(
    ("head", "description"),
    [
        ("# One.\na: 1", "One."),
        ("# @package _global_\n# One\n# and two.\n", "One and two."),
        ("# One. And\n# two.\n", "One."),
    ],
)
def test_descriptions_are_whole_sentences(head: str, description: str, tmp_path: Path) -> None:
    file = tmp_path / "option.yaml"
    file.write_text(head)
    assert docs.description(file) == description


def test_a_file_without_a_comment_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "option.yaml"
    file.write_text("a: 1\n")
    with pytest.raises(ValueError, match="does not begin with a comment"):
        docs.description(file)


def test_the_notebook_example_runs() -> None:
    [block] = re.findall(r"<!-- notebook: [^\n]*-->\n```python\n(.*?)```\n", docs.README.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["loss"].isfinite()
    assert all(parameter.grad is not None for parameter in names["decoder"].parameters())
