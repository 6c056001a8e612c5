"""Overrides of a recorded configuration, and sweeps that are repeated."""

import shlex
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

import awkward
from thunderhead import command_line
from thunderhead.core import config
from thunderhead.core.config import ConfigError, Problem


def test_overrides_of_a_recorded_configuration() -> None:
    recorded = config.plain(config.compose([]))
    changed = command_line.with_overrides(recorded, ["budget.steps=7", "+new=3"])
    assert changed["budget"]["steps"] == 7
    assert changed["new"] == 3
    assert changed["model"] == recorded["model"]
    assert recorded["budget"]["steps"] != 7  # left alone


def test_overrides_that_a_recorded_configuration_cannot_take() -> None:
    recorded = config.plain(config.compose([]))
    with pytest.raises(ConfigError) as refused:
        command_line.with_overrides(recorded, ["attention=mha", "budget.step=7"])
    first, second = refused.value.problems
    assert first == Problem("attention", "a resumed run keeps its recorded attention; single values may change")
    assert second == Problem("budget.step", "is unknown; did you mean budget.steps?")


def test_some_groups_of_a_recorded_configuration_may_be_switched() -> None:
    overrides = ["strategy.replicate_size=4", "strategy=hsdp", "budget.steps=7"]
    composed = config.plain(config.compose(overrides))
    recorded = config.plain(config.compose(["strategy=ddp"]))
    switched = {"strategy": composed["strategy"]}
    assert command_line.chosen(overrides) == {"strategy", "strategy.replicate_size", "budget.steps"}
    changed = command_line.with_overrides(recorded, overrides, ["strategy=ddp"], switched)
    assert changed == recorded | switched | {"budget": recorded["budget"] | {"steps": 7}}
    assert changed["strategy"]["replicate_size"] == 4
    back = command_line.with_overrides(changed, ["strategy=ddp"], ["strategy=ddp"], {"strategy": recorded["strategy"]})
    assert back["strategy"] == recorded["strategy"]  # the newest choice holds, not the first


@given(st.lists(awkward.TEXT, max_size=3))
def test_a_shown_command_is_what_a_shell_reads(texts: list[str]) -> None:
    arguments = [f"resume={config.quoted(text)}" for text in texts] + texts
    shown = command_line.shown("train.py", *arguments)
    assert shlex.split(shown) == ["python", "train.py", *arguments]
    read = subprocess.run(["bash", "-c", f"printf '%s\\0' {shown}"], capture_output=True, check=True).stdout.decode()
    assert read.split("\0")[:-1] == ["python", "train.py", *arguments]
