"""Pages of docs/ have what conf/ and the tables of classes give."""

from pathlib import Path

import pytest
import yaml

from thunderhead import docs
from thunderhead.core.config import CONF_DIR


@pytest.mark.parametrize(("page", "part"), docs.PARTS)
def test_the_page_is_up_to_date(page: str, part: str) -> None:
    text = (docs.DOCS / page).read_text(encoding="utf-8")
    assert docs.updated(text, part, docs.PARTS[page, part]()) == text, "run: .venv/bin/python -m thunderhead.docs"


def test_the_tables_have_every_group_and_option() -> None:
    groups = {folder.name for folder in CONF_DIR.iterdir() if any(folder.glob("*.yaml"))}
    shown = [group for section in docs.sections().values() for group in section]
    assert sorted(shown) == sorted(groups)
    tables = docs.tables()
    for group in groups:
        for file in (CONF_DIR / group).glob("*.yaml"):
            assert f" {file.stem} |" in tables or f" **{file.stem}** |" in tables


def test_the_defaults_are_those_of_the_programs() -> None:
    programs = [yaml.safe_load((CONF_DIR / f"{name}.yaml").read_text()) for name in ("prepare", "train")]
    defaults = [entry for program in programs for entry in program["defaults"]]
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
