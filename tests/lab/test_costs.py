"""What arms cost, against costs known by hand."""

from pathlib import Path

import numpy as np
import pytest
from simulated import write_run

from thunderhead.lab.costs import Cost, cost_to_reach, kv_cache_bytes_per_token
from thunderhead.lab.runs import Curve, read_runs

CURVE = Curve(*(np.array(v, float) for v in ([10, 20, 30], [100, 200, 300], [1, 2, 3], [5.0, 3.0, 2.0])))


def test_between_validations_the_loss_is_a_line() -> None:
    assert cost_to_reach(CURVE, 4.0) == Cost(15, 150, 1.5)
    assert cost_to_reach(CURVE, 2.0) == Cost(30, 300, 3)


def test_the_first_validation_is_the_earliest_answer_and_never_is_none() -> None:
    assert cost_to_reach(CURVE, 6.0) == Cost(10, 100, 1)
    assert cost_to_reach(CURVE, 1.9) is None


def test_the_first_time_counts() -> None:
    loss = np.array([5.0, 3.0, 4.0, 2.0])
    curve = Curve(np.arange(1.0, 5.0), np.arange(1.0, 5.0), np.arange(1.0, 5.0), loss)
    assert cost_to_reach(curve, 3.0) == Cost(2, 2, 2)


@pytest.mark.parametrize(
    ("overrides", "elements"),  # a layer, with d_model 32 and 4 heads of 8
    [
        (["attention=mha"], 2 * 32),
        (["attention=gqa", "attention.n_kv_heads=2"], 2 * 16),
        (["attention=mqa"], 2 * 8),
        (["attention=mla"], 4 * 8 + 4),
        (["attention=sliding_window", "attention.window=16", "attention.n_kv_heads=4"], 32),  # half of the 32 tokens
    ],
)
def test_the_cache_of_two_layers(tmp_path: Path, overrides: list[str], elements: int) -> None:
    (run,) = read_runs([write_run(tmp_path / "run", overrides)])
    assert kv_cache_bytes_per_token(run) == 2 * elements * 2


def test_a_model_that_cannot_be_built_has_no_known_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run,) = read_runs([write_run(tmp_path / "run")])
    run.config["attention"]["_target_"] = "not_installed.Attention"
    assert kv_cache_bytes_per_token(run) is None
    assert "key/value cache is unknown" in caplog.text
