"""A project of one's own: what is written, what is refused, and that it works."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from thunderhead.core import config
from thunderhead.core.config import CONF_DIR, ConfigError
from thunderhead.new import NAME, new
from tiny import plan_of

ROOT = CONF_DIR.parent


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return new([str(tmp_path / "lab"), "name=gated_lab"])


def inside(project: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the project's folder, its package and Thunderhead's importable."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = f"{project}:{ROOT / 'src'}"
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=project, env=environment, capture_output=True, text=True, check=False
    )


def test_what_is_written(project: Path) -> None:
    files = {str(file.relative_to(project)) for file in project.rglob("*") if file.is_file()}
    assert files == {
        *("README.md", "pyproject.toml", ".gitignore", ".github/workflows/ci.yml"),
        *("gated_lab/__init__.py", "gated_lab/__main__.py", "gated_lab/xielu.py"),
        *("conf/activation/xielu.yaml", "conf/experiment/xielu.yaml", "tests/test_xielu.py", "tests/test_runs.py"),
    }
    texts = [file.read_text() for file in project.rglob("*") if file.is_file()]
    assert not any(NAME in text or "THUNDERHEAD_VERSION" in text for text in texts)


def test_it_is_well_formed_and_right(project: Path) -> None:
    done = inside(project, "ruff", "check", "--no-cache", "--line-length=120", ".")
    assert done.returncode == 0, done.stdout
    done = inside(project, "ruff", "format", "--no-cache", "--line-length=120", "--check", ".")
    assert done.returncode == 0, done.stdout
    done = inside(project, "pytest", "-q", "-p", "no:cacheprovider", "tests/test_xielu.py")
    assert done.returncode == 0, done.stdout


def test_its_wheel_has_its_options(project: Path) -> None:
    done = inside(project, "hatchling", "build", "--target", "wheel")
    assert done.returncode == 0, done.stderr
    (wheel,) = project.glob("dist/*.whl")
    assert "gated_lab/conf/activation/xielu.yaml" in zipfile.ZipFile(wheel).namelist()


def test_it_plans_with_its_own_option(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(project)
    composed = config.compose([f"hydra.searchpath=[file://{project}/conf]", "activation=xielu"])
    assert composed.activation._target_ == "gated_lab.xielu.XIELUFeedForward"
    assert plan_of(config.plain(composed)).parameters["feedforward"] % 2 == 0  # two numbers in each layer


def test_its_own_tests_pass(project: Path) -> None:
    done = inside(project, "pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: thunderhead new <folder> name=<package>"),
        (["a", "b"], "usage: "),
        (["--help"], "usage: "),
        (["lab", "name=My-Lab"], "name: 'My-Lab' is no name of a package: .*as name=my_lab"),
        (["lab", "name=class"], "name: 'class' is no name of a package"),
        (["lab", "name=json"], "name: json is the name of another package"),
        (["lab", "vendor=core"], "vendor: core/ trains nothing alone: .*git subtree add --prefix thunderhead"),
        (["full"], "full is there and not empty: give a new folder"),
    ],
)
def test_refusals(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match=f"^{message}"):
        new(arguments)
    assert [*tmp_path.iterdir()] == [tmp_path / "full"]


def test_a_refusal_ends_with_2(tmp_path: Path) -> None:
    done = inside(tmp_path, "thunderhead", "new", "lab", "name=json")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    done = inside(tmp_path, "thunderhead", "new", "my-lab")  # named by the folder
    assert done.returncode == 0
    assert (tmp_path / "my-lab" / "my_lab" / "__main__.py").is_file()
