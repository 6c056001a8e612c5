"""`profile=true`: a table, and a trace that says what ran in the recorded steps."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from thunderhead.training.callbacks import profile as profiling
from thunderhead.training.callbacks.profile import ProfileSteps

# Lightning's profiler hooks and ours may both be there; kineto warns where a machine has no GPU events.
pytestmark = pytest.mark.filterwarnings("ignore:.*Profiler.*:UserWarning")


@pytest.mark.parametrize(("steps", "recorded"), [(10, 3), (2, 2)])
def test_some_steps_are_recorded(
    steps: int, recorded: int, run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    # 128 tokens are 4 sequences: 2 micro-batches of 2 a step
    folder = run("profile=true", f"budget.steps={steps}", "optimizer=adamw") / "profile"
    said = capsys.readouterr().out
    (trace,) = folder.glob("rank0.*.pt.trace.json")
    events = json.loads(trace.read_text())["traceEvents"]
    count = sum(event.get("name", "").startswith("Optimizer.step#") for event in events)
    assert count == recorded
    embedded = sum(event.get("name") == "aten::embedding" for event in events)
    assert embedded >= 2 * recorded
    assert "aten::mm" in (folder / "table.txt").read_text()
    assert "aten::mm" in said
    assert "ui.perfetto.dev" in said


def test_nothing_is_recorded_unasked(run: Callable[..., Path]) -> None:
    assert not (run() / "profile").exists()


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its operators have no time on the GPU."""
    asked: list[ProfilerActivity] = []

    def begin(self: Any, *arguments: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            hook(self, *arguments)

    def profile_here(*, activities: Sequence[ProfilerActivity], **settings: Any) -> profile:
        asked.extend(activities)
        return profile(activities=[ProfilerActivity.CPU], **settings)  # this machine may have none

    hook = ProfileSteps.on_train_batch_start
    monkeypatch.setattr(ProfileSteps, "on_train_batch_start", begin)
    monkeypatch.setattr(profiling, "profile", profile_here)
    folder = run("profile=true") / "profile"
    assert asked == [ProfilerActivity.CPU]
    assert "aten::mm" in (folder / "table.txt").read_text()
    assert "aten::mm" in capsys.readouterr().out
