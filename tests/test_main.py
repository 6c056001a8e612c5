import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from thunderhead.__main__ import PROGRAMS
from thunderhead.core.config import CONF_DIR

ROOT = CONF_DIR.parent
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs the command of an installation of the wheel, in a folder that has nothing to do with the repository."""
    site, here = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run(pip, check=True)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(site)}
        command = [sys.executable, site / "bin" / "thunderhead", *arguments]
        return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)

    run.folder, run.site = here, str(site)  # type: ignore[attr-defined]
    return run


def test_the_wheel_has_conf_and_programs_and_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"thunderhead/programs/{file.relative_to(ROOT)}" for file in CONF_DIR.rglob("*.yaml")}
    expected |= {f"thunderhead/programs/{name}.py" for name in PROGRAMS} | {"thunderhead/py.typed"}
    package = [file.relative_to(ROOT / "src") for file in (ROOT / "src").rglob("*") if file.is_file()]
    expected |= {str(file) for file in package if "__pycache__" not in file.parts}
    assert expected == {name for name in names if ".dist-info" not in name}
    assert sorted(PROGRAMS) == sorted(file.stem for file in ROOT.glob("*.py"))


def test_an_installed_package_trains_and_sweeps_in_any_folder(installed: Run, tmp_path: Path) -> None:
    """Also with options of one's own, and with every hint as it must be typed."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nmodel:\n  n_layers: 1\n")
    mine = ("--config-dir", str(tmp_path), "experiment=mine", "debug=fast", "tokenizer=byte")
    done = installed("train", "-m", *mine, "seed=1")
    assert done.returncode == 0, done.stdout + done.stderr
    (report,) = installed.folder.glob("logs/sweeps/*/*/report.html")  # type: ignore[attr-defined]
    assert f"report {report.relative_to(installed.folder)}" in done.stdout  # type: ignore[attr-defined]
    refused = installed("train", "attention.n_kv_head=2")
    assert refused.returncode == 2
    assert "attention.n_kv_heads" in refused.stderr
    assert installed("compare", "--help").stdout.startswith("thunderhead compare runs=")


def test_what_there_is_is_told(installed: Run) -> None:
    told = installed()
    assert told.returncode == 0
    assert all(f"\n  {name} " in told.stdout for name in PROGRAMS)
    assert installed("--version").stdout == "thunderhead 0.1.0\n"
    unknown = installed("trian")
    assert (unknown.returncode, unknown.stderr) == (2, "error: there is no command trian: did you mean train?\n")


def test_what_was_meant_is_said_with_options_of_ones_own_too(installed: Run, tmp_path: Path) -> None:
    (tmp_path / "norm").mkdir()
    (tmp_path / "norm" / "centered.yaml").write_text("_target_: torch.nn.LayerNorm\neps: 1e-5\n")
    mine = ("train", f"--config-dir={tmp_path}")
    refused = installed(*mine, "norm=centred")
    assert "norm has no option centred; did you mean centered? Options: centered, layernorm" in refused.stderr
    refused = installed(*mine, "norm=centered", "norm.epps=1", "optimizer.lrr=1")
    assert "norm.epps is unknown; did you mean norm.eps?" in refused.stderr
    assert "optimizer.lrr is unknown; did you mean optimizer.lr?" in refused.stderr
    assert installed(*mine, "norm=centered", "--foo").stderr.count("\n") == 2


def test_bash_completes_commands_and_their_settings(installed: Run) -> None:
    script = installed("-sc", "install=bash").stdout
    assert script.endswith("-F hydra_bash_completion thunderhead\n")
    typed = ["thunderhead tr", "thunderhead train attention=gqa optimizer=l", "thunderhead prepare tokenizer=b"]
    lines = [f"COMP_LINE='{line}'; COMP_WORDS=({line}); COMP_CWORD={line.count(' ')}" for line in typed]
    asked = "\n".join(f'{line}; hydra_bash_completion; echo "${{COMPREPLY[@]}}"' for line in lines)
    site = installed.site  # type: ignore[attr-defined]
    environment = {**os.environ, "PYTHONPATH": site, "PATH": f"{site}/bin:{os.environ['PATH']}"}
    command = ["bash", "-c", f"{script}\n{asked}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["train", "optimizer=lion", "tokenizer=bpe tokenizer=byte"], done.stderr
    refused = installed("-sc", "install=tcsh")
    assert refused.returncode == 2
    assert "bash, zsh, fish" in refused.stderr + refused.stdout
