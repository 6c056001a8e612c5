"""What make's targets that touch files do, that `make help` lists them all, and what containers take from here."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

MAKEFILE = Path(__file__).parents[1] / "Makefile"


def make(target: str, folder: Path) -> str:
    # Not what a make that runs the tests hands on to a make below it, which would print the folders it works in.
    passed_on = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in passed_on}
    command = ["make", target]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


def test_help_lists_every_target() -> None:
    [phony] = re.findall(r"^\.PHONY: (.*)$", MAKEFILE.read_text(encoding="utf-8"), re.M)
    assert sorted(re.findall(r"^  make ([a-z-]+) +\S", make("help", MAKEFILE.parent), re.M)) == sorted(phony.split())


def test_clean_deletes_what_it_lists_and_nothing_else(tmp_path: Path) -> None:
    shutil.copy(MAKEFILE, tmp_path)
    caches = [".mypy_cache", ".hypothesis", "__pycache__", "src/one/__pycache__", "tests/__pycache__"]
    kept = ["logs/__pycache__", "data/.ruff_cache", ".venv/__pycache__", "mine/__pycache__", "src/my_cache", "build"]
    for folder in (*caches, *kept):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").touch()
    assert sorted(make("clean", tmp_path).splitlines()) == sorted(f"deletes {cache}" for cache in caches)
    assert [folder for folder in caches if (tmp_path / folder).exists()] == []
    assert all((tmp_path / folder / "file").exists() for folder in kept)
    assert make("clean", tmp_path) == "nothing to delete\n"


def test_containers_are_made_by_make_from_what_is_there() -> None:
    root = MAKEFILE.parent
    docker = (root / "Dockerfile").read_text(encoding="utf-8")
    developing = json.loads((root / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    [targets] = re.findall(r"^\.PHONY: (.*)$", MAKEFILE.read_text(encoding="utf-8"), re.M)
    made = [*re.findall(r"^RUN make (.*)$", docker, re.M), developing["postCreateCommand"].removeprefix("make ")]
    assert made == ["setup", "setup"]
    assert {*made} <= {*targets.split()}
    copied = re.findall(r"^COPY (.*) \S+$", docker, re.M)
    assert copied
    assert all((root / place).exists() for places in copied for place in places.split())
    [command] = re.findall(r"^CMD (.*)$", docker, re.M)
    assert (root / json.loads(command)[1]).is_file()


def test_an_image_holds_nothing_that_git_ignores() -> None:
    def names(file: str) -> set[str]:
        lines = (MAKEFILE.parent / file).read_text(encoding="utf-8").splitlines()
        return {re.sub(r"^(!?)(\*\*/|/)", r"\1", line).rstrip("/") for line in lines if line and line[0] != "#"}

    assert names(".gitignore") == names(".dockerignore")
