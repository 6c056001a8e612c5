"""A run of somebody's own attention, given to somebody else: its source comes along, and loads where it is wanted."""

import os
import subprocess
import sys
from pathlib import Path

from thunderhead.training.record import REPOSITORY
from tiny import tiny

MIXER = """
from my_lab.heads import N_KV_HEADS
from thunderhead.core.model.attention import GroupedQueryAttention


class Mine(GroupedQueryAttention):
    def __init__(self, d_model: int, n_heads: int, context_length: int, bias: bool) -> None:
        super().__init__(d_model, n_heads, context_length, bias, n_kv_heads=N_KV_HEADS)
"""


def program(name: str, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(path)} if path is not None else {})
    command = [sys.executable, str(REPOSITORY / name), *arguments]
    return subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_the_source_comes_along(text_corpus: Path, shards_dir: Path, tmp_path: Path) -> None:
    lab, conf, run = tmp_path / "lab", tmp_path / "conf", tmp_path / "run"
    for file, text in {"__init__.py": MIXER, "heads.py": "N_KV_HEADS = 2\n", "unused.py": "1 / 0\n"}.items():
        (lab / "my_lab").mkdir(parents=True, exist_ok=True)
        (lab / "my_lab" / file).write_text(text)
    (conf / "attention").mkdir(parents=True)
    (conf / "attention" / "mine.yaml").write_text("_target_: my_lab.Mine\n")
    lines = tiny(text_corpus, shards_dir, "attention=mine", "callbacks=default", f"hydra.run.dir={run}")
    trained = program("train.py", "--config-dir", str(conf), *lines, path=lab)
    assert trained.returncode == 0, trained.stderr
    code = run / "code"
    kept = {str(file.relative_to(code)): file.read_text() for file in code.rglob("*") if file.is_file()}
    assert kept == {"my_lab/__init__.py": MIXER, "my_lab/heads.py": "N_KV_HEADS = 2\n"}  # and nobody else's

    ask = ("generate.py", f"run={run}", "generation.prompt=a", "generation.max_new_tokens=5")
    unknown = program(*ask)
    assert unknown.returncode == 2
    assert "attention._target_ my_lab.Mine is not called" in unknown.stderr
    assert f"trust=[my_lab]; its source is in {code}: read it, and have it found by PYTHONPATH={code}" in unknown.stderr
    missing = program(*ask, "trust=[my_lab]")
    assert missing.returncode == 2
    assert "attention._target_ cannot load 'my_lab.Mine'" in missing.stderr
    assert "Traceback" not in missing.stderr
    read = program(*ask, "trust=[my_lab]", path=code)
    assert read.returncode == 0, read.stderr
    assert read.stdout.startswith("a")
