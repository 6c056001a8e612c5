"""What importing Lightning imports, and what a program leaves to its end."""

import subprocess
import sys

import pytest

from thunderhead.training.record import REPOSITORY

CODE = """
import thunderhead
import lightning.pytorch, sys, torch
from thunderhead.lean import LEFT_OUT
print([name for name in LEFT_OUT if name in sys.modules])
from torchmetrics.text import Perplexity
print(Perplexity()(torch.zeros(1, 2, 8), torch.zeros(1, 2, dtype=torch.long)).item())
import scipy.stats, transformers
from lightning_utilities.core.imports import RequirementCache
print(bool(RequirementCache("scipy>=1")), bool(RequirementCache("transformers")))
"""


def test_torchmetrics_imports_neither_scipy_nor_transformers_and_all_else_may() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    loaded, perplexity, available = done.stdout.splitlines() or [done.stderr]
    assert (loaded, float(perplexity), available) == ("[]", 8, "True True")


def test_a_torchmetrics_that_is_imported_already_is_left_alone() -> None:
    code = "import scipy.signal, torchmetrics, thunderhead, lightning.pytorch; print(torchmetrics.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr


PROGRAM = """
import runpy, sys
sys.argv = ["train.py", *sys.argv[1:]]
try:
    runpy.run_path("train.py", run_name="__main__")
except SystemExit:
    pass
print("LOADED", len(sys.modules), *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def loaded(*arguments: str) -> tuple[int, set[str]]:
    """How many modules a command has imported when it ends, and their packages."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    number, *packages = done.stdout.rpartition("LOADED ")[2].split()
    return int(number), set(packages)


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["attention=foo"]])
def test_help_and_refusals_import_neither_torch_nor_what_needs_it(arguments: list[str]) -> None:
    number, packages = loaded(*arguments)
    assert packages.isdisjoint({"torch", "lightning", "numpy", "pandas", "matplotlib", "litdata"})
    assert number < 550  # Hydra, OmegaConf and what they import of Python: 422


def test_a_dry_run_imports_what_plans_and_nothing_that_prepares_or_logs() -> None:
    number, packages = loaded("dry_run=true", "model.n_layers=1")
    assert {"torch", "lightning"} <= packages
    assert packages.isdisjoint({"litdata", "boto3", "tensorboard", "datasketch", "scipy", "transformers"})
    assert number < 3800  # 3,227, most of them torch and lightning


ENDING = """
import atexit, gc, sys
atexit.register(lambda: print("frozen", gc.get_freeze_count() > 0))  # before Thunderhead's, and so after it
from thunderhead import command_line, lean
with lean.importing():
    import lightning.pytorch
print(gc.isenabled(), gc.get_freeze_count() > 100_000)
class Own:
    def __init__(self):
        self.itself = self
    def __del__(self):
        print("closed")
Own()
if "nanobind" in sys.argv:  # Triton's takes what is not collected for leaks, and complains
    sys.modules["triton"] = sys
"""


@pytest.mark.parametrize("more", [[], ["nanobind"]])
def test_what_was_imported_is_not_collected_and_what_is_garbage_is(more: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", ENDING, *more], capture_output=True, text=True, check=False)
    assert sorted(done.stdout.splitlines()) == ["True True", "closed", f"frozen {not more}"], done.stderr
