"""What make's targets that touch files do, and that `make help` lists them all."""

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
