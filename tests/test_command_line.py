"""Overrides of a recorded configuration, and sweeps that are repeated."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import awkward
import programs
from thunderhead import command_line
from thunderhead.core import config
from thunderhead.core.config import CONF_DIR, ConfigError, Problem

# Runs a program, and fails if it has imported what takes seconds.
LEAN = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(sorted(sys.modules.keys() & {"torch", "lightning", "transformers", "matplotlib", "numpy"}), file=sys.stderr)
"""
PROGRAMS = ("train", "prepare", "generate", "inspect_batch", "compare", "evaluate", "export")


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


def test_commas_make_a_list() -> None:
    arguments = ["compare.py", "runs=a,b", "runs=[a,b]", "baseline=x"]
    assert command_line.commas_to_list(arguments) == ["compare.py", "runs=[a,b]", "runs=[a,b]", "baseline=x"]


@pytest.mark.parametrize(
    ("program", "arguments", "status"),
    [
        *((program, ["--help"], 0) for program in PROGRAMS),
        ("train", ["--cfg", "job"], 0),
        ("train", ["attention=gqqa", "optimzer.lr=1"], 2),
        ("prepare", ["tokenizer=bpee"], 2),
        ("train", ["-sc", "install=bash"], 0),
    ],
)
def test_what_computes_nothing_imports_no_torch(program: str, arguments: list[str], status: int) -> None:
    command = [sys.executable, "-c", LEAN, f"{program}.py", *arguments]
    done = subprocess.run(command, cwd=CONF_DIR.parent, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    assert len(done.stdout) > 200 or status == 2


def test_an_empty_folder_of_a_run_is_removed_and_never_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    for folder in ("logs/runs/name/time", "logs/runs/other/time", "run"):
        (here / folder).mkdir(parents=True)
    (here / "logs/runs/other/kept").mkdir()
    for folder in ("logs/runs/name/time", "logs/runs/other/time", "run", ".", ".."):
        command_line.remove_if_empty(Path(folder))
    left = sorted(str(path.relative_to(here)) for path in here.rglob("*"))
    assert left == ["logs", "logs/runs", "logs/runs/other", "logs/runs/other/kept"]
    for folder in left[::-1]:
        (here / folder).rmdir()
    command_line.remove_if_empty(here / "run")
    assert here.is_dir()


@pytest.mark.parametrize("sweep", [(), ("seed=1", "-m", "seed=1,2")], ids=["job", "sweeper"])
def test_a_fault_of_the_program_is_no_refusal(sweep: tuple[str, ...], tmp_path: Path) -> None:
    """A TypeError of Hydra's while it composes is the user's, any other is ours: a traceback, and status 1."""
    (tmp_path / "faulty.py").write_text("def fault(cfg): len(3)")
    program = tmp_path / "program.py"
    program.write_text(
        "import hydra\nfrom thunderhead import command_line\n"
        "from thunderhead.lab import grid\n"
        "grid.run_grid = lambda *arguments, **settings: len(3)\n"
        f"@hydra.main(version_base='1.3', config_path={str(CONF_DIR)!r}, config_name='train')\n"
        "def main(cfg):\n    command_line.job('faulty.fault', cfg)\n"
        "command_line.run(main)\n"
    )
    places = [f"hydra.run.dir={tmp_path / 'run'}", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    command = [sys.executable, str(program), *places, *sweep]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" in done.stderr
    assert "TypeError: object of type 'int' has no len()" in done.stderr


def test_settings_of_launchers_and_sweepers_are_suggested_too() -> None:
    line = ("hydra/launcher=slurm", "hydra.launcher.n_job=2", "hydra.sweeper.basline=mha", "attention.windw=4")
    refused = programs.run("train.py", "-m", *line)
    assert refused.returncode == 2
    said = {line.strip() for line in refused.stderr.splitlines()}
    assert "hydra.launcher.n_job is unknown; did you mean hydra.launcher.n_jobs?" in said
    assert "hydra.sweeper.basline is unknown; did you mean hydra.sweeper.baseline?" in said
    assert any(line.startswith("attention.windw is unknown") for line in said)


@pytest.mark.parametrize("n_jobs", ["0", "many"])
def test_a_number_of_jobs_is_one(n_jobs: str) -> None:
    refused = programs.run("train.py", "-m", f"hydra.launcher.n_jobs={n_jobs}", "model=nano", "seed=1,2")
    assert refused.returncode == 2
    assert "hydra.launcher.n_jobs" in refused.stderr


@pytest.mark.parametrize(
    ("argument", "is_taken"),
    [
        ("attention=mha,gqa", True),
        ("-m", True),
        ("hydra/launcher=slurm", True),
        ("hydra.launcher.n_jobs=2", True),
        ("hydra.sweeper.reuse=logs/sweeps", True),
        ("hydra.sweeper.baseline='lr=0.001'", True),
        ("hydra.sweeper.objective=val/loss/code", True),
        ("hydra.sweeper.budgets=[1e8,2e8]", True),
        ("hydra.sweeper.sizes.d16.model.d_model=8", True),
        ("~hydra.sweeper.sizes.d64", True),
        ("hydra.launcher.setup=[rm -rf /]", False),
        ("hydra.sweeper.params.trust=[evil]", False),
        ("hydra.sweeper._target_=evil.Sweeper", False),
        ("hydra.sweeper.storage=${oc.env:SECRET}", False),
        ("norm._target_=evil.Norm", False),
        ("--config-dir=/tmp/evil", False),
        ("trust=[evil]", False),
    ],
)
def test_what_a_recorded_sweep_may_ask_for(argument: str, is_taken: bool) -> None:
    assert command_line.is_taken_from_a_record(argument) == is_taken


def test_misspelt_groups_of_hydra_are_suggested() -> None:
    refused = programs.run("train.py", "hydra/launchr=slurm", "hydra/swepers=grid", "attenton=mha")
    assert refused.returncode == 2
    for key, near in (
        ("hydra/launchr", "hydra/launcher"),
        ("hydra/swepers", "hydra/sweeper"),
        ("attenton", "attention"),
    ):
        assert f"{key} is unknown; did you mean {near}?" in refused.stderr


def test_what_a_class_takes_and_its_file_does_not_have_is_added() -> None:
    refused = programs.run("train.py", "optimizer=adamw", "optimizer.lrr=1", "trainer.benchmark=true")
    assert refused.returncode == 2
    assert "optimizer.lrr is unknown; did you mean optimizer.lr?" in refused.stderr
    assert "trainer.benchmark" in refused.stderr
    assert "+trainer.benchmark=true" in refused.stderr


def test_a_planned_or_refused_sweep_leaves_no_folder(tmp_path: Path) -> None:
    refused = (("model.n_heads=7",), ("hydra/launcher=basic",), ("optimizer.lr=-1,1",), ("attention=glob(zz*)",))
    for line, status in ((("dry_run=true",), 0), *((line, 2) for line in refused)):
        done = programs.run("train.py", "-m", "seed=1,2", *line, cwd=tmp_path)
        assert done.returncode == status, done.stderr
        assert not [*tmp_path.rglob("20*")]


def test_a_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")  # read-only folders do not stop root
    done = programs.run("train.py", "dry_run=true", cwd=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert done.stderr.splitlines()[1].startswith(f"  {tmp_path}/logs")
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize("typed", ["train.py name=", "train.py resume=", "generate.py run=", "evaluate.py run="])
def test_a_name_that_is_too_long_is_refused_in_one_line(typed: str, tmp_path: Path) -> None:
    program, setting = typed.split()
    done = programs.run(program, setting + 300 * "a", *["dry_run=true"] * (program == "train.py"), cwd=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert "File name too long" in done.stderr
    assert len(done.stderr.splitlines()) <= 2


@pytest.mark.parametrize("name", ["{elsewhere}", "q/../../../../{elsewhere}"])
def test_a_refused_name_leaves_no_folder(name: str, tmp_path: Path) -> None:
    elsewhere, here = tmp_path / "elsewhere", tmp_path / "here"
    here.mkdir()
    typed = name.format(elsewhere=elsewhere if name[0] == "{" else "elsewhere")
    assert programs.run("train.py", f"name={typed}", cwd=here).returncode == 2
    assert [*here.iterdir()] == []
    assert not elsewhere.exists()


def test_a_program_goes_on_without_its_reader(tmp_path: Path) -> None:
    """As of `| head -1`."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, str(CONF_DIR.parent / "train.py"), "dry_run=true"]
    environment = os.environ | programs.ENVIRONMENT
    with os.fdopen(writes, "w") as stdout:
        how = {"cwd": tmp_path, "stdout": stdout, "stderr": subprocess.PIPE, "env": environment}
        done = subprocess.run(command, check=False, **how)
    assert (done.returncode, done.stderr) == (0, b"")


def test_programs_are_called_as_they_were_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the environment, which ranks and the jobs of a sweep have, too."""
    monkeypatch.delenv(command_line.SPELLED, raising=False)
    assert command_line.shown("train.py", "seed=1") == "python train.py seed=1"
    monkeypatch.setenv(command_line.SPELLED, "my_lab")
    assert command_line.shown("train.py", "seed=1") == "my_lab train seed=1"


def test_values_beside_resume_are_composed_whatever_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the record's options are not known yet; groups, Hydra's settings and plain names are."""
    typed = ["resume=x", "budget.tokens=1", "+callbacks.a.b=2", "seed=3", "strategy=fsdp", "hydra.run.dir=y", "a.b.c=d"]
    monkeypatch.setattr(command_line, "_as_typed", {})
    composed = command_line.for_the_record(typed)
    assert composed == [f"++{a}" if a in ("budget.tokens=1", "a.b.c=d") else a for a in typed]
    assert [command_line._as_typed.get(a, a) for a in composed] == typed
    assert command_line.for_the_record(typed[1:]) == typed[1:]


@pytest.mark.parametrize("override", ["~optimizer.foreach,optimizer.fused", "(x)=1", " optimizer.lr=1e-3"])
def test_what_is_no_override_is_told_what_one_is(override: str) -> None:
    refused = programs.run("train.py", override)
    assert refused.returncode == 2
    assert f"{override!r} cannot be read: an override is key=value" in refused.stderr


def test_a_folder_whose_name_is_no_utf8_is_refused(tmp_path: Path) -> None:
    os.mkdir(os.fsencode(tmp_path) + b"/\xff\xfe")
    (folder,) = tmp_path.iterdir()
    done = programs.run("train.py", "dry_run=true", cwd=folder)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert r"\udcff\udcfe' is no UTF-8" in done.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("dry_run=true",), ("attention=…",)])
def test_output_may_be_ascii(arguments: tuple[str, ...], tmp_path: Path) -> None:
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    done = programs.run("train.py", *arguments, cwd=tmp_path, **ascii_only)
    assert done.returncode == (2 if "…" in arguments[0] else 0), done.stderr
    assert "Traceback" not in done.stderr
