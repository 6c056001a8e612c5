import subprocess
import sys
from pathlib import Path

import pytest

from thunderhead.core.config import CONF_DIR

SCRIPT = CONF_DIR.parent / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_nothing_grows_over_twenty_resumes(tmp_path: Path) -> None:
    """In one process, as a sweep's jobs are; the final weights are those of a run that nobody stopped."""
    command = [sys.executable, str(SCRIPT), "--steps=420", "--resumes=20", f"--table={tmp_path / 'soak.md'}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    table = (tmp_path / "soak.md").read_text(encoding="utf-8")
    assert "| threads |" in table
    assert "undisturbed run: **yes**" in table
