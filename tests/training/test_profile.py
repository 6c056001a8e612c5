"""`profile=true`: a table, and a trace that says what ran in the recorded steps."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

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
