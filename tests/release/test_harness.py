"""`evaluate.py tasks=[…]`: the harness says the same of a run, of its export, and by its own way to transformers."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.release.command import load
from thunderhead.release.evaluate import evaluate
from thunderhead.release.harness import HarnessModel

TASKS = ["tiny_choose", "tiny_read", "tiny_write"]
WORDS = "an other text, é, of words that are longer than the context of the model is"
# the harness and datasets open files that they leave to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, exported: Path) -> Path:
    """The task files beside this one, with data: what a right answer of writing is, the harness itself has written."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = [WORDS[:n] for n in (3, 9, 20, 31, len(WORDS))]
    theirs = HFLM(pretrained=str(exported), device="cpu", batch_size=1)
    asked = [(q, {"until": ["e"], "max_gen_toks": 12, "do_sample": False}) for q in questions]
    written = theirs.generate_until([Instance("generate_until", {}, each, 0) for each in asked], disable_tqdm=True)
    lines = [
        {"question": q, "choices": [" a", " " + WORDS * n, "é!"], "answer": n % 3, "text": q * (n + 1), "written": w}
        for n, (q, w) in enumerate(zip(questions, written, strict=True))
    ]
    for line in lines:
        line["choices"] = [choice[:30] or "." for choice in line["choices"]]
    (folder / "choose.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for file in (Path(__file__).parent / "tasks").glob("*.yaml"):
        text = file.read_text().replace("DATA", str(folder)).replace("CACHE", str(folder / "cache"))
        (folder / file.name).write_text(text)
    return folder


def scores(place: Path, tasks: Path, *more: str) -> dict[str, dict[str, float]]:
    asked = [f"run={place}", f"tasks=[{','.join(TASKS)}]", f"tasks_path={tasks}", "accelerator=cpu", *more]
    return evaluate(config.compose(asked, "evaluate"))


def test_tasks_of_a_run_and_of_its_export(exported: Path, tasks: Path) -> None:
    """Alone and in batches, of texts of several lengths, beyond the context; and kept in the run's summary."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    model = HFLM(pretrained=str(exported), device="cpu", batch_size=1)
    oracle = simple_evaluate(model, tasks=TASKS, task_manager=manager, log_samples=False, bootstrap_iters=0)["results"]
    run = scores(exported.parent, tasks, "batch_size=3")
    export = scores(exported, tasks, "batch_size=1")
    for task in TASKS:
        expected = {name.removesuffix(",none"): value for name, value in oracle[task].items()}
        for name, value in run[task].items():
            if "_stderr" not in name:
                assert value == pytest.approx(expected[name], rel=1e-5), (task, name)
                assert value == pytest.approx(export[task][name], rel=1e-5), (task, name)
    assert run["tiny_write"]["exact_match"] == 1
    assert json.loads((exported.parent / "summary.json").read_text())["tasks"] == {"last": run}


def test_tensorboard_has_the_scores_of_tasks_at_the_end_of_the_run(exported: Path, tasks: Path, tmp_path: Path) -> None:
    run = shutil.copytree(exported.parent, tmp_path / "run", ignore=shutil.ignore_patterns("huggingface", "shards"))
    scores(run, tasks)
    assert not list(run.glob("events*"))  # it writes for nobody else
    with SummaryWriter(str(run)) as training:
        training.add_scalar("loss/val", 3.0, 2)
    for _ in range(2):  # the second replaces the first
        found = scores(run, tasks)
    scores(run, tasks, "checkpoint=best")
    events = EventAccumulator(str(run)).Reload()
    wanted = {f"metric/val/{task}_{n}": v for task in TASKS for n, v in found[task].items() if "stderr" not in n}
    wanted = {name: value for name, value in wanted.items() if "sample_" not in name}
    assert {*events.Tags()["scalars"]} == {"loss/val", *wanted, *(f"{name} (best)" for name in wanted)}
    for name, value in wanted.items():
        [point] = events.Scalars(name)
        assert (point.step, point.value) == (2, pytest.approx(value))


def test_log_probabilities_are_those_of_the_harness(exported: Path) -> None:
    """One by one, of each kind of request."""
    theirs = HFLM(pretrained=str(exported), device="cpu", batch_size=1)
    settings = {"accelerator": "cpu", "run": str(exported.parent), "checkpoint": "last", "averaged": False, "trust": []}
    ours = HarnessModel(load(settings), batch_size=2)
    pairs = [("", "an"), ("an ", "other"), (WORDS, " and more"), ("é", WORDS[:20]), ("an", "")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    for (x, is_x), (y, is_y) in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests[:4]), strict=False):
        assert x == pytest.approx(y, rel=1e-5)
        assert is_x == is_y
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("an", WORDS, WORDS * 3)]
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-5)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["tasks=[tiny_chose]"], r"tasks: tiny_chose is unknown; did you mean tiny_choose\?"),
        (["tasks=[tiny_read]", "tasks_path=nowhere"], r"tasks_path: nowhere is no folder"),
        (["limit=2"], r"data: has no sources of text.*\nlimit: is of tasks"),
        (["tasks=[tiny_read]", "limit=0"], r"limit: 0 is not accepted"),
    ],
)
def test_what_cannot_be_asked(
    asked: list[str], message: str, exported: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    monkeypatch.setattr("thunderhead.release.harness.TaskManager", lambda **_: manager)  # thousands of files else
    with pytest.raises(ConfigError, match=message):
        evaluate(config.compose([f"run={exported}", "accelerator=cpu", *asked], "evaluate"))


def without_data(tasks: Path) -> None:
    (tasks / "choose.jsonl").unlink()


def too_long(tasks: Path) -> None:
    line = {"question": "a", "choices": [WORDS * 9, "a"], "answer": 0, "text": "", "written": ""}
    (tasks / "choose.jsonl").write_text(json.dumps(line))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_data, r"tasks: cannot be evaluated: .*choose.jsonl"),
        (too_long, r"tasks: cannot be evaluated: a continuation of .* is longer than the model's context of 32"),
    ],
)
def test_a_task_that_fails_is_told(
    change: Callable[[Path], None], message: str, exported: Path, tasks: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tasks, tmp_path / "tasks", ignore=shutil.ignore_patterns("cache"))
    for file in copy.glob("*.yaml"):
        file.write_text(file.read_text().replace(str(tasks), str(copy)))
    change(copy)
    with pytest.raises(ConfigError, match=message):
        scores(exported, copy)


def test_without_the_harness(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("thunderhead.release.harness")
    monkeypatch.delitem(sys.modules, "thunderhead.release.harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"tasks: are those of lm-evaluation-harness: pip install 'lm-eval>=\S+'"):
        evaluate(config.compose([f"run={exported}", "tasks=[tiny_read]"], "evaluate"))
