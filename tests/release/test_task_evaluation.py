"""callbacks=evaluation: tasks of lm-evaluation-harness at each validation."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.release.evaluate import evaluate
from thunderhead.training.record import read_summary, rows_of
from tiny import plan_of, tiny

# the harness and datasets open files that they leave to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A task file with its data."""
    made = tmp_path / "tasks"
    made.mkdir()
    lines = [{"question": "def f" * n, "choices": ["(x", " and", "é!"], "answer": n % 3} for n in range(1, 6)]
    (made / "choose.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = (Path(__file__).parent / "tasks" / "choose.yaml").read_text()
    (made / "choose.yaml").write_text(text.replace("DATA", str(made)).replace("CACHE", str(made / "cache")))
    return made


def test_tasks_are_metrics_of_each_validation(run: Callable[..., Path], folder: Path) -> None:
    """In rows and summary, as evaluate.py finds them; and nothing else of the run changes, dropout's draws included."""
    more = ("dropout=gpt2", "attention.dropout=0.1", "validation.every=1", "logger=csv")
    asked = ("callbacks.tasks.tasks=[tiny_choose]", f"callbacks.tasks.tasks_path={folder}")
    made, plain = run("callbacks=evaluation", *asked, *more), run("callbacks=default", *more)
    rows = [row for row in rows_of(made / "metrics.csv") if row["val/loss"]]
    assert len(rows) == 2
    summary, other = read_summary(made), read_summary(plain)
    assert summary is not None
    assert other is not None
    done = [f"run={made}", "tasks=[tiny_choose]", f"tasks_path={folder}", "accelerator=cpu"]
    found = evaluate(config.compose(done, "evaluate"))["tiny_choose"]
    for name in ("acc", "acc_norm"):
        assert summary["metrics"][f"tiny_choose_{name}"] == pytest.approx(found[name])
        assert float(rows[-1][f"val/tiny_choose_{name}"]) == pytest.approx(found[name])
        assert rows[0][f"val/tiny_choose_{name}"]
    assert not any("stderr" in name for name in summary["metrics"])
    assert summary["val_loss"] == other["val_loss"]
    kept = json.loads((made / "task_examples.json").read_text())
    assert kept["last"]["tiny_choose"]["steps"] == summary["steps"]
    scores = kept["last"]["tiny_choose"]["scores"]
    assert {name: sum(values) / 5 for name, values in scores.items()} == pytest.approx(
        {name: found[name] for name in ("acc", "acc_norm")}
    )
    lines = (folder / "choose.jsonl").read_text().splitlines(keepends=True)
    (folder / "choose.jsonl").write_text("".join([*lines[:4], lines[4].replace('"answer": 2', '"answer": 1')]))
    evaluate(config.compose([*done, "checkpoint=best"], "evaluate"))
    again = json.loads((made / "task_examples.json").read_text())
    assert again["last"] == kept["last"]
    assert again["best"]["tiny_choose"]["examples"] != kept["last"]["tiny_choose"]["examples"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ((), "callbacks.tasks.tasks: names no task"),
        (("callbacks.tasks.tasks=[tiny_chose]",), "callbacks.tasks.tasks: tiny_chose is unknown.*tiny_choose"),
        (("callbacks.tasks.tasks=[tiny_choose]", "callbacks.tasks.tasks_path=none"), "tasks_path: none is no folder"),
        (("callbacks.tasks.tasks=[tiny_choose]", "strategy=fsdp"), "callbacks: tasks are done by whole weights"),
    ],
)
def test_what_cannot_be_done_is_refused_before(
    changes: tuple[str, ...],
    message: str,
    text_corpus: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr("thunderhead.release.harness.TaskManager", lambda **_: manager)  # thousands of files else
    lines = tiny(text_corpus, tmp_path, "callbacks=evaluation", f"callbacks.tasks.tasks_path={folder}", *changes)
    with pytest.raises(ConfigError, match=message):
        plan_of(config.plain(config.compose(lines)))


def test_a_task_that_fails_is_found_before_training(run: Callable[..., Path], folder: Path, tmp_path: Path) -> None:
    """Its data is not what it says: the run ends before its first step."""
    (folder / "choose.jsonl").write_text('{"question": "x"}\n')
    asked = ("callbacks.tasks.tasks=[tiny_choose]", f"callbacks.tasks.tasks_path={folder}")
    with pytest.raises(ConfigError, match="tasks: cannot be evaluated"):
        run("callbacks=evaluation", *asked)
