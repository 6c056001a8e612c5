"""What CONTRIBUTING.md shows works, from outside of the package and by YAML alone."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from thunderhead.training.record import read_rows, read_summary
from tiny import tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """A folder with the files of CONTRIBUTING.md."""
    files = re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```\n", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert [name for name, _ in files] == ["my_variants/gated.py", "conf/attention/gated.yaml", "test_gated.py"]
    for name, content in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def test_the_variant_passes_its_own_test(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(lab)
    importlib.import_module("test_gated").test_equals_the_formula()


def train(lab: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "train.py", "--config-dir", str(lab / "conf"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(lab)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_variant_trains_by_yaml_alone(lab: Path, text_corpus: Path, shards_dir: Path) -> None:
    run_dir = lab / "run"
    chosen = tiny(text_corpus, shards_dir, "attention=gated", "attention.gate_bias=true")
    finished = train(lab, *chosen, f"hydra.run.dir={run_dir}")
    assert finished.returncode == 0, finished.stderr
    summary = read_summary(run_dir)
    assert summary is not None
    assert summary["steps"] == 2
    assert len(read_rows(run_dir / "metrics.csv")[1]) >= 2
    assert "my_variants.gated.GatedAttention" in (run_dir / "config.yaml").read_text()


def test_its_settings_are_checked_like_any_other(lab: Path, text_corpus: Path, shards_dir: Path) -> None:
    finished = train(lab, *tiny(text_corpus, shards_dir, "attention=gated", "attention.gate_bias=3"), "dry_run=true")
    assert finished.returncode == 2
    assert "attention.gate_bias 3 is not accepted" in finished.stderr
