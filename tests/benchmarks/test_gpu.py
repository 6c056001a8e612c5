import subprocess
import sys

import pytest

from thunderhead.core.config import CONF_DIR

SCRIPT = CONF_DIR.parent / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_every_case_runs_at_a_tiny_size_on_a_cpu() -> None:
    command = [sys.executable, str(SCRIPT), "--smoke", "--models", "llama-350m"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    table = [line for line in ended.stdout.splitlines() if line.startswith("| llama-350m")]
    assert [row.split(" | ")[1] for row in table] == ["bare"] * 8 + ["train.py", "huggingface"]
