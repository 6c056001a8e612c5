"""What importing Lightning imports."""

import subprocess
import sys

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
