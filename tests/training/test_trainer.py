"""What only Lightning's Trainer refuses is told while a run is planned."""

from collections.abc import Callable

import pytest
import torch

from thunderhead.core.config import ConfigError


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.gradient_clip_algorithm=text", "`gradient_clip_algorithm` text is invalid"),
        ("+trainer.max_time=soon", "not a valid duration"),
        ("+trainer.profiler=fast", "`profiler`"),
        ("+trainer.barebones=true", "log_every_n_steps=1"),
        ("+trainer.reload_dataloaders_every_n_epochs=-1", "should be an int >= 0"),
    ],
)
def test_a_dry_run_is_refused_what_the_trainer_refuses(override: str, words: str, run: Callable[..., object]) -> None:
    with pytest.raises(ConfigError) as refused:
        run("dry_run=true", override)
    (problem,) = refused.value.problems
    assert problem.message.startswith("trainer: ")
    assert words in problem.message


def test_planning_leaves_the_process_as_it_is(run: Callable[..., object]) -> None:
    run("dry_run=true", "trainer.deterministic=true", "+trainer.benchmark=true")
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
