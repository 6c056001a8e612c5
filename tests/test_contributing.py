"""What CONTRIBUTING.md and docs/ show to add works, from outside of the package and by YAML alone."""

import importlib
import mailbox
import re
import subprocess
from pathlib import Path

import pytest

from programs import run
from thunderhead.training.record import read_rows, read_summary
from tiny import tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """A folder with the files of CONTRIBUTING.md."""
    assert write_files("CONTRIBUTING.md", tmp_path) == [
        "my_variants/gated.py",
        "conf/attention/gated.yaml",
        "test_gated.py",
    ]
    return tmp_path


def write_files(page: str, folder: Path) -> list[str]:
    """Write the files that a page shows, and return their names."""
    files = re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```\n", (ROOT / page).read_text(), re.DOTALL)
    for name, content in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return [name for name, _ in files]


def test_the_variant_passes_its_own_test(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(lab)
    importlib.import_module("test_gated").test_equals_the_formula()


def train(lab: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return start("train.py", lab, *arguments)


def start(program: str, lab: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return run(program, "--config-dir", str(lab / "conf"), *arguments, path=lab, **variables)


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


def test_a_mixture_and_a_source_of_ones_own(tmp_path: Path) -> None:
    assert write_files("docs/mixtures.md", tmp_path) == ["conf/data/mine.yaml"]
    assert write_files("docs/preparing.md", tmp_path) == ["my_sources/mbox.py", "mail.yaml"]
    with (tmp_path / "conf/data/mine.yaml").open("a") as file:
        file.write((tmp_path / "mail.yaml").read_text())
    arguments = ("data=mine", "tokenizer=byte", f"data.shards_dir={tmp_path}/shards")
    missing = start("prepare.py", tmp_path, *arguments, HOME=str(tmp_path))
    assert missing.returncode == 2
    assert "data.sources.mail.path=" in missing.stderr

    box = mailbox.mbox(tmp_path / "mail.mbox")
    for folder, suffix in (("notes", ".md"), ("code", ".py")):
        (tmp_path / folder).mkdir()
        for n in range(60):
            (tmp_path / folder / f"{n}{suffix}").write_text(f"{folder} number {n}\n" * 40)
    for n in range(60):
        message = mailbox.mboxMessage()
        message.set_payload(f"letter number {n}\n" * 40)
        box.add(message)
    box.close()
    prepared = start("prepare.py", tmp_path, *arguments, HOME=str(tmp_path))
    assert prepared.returncode == 0, prepared.stderr
    assert {"text", "code", "mail"} <= set(prepared.stdout.split())
