"""`resume=<run folder>` goes on as if nothing had happened."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from ranks import Case, train_in_processes
from thunderhead import command_line
from thunderhead.core import config
from thunderhead.core.config import read_mapping
from thunderhead.core.model_spec import GROUPS
from thunderhead.lab.analysis import analyse
from thunderhead.lab.runs import read_runs
from thunderhead.training import record, run_folder
from thunderhead.training import resume as resuming
from thunderhead.training.record import read_rows, write_rows
from thunderhead.training.run import train
from tiny import tiny, train_here

SETTINGS = (
    "budget.steps=8",
    "batch.global_tokens=256",  # four micro-batches of 2 × 32 tokens
    "dropout=gpt2",
    "attention.dropout=0.1",
    "callbacks=default",
    "callbacks.checkpoint.every_n_train_steps=2",
    "validation.every=3",
)


def rows_of(run_dir: Path) -> list[tuple[str, str]]:
    """(step, loss) of each row in metrics.csv."""
    return [(row["step"], row["train/loss"]) for row in read_rows(run_dir / "metrics.csv")[1] if row["train/loss"]]


def validations_of(run_dir: Path) -> list[tuple[str, str]]:
    """(step, loss) of each validation in metrics.csv."""
    return [(row["step"], row["val/loss"]) for row in read_rows(run_dir / "metrics.csv")[1] if row["val/loss"]]


# A checkpoint of every validation, val-3.ckpt and so on.
KEEP_ALL = (
    "callbacks.best.filename='val-{step}'",
    "callbacks.best.save_top_k=-1",
    "+callbacks.best.auto_insert_metric_name=false",
)


def go_on(resume: str, *overrides: str, run_dir: Path | None = None) -> None:
    """`python train.py resume=… <overrides>` in this process."""
    switched = [override for override in overrides if override.startswith(resuming.SWITCHABLE)]
    with patch.object(command_line, "invocation_overrides", lambda: list(overrides)):
        train_here([f"resume={resume}", *switched], run_dir or Path("unused"))


@pytest.fixture
def losses(text_corpus: Path, shards_dir: Path, tmp_path: Path) -> Callable[..., list[tuple[str, str]]]:
    """Train under `name`, crash and resume if asked to; gives (step, loss) of each row in metrics.csv."""

    def train_as(name: str, *overrides: str, crash_after: int | None = None, resume_with: tuple[str, ...] = ()):
        run_dir = tmp_path / name
        run_dir.mkdir()
        lines = tiny(text_corpus, shards_dir, *SETTINGS, *overrides)
        if crash_after is None:
            train_here(lines, run_dir)
        else:
            crash = f"+callbacks.crash={{_target_: crash.Crash, after: {crash_after}}}"
            with pytest.raises(KeyError, match="pulled the plug"):
                train_here([*lines, crash], run_dir)
            # the plug is pulled once
            go_on(str(run_dir), *resume_with, "callbacks.crash.after=1000")
        return rows_of(run_dir)

    return train_as


@pytest.mark.parametrize(
    ("crash_after", "overrides"),  # at a checkpoint, or one step later
    [
        pytest.param(4, (), marks=pytest.mark.slow),
        (5, ()),
        (5, ("precision=bf16-mixed", "optimizer=muon", "data.num_workers=1")),
        (5, ("data=mixture", "dropout=none")),
    ],
    ids=["default-4", "default-5", "bf16 with workers-5", "mixture-5"],
)
def test_bitwise_equal(crash_after: int, overrides: tuple[str, ...], losses: Callable[..., list[tuple[str, str]]],
                       tmp_path: Path) -> None:  # fmt: skip
    whole = losses("whole", *overrides)
    resumed = losses("resumed", *overrides, crash_after=crash_after)
    assert len(whole) == 8
    assert resumed == whole
    weights = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "resumed")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_with_another_micro_batch(losses: Callable[..., list[tuple[str, str]]]) -> None:
    without_dropout = ("dropout=none", "attention.dropout=0.0")
    whole = losses("whole", *without_dropout)
    resumed = losses("resumed", *without_dropout, crash_after=5, resume_with=("batch.micro_size=1",))
    assert [step for step, _ in resumed] == [step for step, _ in whole]
    # the same sequences in other micro-batches: sums in another order
    torch.testing.assert_close(
        torch.tensor([float(loss) for _, loss in resumed]), torch.tensor([float(loss) for _, loss in whole])
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's
@pytest.mark.usefixtures("fresh_compiler")
def test_how_it_is_computed_may_change(run: Callable[..., Path], tmp_path: Path) -> None:
    """Strategy, compilation and activation checkpointing; tests/integration/test_strategies.py has several devices."""
    folder = run(*SETTINGS)
    whole = rows_of(folder)
    how = ("strategy=fsdp", "strategy.reshard_after_forward=false", "activation_checkpointing=block")
    for overrides in (how, ("compile=block", "compile.backend=aot_eager", "strategy=single"), ("compile=none",)):
        (folder / "summary.json").unlink()
        go_on(str(folder / "checkpoints" / "step-6.ckpt"), *overrides)
        assert [step for step, _ in rows_of(folder)] == [step for step, _ in whole]
        losses = [float(loss) for _, loss in rows_of(folder)]
        assert losses == pytest.approx([float(loss) for _, loss in whole], rel=1e-5)
    recorded = OmegaConf.load(folder / "config.yaml")
    assert recorded.strategy == {"_target_": "thunderhead.parallel.strategies.single"}
    assert recorded.activation_checkpointing.every == 1
    assert recorded.compile.scope == "none"
    with pytest.raises(config.ConfigError, match=r"compile\.scope: compile=model cannot trace"):
        go_on(str(folder / "checkpoints" / "step-6.ckpt"), "strategy=fsdp", "compile=model")


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("".join(f"{group}: {{}}\n" for group in (*GROUPS, "data", "trainer")))
    with pytest.raises(config.ConfigError, match=r"has no checkpoints/\*\.ckpt to go on from"):
        train_here([f"resume={tmp_path}"], tmp_path / "unused")


def flip(file: Path) -> None:
    """Flip one bit of the weights, in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    """Cut off the last tenth."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 9 // 10])


@pytest.mark.parametrize("damage", [flip, truncate])
def test_a_damaged_checkpoint_is_passed_over(
    damage: Callable[[Path], None], losses: Callable[..., list[tuple[str, str]]], run: Callable[..., Path],
    capsys: pytest.CaptureFixture[str], tell: Callable[..., None],
) -> None:  # fmt: skip
    folder = run(*SETTINGS)
    whole = rows_of(folder)
    checkpoints = folder / "checkpoints"
    assert {file.name for file in checkpoints.iterdir()} == {"step-6.ckpt", "step-8.ckpt", "best.ckpt", "last.ckpt"}
    (checkpoints / "best.ckpt").unlink()
    (folder / "summary.json").unlink()  # as if it had been stopped after its last checkpoint
    damage(checkpoints / "last.ckpt")
    damage(checkpoints / "step-8.ckpt")
    capsys.readouterr()
    go_on(str(folder))
    said = capsys.readouterr().out
    for name in ("last.ckpt", "step-8.ckpt"):
        (line,) = (line for line in said.splitlines() if f"{name} is damaged and passed over (" in line)
    tell(saw=line, tokens_lost=128 * (8 - 6))
    assert "Going on from" in said
    assert "step-6.ckpt" in said
    assert rows_of(folder) == whole
    for file in checkpoints.glob("*.ckpt"):
        assert resuming.damage(file) is None  # the damaged ones were written again

    for file in checkpoints.glob("*.ckpt"):
        damage(file)
    with pytest.raises(config.ConfigError, match=r"last\.ckpt is damaged and passed over .*; .*step-6\.ckpt"):
        go_on(str(folder))
    with pytest.raises(config.ConfigError, match=r"resume: .*last\.ckpt is damaged"):
        go_on(str(checkpoints / "last.ckpt"))


@pytest.mark.parametrize("name", ["config.yaml", "environment.json"])
def test_a_damaged_record_is_refused(name: str, run: Callable[..., Path]) -> None:
    folder = run("callbacks=default")
    cut_off, is_cut, _ = (folder / name).read_bytes().partition(b"optimizer:\n")  # where what is left is YAML
    for content in (b"a: [", b"\xff\xfe", b"[1]", *([cut_off] if is_cut else [])):
        (folder / name).write_bytes(content)
        with pytest.raises(config.ConfigError, match=rf"^resume: \S+{name} is damaged \(.*\): copy it from a backup"):
            go_on(str(folder))


def test_any_checkpoint_can_be_gone_on_from(run: Callable[..., Path]) -> None:
    folder = run(*SETTINGS)
    whole = rows_of(folder)
    for name in ("step-6.ckpt", "best.ckpt"):  # best.ckpt is saved in the middle of a validation
        (folder / "summary.json").unlink()
        shutil.copy(folder / "checkpoints" / name, folder / "checkpoints" / "chosen.ckpt")
        go_on(str(folder / "checkpoints" / "chosen.ckpt"))
        assert rows_of(folder) == whole


@pytest.mark.parametrize("killed", ["before the validation", "after the validation", "before the summary"])
def test_no_validation_is_left_out_or_made_twice(killed: str, run: Callable[..., Path]) -> None:
    folder = run(*SETTINGS)
    whole, validations = rows_of(folder), validations_of(folder)
    assert [step for step, _ in validations] == ["3", "6", "8"]
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    lowest = min(validations, key=lambda row: float(row[1]))
    assert str(best["global_step"]) == lowest[0] == "8"  # the last, which comes after training
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    (folder / "summary.json").unlink()
    checkpoint = folder / "checkpoints" / ("last.ckpt" if killed == "before the summary" else "step-6.ckpt")
    if killed == "before the validation":
        columns, rows = read_rows(folder / "metrics.csv")  # the row of step 6 is still open
        write_rows(folder / "metrics.csv", columns, [row for row in rows if int(row["step"]) < 6])
        (folder / "checkpoints" / "best.ckpt").unlink()
    go_on(str(checkpoint))
    assert rows_of(folder) == whole
    assert validations_of(folder) == validations
    again = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(again[key], value) for key, value in last["state_dict"].items())
    assert torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["global_step"] == best["global_step"]


def test_auto_is_the_last_unfinished_run(
    text_corpus: Path, shards_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "logs" / "runs" / "name"
    # a choice of a group, and a value: the same command line starts and goes on
    command = [*tiny(text_corpus, shards_dir, *SETTINGS, "optimizer.lr=1.0e-3"), "resume=auto"]

    def start(time: str, *more: str) -> str:
        (runs / time).mkdir(parents=True)
        capsys.readouterr()
        lines = [*command, *more]
        with patch.object(command_line, "invocation_overrides", lambda: lines):
            train_here(lines, runs / time)
        return capsys.readouterr().out

    crash = "+callbacks.crash={_target_: crash.Crash, after: 5}"
    with pytest.raises(KeyError, match="pulled the plug"):
        start("2026-01-01", crash)
    with pytest.raises(KeyError, match="pulled the plug"):
        start("2026-01-02", crash)  # goes on with the first, and crashes again
    assert not (runs / "2026-01-02").exists()
    said = start("2026-01-03", crash, "callbacks.crash.after=1000")
    assert f"Going on from {runs}/2026-01-01/checkpoints/last.ckpt" in said
    assert [folder.name for folder in runs.iterdir()] == ["2026-01-01"]
    said = start("2026-01-04")
    assert "no unfinished run in" in said
    assert "starting anew" in said
    assert rows_of(runs / "2026-01-04") == rows_of(runs / "2026-01-01")

    (runs / "2026-01-04" / "summary.json").unlink()
    with (
        run_folder.held(runs / "2026-01-04"),
        pytest.raises(config.ConfigError, match="still being trained by another"),
    ):
        start("2026-01-05")
    with pytest.raises(config.ConfigError, match="optimizer: a resumed run keeps its recorded optimizer"):
        start("2026-01-06", "optimizer=adamw")


def test_the_order_must_stay(run: Callable[..., Path]) -> None:
    folder = run(*SETTINGS)
    (folder / "summary.json").unlink()
    with pytest.raises(config.ConfigError, match=r"resume: data\.shuffle_window changed since the checkpoint"):
        go_on(str(folder / "checkpoints" / "step-6.ckpt"), "data.shuffle_window=7")


def test_a_launched_rank_goes_on_from_the_checkpoint_it_is_given(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(*SETTINGS)
    whole = rows_of(folder)
    checkpoint = folder / "checkpoints" / "step-6.ckpt"
    flip(folder / "checkpoints" / "last.ckpt")  # the launching process has looked, ranks do not
    monkeypatch.setenv("THUNDERHEAD_LAUNCHED", "1")
    job = OmegaConf.create((folder / "config.yaml").read_text())
    job.resume = str(checkpoint)
    (folder / "summary.json").unlink()
    train(job, folder)
    assert rows_of(folder) == whole
    assert (folder / "summary.json").exists()


def test_a_validation_made_up_for_is_made_once(run: Callable[..., Path]) -> None:
    """A checkpoint is written in the middle of it, and may be what the next start goes on from."""
    folder = run(*SETTINGS, "data.max_validation_bytes=6000", *KEEP_ALL)
    whole, validations = rows_of(folder), validations_of(folder)
    for name in ("step-6.ckpt", "val-6.ckpt"):
        (folder / "summary.json").unlink()
        if name == "step-6.ckpt":
            (folder / "checkpoints" / "val-6.ckpt").unlink()
        go_on(str(folder / "checkpoints" / name))
        assert rows_of(folder) == whole
        assert validations_of(folder) == validations


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a run, but the lock."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


REFUSED = {
    "data.shuffle_window=7": r"resume: data\.shuffle_window changed since the checkpoint",
    "data.max_validation_bytes=null": r"data\.max_validation_bytes: changed since the checkpoint \(256 → null\)",
    "data.max_validation_tokens=999": r"data\.max_validation_tokens: changed since the checkpoint \(null → 999\)",
    "model.n_layers=3": r"resume: the weights do not fit.* changed since the checkpoint: model\.n_layers=3 \(was 2\)",
    "parameter_groups.decay_embeddings=false": r"parameter_groups\.decay_embeddings: changed .*\(true → false\)",
    "optimizer._target_=torch.optim.Adam": r"optimizer\._target_: changed since the checkpoint",
    "optimizer.amsgrad=true": r"optimizer\.amsgrad: changed since the checkpoint",
    "batch.global_tokens=512": r"batch\.global_tokens: changed since the checkpoint \(256 → 512\)",
    "budget.steps=5": r"budget: .* 5 steps, and the checkpoint has made 6",
}


def test_a_refused_resume_leaves_the_run_as_it_was(run: Callable[..., Path], shards_dir: Path) -> None:
    """Whenever the refusal comes: what is recorded next is what the next start goes on with."""
    folder = run(*SETTINGS, "validation.every=5")
    whole = rows_of(folder)
    (folder / "summary.json").unlink()
    before = contents(folder)
    checkpoint = str(folder / "checkpoints" / "step-6.ckpt")
    for setting, message in REFUSED.items():
        with pytest.raises(config.ConfigError, match=message):
            go_on(checkpoint, setting)
        assert contents(folder) == before, setting

    chunks = {file: file.read_bytes() for file in shards_dir.rglob("train/*.bin")}
    for file, content in chunks.items():
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:  # found when the first batch is read
        with pytest.raises(config.ConfigError, match="holds other bytes than were written"):
            go_on(checkpoint, "generation.max_new_tokens=7")
    finally:
        for file, content in chunks.items():
            file.write_bytes(content)
    assert contents(folder) == before

    go_on(checkpoint)
    assert rows_of(folder) == whole
    left = {f"checkpoints/abandoned/{name}.ckpt" for name in ("step-8", "last", "best")}  # of the branch before
    assert {name for name in contents(folder) if name not in before} == {"summary.json", *left}


def test_a_refused_resume_leaves_no_file_of_tensorboard(run: Callable[..., Path]) -> None:
    """Which Lightning lets it begin before the checkpoint is looked at."""
    folder = run(*SETTINGS, "logger=default")
    (folder / "summary.json").unlink()
    before = contents(folder)
    with pytest.raises(config.ConfigError, match=r"data\.shuffle_window"):
        go_on(str(folder / "checkpoints" / "step-6.ckpt"), "data.shuffle_window=7")
    assert contents(folder) == before


def settings_of(checkpoint: Path) -> tuple[list[dict[str, Any]], list[float]]:
    """Settings of the optimizer's groups in a checkpoint, and the schedule's peak learning rates."""
    content = torch.load(checkpoint, weights_only=True)
    groups = content["optimizer_states"][0]["param_groups"]
    keys = ("name", "lr", "initial_lr", "betas", "weight_decay", "eps", "momentum", "lr_multiplier")
    plain = [{k: tuple(g[k]) if isinstance(g[k], list) else g[k] for k in keys if k in g} for g in groups]
    return plain, content["lr_schedulers"][0]["base_lrs"]


# What can be changed on resuming; all must be as in a run that had it from the start, when nothing else is.
CHANGED = {
    "adamw": ("optimizer.lr=0.005", "optimizer.weight_decay=0.3", "optimizer.betas=[0.8,0.7]"),
    "muon": ("optimizer.lr=0.005", "optimizer.momentum=0.8", "optimizer.adamw_betas=[0.8,0.7]"),
    "adafactor": ("optimizer.lr=0.005", "optimizer.beta2_decay=-0.7"),
    "lion": ("optimizer.lr=0.0005", "optimizer.betas=[0.8,0.7]"),
    "sgd": ("optimizer.lr=0.2", "optimizer.momentum=0.5"),
}


SLOW = pytest.mark.slow
CASES = [pytest.param(name, marks=[SLOW] if name in ("adafactor", "lion", "sgd") else []) for name in CHANGED]


@pytest.mark.parametrize("optimizer", CASES)
def test_changed_settings_of_the_optimizer_take_effect(
    optimizer: str, run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """From the first step after the checkpoint on, with the schedule's peak and shape."""
    changed = (*CHANGED[optimizer], "scheduler.final_ratio=0.3")
    mup = ("parametrization=mup", "parametrization.base_d_model=16") if optimizer in ("adamw", "muon", "lion") else ()
    settings = (*SETTINGS, f"optimizer={optimizer}", "validation.every=8", *mup)
    other = run(*settings, *changed)
    folder = run(*settings)
    before = rows_of(folder)
    (folder / "summary.json").unlink()
    capsys.readouterr()
    go_on(str(folder / "checkpoints" / "step-6.ckpt"), *changed)
    said = capsys.readouterr().out
    for setting in changed:
        path, _, value = setting.partition("=")
        assert f"{path}={value.replace(',', ', ')} (was " in said
    assert settings_of(folder / "checkpoints" / "last.ckpt") == settings_of(other / "checkpoints" / "last.ckpt")
    rates = [[row["lr"] for row in read_rows(f / "metrics.csv")[1] if row["lr"]] for f in (folder, other)]
    assert rates[0][6:] == rates[1][6:]
    assert rates[0][:6] != rates[1][:6]
    assert rows_of(folder)[:7] == before[:7]  # a step's loss is from before it
    assert rows_of(folder)[7:] != before[7:]


@pytest.mark.slow
def test_changed_settings_take_effect_when_sharded(
    text_corpus: Path, shards_dir: Path, run: Callable[..., Path], tmp_path: Path
) -> None:
    """Strategies on a mesh load the optimizer's state in a way of their own."""
    first = (*SETTINGS, "budget.steps=4", "validation.every=4", "dropout=none", "attention.dropout=0.0")
    changed = (*CHANGED["adamw"], "budget.steps=8")
    whole = run(*first)
    cases = []
    for strategy in ("fsdp", "tensor_parallel"):
        lines = tiny(text_corpus, shards_dir, *first, f"strategy={strategy}", "trainer.devices=2")
        cases += [Case(tmp_path / strategy, lines)]
        cases += [Case(tmp_path / "unused", [f"resume={tmp_path / strategy}", *changed])]
    assert [result.get("error") for result in train_in_processes(2, cases, tmp_path / "work")] == [None] * 4
    go_on(str(whole), *changed)
    expected = settings_of(whole / "checkpoints" / "last.ckpt")
    for strategy in ("fsdp", "tensor_parallel"):
        assert settings_of(tmp_path / strategy / "checkpoints" / "last.ckpt") == expected
        losses = [torch.tensor([float(loss) for _, loss in rows_of(f)]) for f in (tmp_path / strategy, whole)]
        torch.testing.assert_close(*losses)


def test_going_on_from_an_earlier_checkpoint_leaves_the_branch(run: Callable[..., Path]) -> None:
    """Later checkpoints are set aside, and `resume=<run>` goes on with the new branch, not with the longer one."""
    folder = run(*SETTINGS)
    go_on(str(folder / "checkpoints" / "step-6.ckpt"), "budget.steps=7", "optimizer.lr=0.02")
    aside = folder / "checkpoints" / "abandoned"
    left = {file.name: file.read_bytes() for file in aside.iterdir()}
    assert left.keys() >= {"step-8.ckpt", "last.ckpt"}
    newest = resuming.find(str(folder), folder).checkpoint
    assert newest is not None
    assert torch.load(newest, weights_only=True)["global_step"] == 7
    go_on(str(folder), "budget.steps=9")
    assert [int(row["step"]) for row in read_rows(folder / "metrics.csv")[1]] == [*range(1, 10)]
    assert read_mapping(folder / "summary.json")["steps"] == 9

    with pytest.raises(config.ConfigError, match=r"is of a branch that was left: move it to .*checkpoints, and go on"):
        go_on(str(aside / "last.ckpt"))
    go_on(str(folder / "checkpoints" / "step-6.ckpt"))  # a third branch: the first is still there
    assert left.items() <= {file.name: file.read_bytes() for file in aside.iterdir()}.items()
    assert torch.load(aside / "last-2.ckpt", weights_only=True)["global_step"] == 9


@pytest.mark.parametrize("axis", ["tokens", "steps"])
def test_tensorboard_shows_one_branch(axis: str, run: Callable[..., Path]) -> None:
    """Each step once; what the first branch alone logged is gone, what came before it stays."""
    folder = run(*SETTINGS, "logger=default", f"logger.tensorboard.axis={axis}")
    go_on(str(folder / "checkpoints" / "step-6.ckpt"), "budget.steps=7", "optimizer.lr=0.02")
    found: dict[str, list[int]] = {}
    files = folder.glob("events.out.tfevents.*.*.*.*")  # time.host.process.number: two of one second go by number
    for file in sorted(files, key=lambda file: [int(part) for part in file.name.split(".") if part.isdigit()]):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(event.step)
    at = 256 if axis == "tokens" else 1
    assert found["loss/train"] == [at * step for step in range(1, 8)]
    assert found["loss/val"] == [at * step for step in (3, 6, 7)]
    assert found["sample/text_summary"] == [at * 7]
    assert found["training/schedule"] == [0, at * 6]
    once = {tag for tag, steps in found.items() if max(steps) <= at * 7 and len(steps) == len({*steps})}
    assert {tag for tag in found.keys() - once if not tag.startswith("_hparams_")} == {"choices/text_summary"}


@pytest.mark.parametrize("how", ["relative", "moved", "with other settings"])
def test_checkpoints_are_known_again(
    how: str, run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best one stays the best, and the oldest goes when there is a newer one."""
    folder = run(*SETTINGS, "budget.steps=6")
    checkpoints = folder / "checkpoints"
    best = torch.load(checkpoints / "best.ckpt", weights_only=True)
    assert {file.name for file in checkpoints.iterdir()} == {"step-4.ckpt", "step-6.ckpt", "best.ckpt", "last.ckpt"}
    monkeypatch.chdir(tmp_path)
    given, changed = str(folder.relative_to(tmp_path)), ["budget.steps=8"]
    if how == "moved":
        folder.rename(tmp_path / "elsewhere")
        folder = tmp_path / "elsewhere"
        given = str(folder)
    elif how == "with other settings":
        changed.append("callbacks.checkpoint.every_n_train_steps=1")
    # with this learning rate nothing gets better any more
    go_on(given, *changed, "optimizer.lr=10.0")
    now = {file.name: file for file in (folder / "checkpoints").iterdir()}
    newest = "step-7.ckpt" if how == "with other settings" else "step-6.ckpt"
    assert set(now) == {newest, "step-8.ckpt", "best.ckpt", "last.ckpt"}
    assert torch.load(now["best.ckpt"], weights_only=True)["global_step"] == best["global_step"]
    states = torch.load(now["last.ckpt"], weights_only=True)["callbacks"].values()
    assert {Path(s["dirpath"]) for s in states if "best_k_models" in s} == {folder / "checkpoints"}
    files = [file for s in states for file in [*s.get("best_k_models", {}), s.get("best_model_path")] if file]
    assert all(Path(file).exists() for file in files)


@pytest.mark.parametrize("became", ["is gone", "has changed"])
def test_shards_suffice_to_go_on(
    became: str, text_corpus: Path, shards_dir: Path, losses: Callable[..., list[tuple[str, str]]], tmp_path: Path
) -> None:
    """The text may be gone from a cluster's scratch, or go on growing: the run keeps the tokens it began with."""
    corpus = tmp_path / "text"
    shutil.copytree(text_corpus, corpus)
    whole, folder = losses("run", f"data.path={corpus}"), tmp_path / "run"
    if became == "is gone":
        shutil.rmtree(corpus)
    else:
        (corpus / "more.txt").write_text("And then there was more. " * 400, encoding="utf-8")
    made = {folder.name for folder in shards_dir.iterdir()}
    go_on(str(folder / "checkpoints" / "step-6.ckpt"))
    assert rows_of(folder) == whole
    assert {folder.name for folder in shards_dir.iterdir()} == made
    with pytest.raises(config.ConfigError, match=r"data\.sources" if became == "is gone" else "training data"):
        go_on(str(folder), "budget.steps=9", "data.validation_fraction=0.3")  # asks for other shards


@pytest.mark.parametrize("content", ["step,tokens,tokens\n", None], ids=["edited", "removed"])
def test_who_touches_metrics_csv_meanwhile_costs_no_results(
    content: str | None, text_corpus: Path, shards_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit = f"+callbacks.edit={{_target_: crash.Edit, after: 4, content: '{content or ''}'}}"
    train_here(tiny(text_corpus, shards_dir, *SETTINGS, edit), tmp_path)
    assert read_mapping(tmp_path / "summary.json")["steps"] == 8
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
    if content is None:
        assert [step for step, _ in rows_of(tmp_path)] == ["4", "5", "6", "7", "8"]
    else:
        assert "metrics.csv is damaged (line 1: two columns are called tokens)" in capsys.readouterr().err


def test_changed_settings_outside_of_the_model_are_told(run: Callable[..., Path]) -> None:
    folder = run(*SETTINGS)
    (folder / "summary.json").unlink()
    changed = (
        "trainer.gradient_clip_val=0.25",
        "precision.kind=bf16-mixed",
        "callbacks.checkpoint.every_n_train_steps=4",
    )
    go_on(str(folder / "checkpoints" / "step-6.ckpt"), *changed)
    told = record.changes(folder)
    assert "trainer.gradient_clip_val=0.25 (was 1.0)" in told
    assert "precision.kind=bf16-mixed (was fp32)" in told
    assert not any("every_n_train_steps" in change for change in told)


def test_what_a_run_went_on_with_is_kept_and_told(run: Callable[..., Path]) -> None:
    """A prolonged run saw another schedule than the arm's others; it belongs to the arm, and the report says so."""
    folders = [run("callbacks=default", f"seed={seed}", f"budget.steps={steps}") for seed, steps in ((1, 4), (2, 2))]
    go_on(str(folders[1]), "budget.steps=4")
    assert [record.changes(folder) for folder in folders] == [[], ["steps=4 (was 2)"]]
    found = analyse(read_runs(folders))
    assert [sorted(arm.runs) for arm in found.arms] == [[1, 2]]
    (told,) = [warning for warning in found.warnings if "went on with other settings" in warning]
    assert "seed 2" in told
    go_on(str(folders[1]), "budget.steps=6", "activation_checkpointing=block")  # the latter changes no loss
    assert record.changes(folders[1]) == ["steps=4 (was 2)", "steps=6 (was 4)"]
    assert read_mapping(folders[1] / "config.yaml")["data"]["shards_key"] is None
