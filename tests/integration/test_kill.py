"""kill -9 of all processes of a run, and going on: bit for bit what an undisturbed run does."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from thunderhead.core.config import CONF_DIR

SCRIPT = CONF_DIR.parent / "benchmarks" / "kill_and_resume.py"
# the prose twice: nothing to tokenize for long
SMALL = ("data.sources.code.include_code=false", "data.sources.code.include_topics=true")


@pytest.mark.slow  # test_deaths kills one of several processes, in any suite
@pytest.mark.parametrize(("kills", "steps"), [(1, 14), (30, 300)])
def test_killed_runs_end_where_undisturbed_ones_do(
    kills: int, steps: int, tmp_path: Path, tell: Callable[..., None]
) -> None:
    """A mixture in stages, dropout, accumulation, two ranks of DDP with two workers each; see the script."""
    command = [sys.executable, str(SCRIPT), f"--kills={kills}", f"--steps={steps}", f"--table={tmp_path}/table.md"]
    ended = subprocess.run(
        [*command, f"--folder={tmp_path}", *SMALL], capture_output=True, text=True, timeout=1800, check=False
    )
    logs = "\n".join(file.read_text()[-3000:] for file in tmp_path.glob("*.log"))
    assert ended.returncode == 0, ended.stdout + ended.stderr + logs
    table = (tmp_path / "table.md").read_text()
    assert table.count("| equal |") + table.count("| none |") == kills + 1
    assert table.count("| killed ") == kills
    killed = [int(step) for step in re.findall(r"killed in step (\d+)", table)]
    begun = [int(step) for step in re.findall(r"^\| \d+ \| (\d+) ", table, re.MULTILINE)]
    lost = max(step - after for step, after in zip(killed, begun[1:], strict=True))
    said = next(
        line
        for file in sorted(tmp_path.glob("*.log"))
        for line in file.read_text().splitlines()
        if line.startswith("Going on from ")
    )
    tell(tries=kills, tokens_lost=1024 * lost, saw=said)
