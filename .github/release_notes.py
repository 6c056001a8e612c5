"""python .github/release_notes.py v1.2.3: that version's part of CHANGELOG.md, if the package is of it, too."""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def release_notes(tag: str, project: str, changelog: str) -> str:
    """The text of a version's part; ValueError if that is empty or missing, or pyproject.toml has another version."""
    version = tomllib.loads(project)["project"]["version"]
    if tag != f"v{version}":
        raise ValueError(f"pyproject.toml has version {version}: tag v{version}, or raise it")
    found = re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## |\Z)", changelog, re.M | re.S)
    if found is None or not found[1].strip():
        raise ValueError(f'CHANGELOG.md has nothing under "## [{version}] - <date>": move there what is unreleased')
    return found[1].strip()


if __name__ == "__main__":
    try:
        texts = ((ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "CHANGELOG.md"))
        print(release_notes(sys.argv[1], *texts))
    except ValueError as error:
        sys.exit(f"error: {error}")
