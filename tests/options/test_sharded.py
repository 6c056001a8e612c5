"""Sharded over two processes (gloo), every option of the optimizer group trains as in one process.

FSDP2 averages the two processes' equal gradients, which is exact, so that only the optimizers' own sums over sharded
dimensions are computed in another order.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

OPTIONS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf/optimizer").glob("*.yaml"))
# Relative to the way made. Element by element: nothing differs but rounding in the gathered forward pass. Adafactor:
# float32 sums. Muon: the iteration's matrix products are in bfloat16 (0.4 %), which it amplifies.
TOLERANCE = {"adafactor": 1e-5, "muon": 0.03}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, str(Path(__file__).with_name("sharded_worker.py"))]
    workers = [
        subprocess.Popen([*command, str(rank), str(folder)], stderr=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    try:
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("option", OPTIONS)
def test_sharded_equals_whole(result, option):
    assert result[option]["sharded"] < TOLERANCE.get(option, 1e-5)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_sharded_checkpoint_continues_bit_for_bit(result, option):
    assert result[option]["resumed"] == 0


@pytest.mark.parametrize("option", OPTIONS)
def test_state_holds_no_partial_sums(result, option):
    assert result[option]["partial"] is False


def test_groups_are_found_in_sharded_models(result):
    assert result["adamw"]["groups"] == ["matrices", "embeddings", "vectors"]


def test_adafactor_under_tensor_parallelism(result):
    # float32 sums in another order, over 4 steps of a parameter of size 1
    assert result["tensor_parallel_adafactor"] < 1e-6
