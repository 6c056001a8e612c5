"""`thunderhead new <folder> name=<package>`: a project of one's own, from the files in template/."""

import keyword
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from thunderhead.core.config import ConfigError, Problem

TEMPLATE, SUFFIX, NAME = Path(__file__).parent / "template", ".template", "my_project"
USAGE = "thunderhead new <folder> name=<package>"


def new(arguments: list[str]) -> Path:
    """Write a project into a folder that is not there or empty; the package is called like the folder unless told.

    Raises ConfigError if the folder is not empty, or the name is none of a package's, or is taken.
    """
    named = [a.removeprefix("name=") for a in arguments if a.startswith("name=")]
    if any(a.startswith("vendor=") for a in arguments):
        how = "git subtree add --prefix thunderhead <repository> main --squash, and pip install -e ./thunderhead"
        raise ConfigError([Problem("vendor", f"core/ trains nothing alone: hold the whole in your project, by {how}")])
    folders = [a for a in arguments if not a.startswith("name=")]
    if len(folders) != 1 or len(named) > 1 or folders[0].startswith("-") or "=" in folders[0]:
        raise ConfigError([Problem("", f"usage: {USAGE}")])
    folder = Path(folders[0])
    name = named[0] if named else folder.absolute().name.replace("-", "_")
    if not (name.isidentifier() and name.isascii() and name.islower()) or keyword.iskeyword(name):
        raise ConfigError(
            [Problem("name", f"{name!r} is no name of a package: small letters, digits and _, as name=my_lab")]
        )
    if name in sys.stdlib_module_names or name in ("thunderhead", "hydra_plugins", "torch", "lightning", "tests"):
        raise ConfigError(
            [Problem("name", f"{name} is the name of another package: give one that is not taken, as name=my_lab")]
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError([Problem("", f"{folder} is there and not empty: give a new folder, as {USAGE}")])
    for file, content in files(name):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(content, encoding="utf-8")
    return folder


def files(name: str) -> Iterator[tuple[Path, str]]:
    """The files of a project whose package is called `name`: path in its folder, and text."""
    for file in sorted(TEMPLATE.rglob(f"*{SUFFIX}")):
        path = str(file.relative_to(TEMPLATE)).removesuffix(SUFFIX).replace(NAME, name)
        text = file.read_text(encoding="utf-8").replace("THUNDERHEAD_VERSION", version("thunderhead"))
        yield Path(path), text.replace(NAME, name)
