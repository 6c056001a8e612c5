"""What a tag needs to become a release."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".github" / "release_notes.py"
CHANGELOG = (
    "# Changelog\n\n## [Unreleased]\n\n- more\n\n## [1.2.0] - 2026-12-01\n\n- new\n- newer\n\n## [1.1.0] - 2026-11-01\n"
)


def notes(tag: str, version: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / ".github").mkdir()
    (folder / ".github" / "release_notes.py").write_text(SCRIPT.read_text())
    (folder / "pyproject.toml").write_text(f'[project]\nname = "x"\nversion = "{version}"\n')
    (folder / "CHANGELOG.md").write_text(CHANGELOG)
    command = [sys.executable, str(folder / ".github" / "release_notes.py"), tag]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_version_has_its_part_of_the_changelog(tmp_path: Path) -> None:
    assert notes("v1.2.0", "1.2.0", tmp_path).stdout == "- new\n- newer\n"


@pytest.mark.parametrize(
    ("tag", "version", "why"),
    [
        ("v1.2.0", "1.1.0", "pyproject.toml has version 1.1.0: tag v1.1.0, or raise it"),
        ("v1.3.0", "1.3.0", 'CHANGELOG.md has nothing under "## [1.3.0] - <date>": move there what is unreleased'),
        ("v1.1.0", "1.1.0", 'CHANGELOG.md has nothing under "## [1.1.0] - <date>": move there what is unreleased'),
    ],
)
def test_other_tags_are_refused(tag: str, version: str, why: str, tmp_path: Path) -> None:
    refused = notes(tag, version, tmp_path)
    assert (refused.returncode, refused.stderr) == (1, f"error: {why}\n")
