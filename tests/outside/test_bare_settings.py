"""Components with no more settings than they need: what is left at its default in YAML is legal everywhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from thunderhead.core.config import read_mapping
from thunderhead.training.record import read_rows


def flat(step: int, total_steps: int) -> float:
    return 0.5


BARE: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1}},
    "rprop": {"optimizer": {"_target_": "torch.optim.Rprop", "lr": 0.001}},
    "compile": {"compile": {"_target_": "thunderhead.options.compile.Compile", "scope": "none"}},
    "schedule": {"scheduler": {"_target_": f"{__name__}.flat"}},
}


@pytest.mark.usefixtures("memory_is_counted")
@pytest.mark.parametrize("name", BARE)
def test_it_plans_and_trains(name: str, run: Callable[..., Path], with_nodes: Callable[[dict[str, Any]], None]) -> None:
    with_nodes(BARE[name])
    folder = run()
    assert read_mapping(folder / "plan.json")["steps"] == 2
    assert len([row for row in read_rows(folder / "metrics.csv")[1] if row["train/loss"]]) == 2
