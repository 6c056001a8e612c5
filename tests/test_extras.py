"""What is said where an optional package is missing runs in any folder, and names what pyproject.toml does."""

import shlex
import tomllib
from pathlib import Path

from thunderhead.extras import install

EXTRAS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_each_extra_is_installed_by_its_packages() -> None:
    for extra in EXTRAS.keys() - {"dev", "benchmarks"}:
        (*command,) = shlex.split(install(extra))
        assert command[:2] == ["pip", "install"]
        names = {requirement.partition(">")[0].partition("<")[0] for requirement in command[2:]}
        assert names == {requirement.partition(">")[0] for requirement in EXTRAS[extra]}


def test_what_is_not_known_needs_the_repository() -> None:
    assert install("nothing") == "uv pip install -e '.[nothing]'"
