import pytest

from thunderhead.core.config import compose, plain
from thunderhead.core.model_spec import ModelSpec


class Power:
    """A schedule as a class."""

    def __init__(self, *, power: float = 1.0):
        self.power = power

    def __call__(self, step: int, total_steps: int) -> float:
        return float((1 - step / total_steps) ** self.power)


def of_steps(step: int) -> float:
    return 1.0


def spec(name: str, **settings: float) -> ModelSpec:
    config = plain(compose([]))
    return ModelSpec.of({**config, "scheduler": {"_target_": f"{__name__}.{name}", **settings}})


def test_a_schedule_may_be_a_class() -> None:
    assert spec("Power", power=2.0).schedule(1, 4) == 0.5625


@pytest.mark.parametrize("name", ["of_steps", "ModelSpec.of"])
def test_a_schedule_that_takes_others_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^scheduler: is called with step and total_steps"):
        spec(name)
