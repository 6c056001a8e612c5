"""Which processes are ranks of a run that a launcher started. tests/integration/test_launched_runs.py starts them."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from thunderhead import processes
from thunderhead.core.config import read_mapping

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
SRUN = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "mine", "SLURM_NTASKS": "8", "SLURM_PROCID": "5"}
ONE_TASK = SRUN | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
SHELL = ONE_TASK | {"SLURM_JOB_NAME": "bash"}  # srun --pty bash
LOGIN_NODE = {name: value for name, value in SRUN.items() if name != "SLURM_PROCID"}  # the shell of salloc


@pytest.mark.parametrize(
    ("environment", "is_rank", "rank"),
    [
        ({}, False, 0),
        (TORCHRUN, True, 5),
        (SRUN, True, 5),
        (ONE_TASK, False, 0),
        (SHELL, False, 0),
        (LOGIN_NODE, False, 0),
        (ONE_TASK | TORCHRUN, True, 5),  # a process that our launcher, or torchrun, started there
        (SHELL | TORCHRUN, True, 5),
    ],
)
def test_who_is_a_rank(environment: dict[str, str], is_rank: bool, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*processes.RANK_VARIABLES, *(name for name in os.environ if name.startswith("SLURM"))]:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes.is_rank() == is_rank
    assert processes.global_rank() == rank


@pytest.mark.parametrize("environment", [ONE_TASK, SHELL, LOGIN_NODE])
def test_a_run_of_one_process_within_a_slurm_job(
    environment: dict[str, str], run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no task among others, whatever Lightning makes of the variables."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert read_mapping(run("strategy=ddp") / "summary.json")["steps"] == 2


@pytest.mark.skipif(sys.version_info >= (3, 11, 8), reason="Python has mended it")
def test_before_a_fork_threads_get_a_moment() -> None:
    """Without it 4 of 18,000 forks after a collective of gloo hung here, with it none of 18,000."""
    code = """
        import os, time, thunderhead.processes
        begin = time.perf_counter()
        if not os.fork():
            os._exit(0)
        print(time.perf_counter() - begin >= 0.01)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert ended.stdout == "True\n"


def test_a_second_signal_is_passed_over_whoever_listened_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning puts back the handler of before while a stopped run still saves."""
    now, heard = 100.0, list[tuple[str, int]]()
    monkeypatch.setattr("time.monotonic", lambda: now)
    outer = processes.listen(lambda number: heard.append(("outer", number)))
    later = lambda number: heard.append(("later", number))  # noqa: E731
    inner = processes.listen(lambda number: heard.append(("inner", number)), later)
    inner(10, None)
    outer(2, None)
    inner(2, None)
    assert heard == [("inner", 10)]
    now += processes.GRACE + 1
    inner(15, None)
    assert heard == [("inner", 10), ("later", 15)]
    processes.listen(lambda number: heard.append(("new", number)))(2, None)
    assert heard[-1] == ("new", 2)
