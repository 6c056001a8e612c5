"""datatrove's executors: the same shards as on this machine, whatever is killed meanwhile."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import killed_preparation
import pytest
from killed_preparation import Killable, count

from programs import NEEDS_PROC
from shard_fixtures import digest_of
from thunderhead.corpus import batches, datatrove_engine
from thunderhead.corpus.batch_processing import UselessError
from thunderhead.corpus.curation import Filter, Length
from thunderhead.corpus.datatrove_engine import Datatrove, Step
from thunderhead.corpus.deduplication import ExactDuplicates, NearDuplicates
from thunderhead.corpus.preparation import Preparation
from thunderhead.corpus.prepare import prepare, run
from thunderhead.corpus.shard_files import verify
from thunderhead.corpus.sources import LocalText
from thunderhead.corpus.stages import Stages
from thunderhead.corpus.trained_tokenizers import BpeTokenizer

pytest.importorskip("datatrove")


@pytest.fixture
def made_from(tmp_path: Path, corpus: Path) -> dict[str, Any]:
    """Two sources of many files, some copies among them, and of one."""
    for i in range(0, 60, 6):
        (corpus / f"{i:03}.txt").write_text((corpus / "001.txt").read_text() + "x" * i)
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps({"text": f"line {i} " * 40}) for i in range(50)))
    sources = {"text": LocalText(path=str(corpus)), "lines": LocalText(path=str(tmp_path / "lines.jsonl"))}
    return {"sources": sources, "tokenizer": BpeTokenizer(vocab_size=300), "validation_fraction": 0.2}


FILTERS: dict[str, Filter] = {"length": Length(min_bytes=200), "exact": ExactDuplicates(), "near": NearDuplicates()}


@pytest.mark.parametrize(
    ("tasks", "settings"),
    [
        (4, {"filters": FILTERS, "near_duplicates_together": True}),
        pytest.param(1, {"filters": FILTERS}, marks=pytest.mark.slow),
        pytest.param(16, {"filters": FILTERS}, marks=pytest.mark.slow),
        (3, {"validation": "tail", "filters": {"length": Length(min_bytes=200)}}),
        pytest.param(100, {"validation": "tail"}, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_tasks_writes_the_same_bytes_as_this_machine(
    tasks: int,
    settings: dict[str, Any],
    made_from: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(datatrove_engine, "TELL_SECONDS", 0.0)
    here = prepare(**made_from, **settings, shards_dir=tmp_path / "here", processes=1)
    manifest = run(
        Preparation(**made_from, **settings, shards_dir=tmp_path / "tasks"), Datatrove(tasks=tasks, workers=2)
    )
    assert manifest is not None
    verify(manifest)
    assert digest_of(manifest.folder) == digest_of(here.folder)
    left = {path.name for path in (tmp_path / "tasks").iterdir()} - {manifest.folder.name}
    assert left == {"logs", f".{manifest.folder.name}.lock"}
    stage = "encode" if tasks > 1 else "write"  # one task writes what it encodes
    logs = sorted((tmp_path / "tasks" / "logs").glob(f"*/*/{stage}/logs/*"))
    assert [log.name for log in logs] == [f"task_{rank:05d}.log" for rank in range(tasks)]
    assert f"  Verify: 0 of {tasks} tasks\n" in capsys.readouterr().out


@NEEDS_PROC
@pytest.mark.parametrize(
    "what", ["task", "both", *(pytest.param(x, marks=pytest.mark.slow) for x in ("launcher", "command"))]
)
def test_after_kill_9_it_goes_on_and_writes_the_same_bytes(
    what: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one task, which datatrove's pool would wait for, of what starts tasks, or of what shows how far they are."""
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 0)  # set by what follows, and restored
    for name in (killed_preparation.LOG, killed_preparation.SECONDS):
        monkeypatch.setenv(name, "")
    settings: dict[str, Any] = {"seconds": 0, "processes": 1, "curate": True}
    undisturbed = killed_preparation.prepare(str(tmp_path / "log"), str(corpus), str(tmp_path / "here"), **settings)
    folder = tmp_path / "killed"
    folder.mkdir()
    killable = Killable(corpus, folder, seconds=0.1, curate=True, tasks=3)
    killable.wait_for("inspected", 8)
    workers = [int(file.read_text()) for file in (folder / "shards").glob("logs/*/*/inspect/running/*")]
    launcher, command = _parent(workers[0]), killable.process.pid
    killed = {"task": workers[:1], "launcher": [launcher], "command": [command], "both": [launcher, command]}
    for pid in killed[what]:
        os.kill(pid, signal.SIGKILL)
    assert killable.process.wait(60) == (-signal.SIGKILL if command in killed[what] else 1)
    deadline = time.monotonic() + 30
    while any(_runs(worker) for worker in workers):  # the others end with what started them
        assert time.monotonic() < deadline
        time.sleep(0.05)
    shutil.rmtree(folder / "shards" / "logs")  # someone makes room
    killed_preparation.prepare(str(folder / "log"), str(corpus), str(folder / "shards"), **settings, tasks=3)
    assert digest_of(folder / "shards" / undisturbed.folder.name) == digest_of(undisturbed.folder)
    assert 60 < count(folder / "log", "inspected") <= 60 + 2 * 21  # two were under way, of 20 documents or so


def _status(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _parent(pid: int) -> int:
    return int(_status(pid)[1])


def _runs(pid: int) -> bool:
    try:
        return _status(pid)[0] != "Z"
    except FileNotFoundError:
        return False


class Fails:
    """Stages of which one does not go."""

    preparation = Preparation({}, BpeTokenizer(vocab_size=300), "", 0.2)

    def __init__(self, error: Exception):
        self.error = error

    def run(self, *_: object) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            TypeError("no such method"),
            ValueError,
            r"^engine: TypeError: no such method: see /.*/encode/logs/task_00000",
        ),
        (OSError(errno.ENOSPC, "it is full", "/tmp/x"), OSError, "it is full: '/tmp/x'"),
    ],
)
def test_a_task_notes_why_it_fails(error: Exception, kind: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(type(error)):
        Step(Fails(error), "encode", tmp_path / "encode")(None, 0, 2)
    with pytest.raises(kind, match=message):
        datatrove_engine._refuse(datatrove_engine._faults(tmp_path))


def test_of_the_faults_of_many_tasks_the_first_are_told(tmp_path: Path) -> None:
    for rank in range(7):
        Step(Fails(ValueError(f"file {rank} is bad")), "verify", tmp_path / "verify")(None, rank, 7)
    (tmp_path / "faults" / ".verify-00007.half-written").touch()
    with pytest.raises(ValueError, match=r"^file 0 is bad; .*; file 4 is bad; 2 more tasks: see their logs$"):
        datatrove_engine._refuse(datatrove_engine._faults(tmp_path))


class Ends:
    """An executor of which one task refuses something, and whose pool ends another one then, which cannot say so."""

    def __init__(self, logs: Path):
        self.logs = logs

    def run(self) -> None:
        with pytest.raises(UselessError):
            Step(Fails(UselessError("the text changed")), "encode", self.logs / "encode")(None, 0, 2)
        ended = subprocess.Popen(["true"])
        ended.wait()
        (self.logs / "encode" / "running" / "1").write_text(str(ended.pid))
        time.sleep(60)


def test_a_fault_is_told_rather_than_who_ended_with_it(tmp_path: Path) -> None:
    stages = Stages(Preparation({}, BpeTokenizer(vocab_size=300), tmp_path, 0.2), "key", {}, tmp_path)
    with pytest.raises(UselessError, match=r"^the text changed$"):
        Datatrove()._run(Ends(tmp_path), stages, tmp_path)


def test_what_cannot_be_sent_to_tasks_is_refused(corpus: Path, tmp_path: Path) -> None:
    """All of it, before anything is done."""
    source, rule = LocalText(path=str(corpus)), ExactDuplicates()
    source.rows, rule.rows = (row for row in ()), (row for row in ())  # type: ignore[attr-defined]
    tokenizer = BpeTokenizer(vocab_size=300)
    preparation = Preparation({"text": source}, tokenizer, tmp_path, 0.2, filters={"exact": rule})
    with pytest.raises(ValueError, match=r"^data\.sources\.text: tasks .*pickle.*; curation\.filters\.exact: tasks "):
        run(preparation, Datatrove(tasks=2))
    assert not list(tmp_path.glob(".*.preparing"))


def test_faults_of_all_tasks_are_told_before_work_starts_and_mended(corpus: Path, tmp_path: Path) -> None:
    for name in ("000.txt", "059.txt"):
        (corpus / name).write_bytes(b"fine line\n" * 50_000 + b"\xff")
    preparation = Preparation(
        {"text": LocalText(path=str(corpus))}, BpeTokenizer(vocab_size=300), tmp_path / "shards", 0.2
    )
    with pytest.raises(ValueError, match=r"data\.sources\.text: .*000\.txt: .*059\.txt: ") as caught:
        run(preparation, Datatrove(tasks=4, workers=2))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "shards").glob(".*.preparing"))


def test_another_number_of_tasks_is_refused(corpus: Path, tmp_path: Path) -> None:
    preparation = Preparation(
        {"text": LocalText(path=str(corpus))}, BpeTokenizer(vocab_size=300), tmp_path / "shards", 0.2
    )
    work = tmp_path / "shards" / f".{preparation.key(preparation.fingerprints())}.preparing"
    work.mkdir(parents=True)
    (work / "begun.json").write_text('{"tasks": 16}')
    with pytest.raises(
        ValueError, match=r"was begun by 16 tasks: go on with prepare\.py and engine=datatrove engine\.tasks=16"
    ):
        run(preparation, Datatrove(tasks=4))
    with pytest.raises(ValueError, match="engine=datatrove"):
        run(preparation)
    assert work.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"executor": "local", "arguments": {"time": 3}},
            r"arguments\.time: .* executor=local: randomize_start_duration, ",
        ),
        ({"executor": "local", "arguments": {"local_tasks": 3}}, r"arguments\.local_tasks: .* executor=local: "),
        (
            {"executor": "slurm", "arguments": {"partitions": "x"}},
            r"arguments\.partitions: .*: partition; engine.arguments: lacks .* time, .*; executor=slurm: there is no",
        ),
        ({"executor": "slurm"}, "lacks partition and time, which slurm needs"),
        ({"executor": "slurm", "arguments": {"partition": "a", "time": "1:00:00"}}, "there is no sbatch here"),
    ],
)
def test_what_does_not_go_is_refused(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # without sbatch
    with pytest.raises(ValueError, match=message):
        Datatrove(**settings)


def command(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text("#!/bin/bash\n" + textwrap.dedent(script))
    (folder / name).chmod(stat.S_IRWXU)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A SLURM that runs each job at once, unless one that it waits for has failed; returns its folder."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    command(
        folder,
        "sbatch",
        f"""
        cd {folder}
        for last; do :; done
        if [ -e refuses ] && grep -q prepare-train $last; then echo no such partition >&2; exit 1; fi
        if grep -q merge_stats $last; then echo Submitted batch job 0; exit; fi
        id=$(( $(ls jobs 2>/dev/null | wc -l) + 1 )); mkdir -p jobs
        cp $last jobs/$id
        echo "$@" > $id.arguments
        failed=0
        for needed in $(grep -o 'afterok:[0-9]*' $id.arguments $last | grep -o '[0-9]*$'); do
            [ "$(cat $needed.status)" = 0 ] || failed=1
        done
        if [ $failed = 0 ]; then
            for task in $(seq 0 $(grep -o 'array=0-[0-9]*' $last | grep -o '[0-9]*$')); do
                (cd - > /dev/null; SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=here bash $last) \\
                    > $id.$task.log 2>&1 || failed=1
            done
        fi
        echo $failed > $id.status
        echo Submitted batch job $id
        """,
    )
    command(folder, "srun", 'while [[ "$1" == -* ]]; do [ "$1" = -n ] && shift; shift; done; exec "$@"')
    command(folder, "scontrol", "echo here")
    command(folder, "scancel", f'echo "$@" > {folder}/cancelled')
    command(folder, "squeue", f"cat {folder}/queue 2> /dev/null")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_shards_in_the_folder_of_the_text_are_refused(corpus: Path) -> None:
    """Files of logs would be files of text, the next time that files are listed."""
    sources = {"text": LocalText(path=str(corpus), suffixes=(".txt", ""))}
    for place in (corpus, corpus / "data" / "shards"):
        preparation = Preparation(sources, BpeTokenizer(vocab_size=300), place, 0.2)
        with pytest.raises(ValueError, match=rf"^data\.shards_dir: {place} lies in {corpus} of data\.sources\.text"):
            run(preparation, Datatrove(tasks=2))
        assert not list(place.glob(".*.preparing"))


def test_slurm(made_from: dict[str, Any], cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A chain of array jobs, each after the one before, which write the same bytes; and goes on after a fault."""
    here = prepare(**made_from, shards_dir=tmp_path / "here", processes=1)
    bad = Path(made_from["sources"]["text"].path, "030.txt")
    good = bad.read_bytes()
    bad.write_bytes(b"fine line\n" * 50_000 + b"\xff")
    arguments = {"partition": "cpu", "time": "1:00:00", "mem_per_cpu_gb": 3}
    engine = Datatrove(executor="slurm", tasks=2, arguments=arguments)
    preparation = Preparation(**made_from, shards_dir=tmp_path / "tasks")
    assert run(preparation, engine) is None
    assert preparation.find() is None
    logs = "".join(log.read_text() for log in (tmp_path / "tasks" / "logs").rglob("*.log"))
    assert "030.txt: not UTF-8 text" in logs

    bad.write_bytes(good)
    assert run(preparation, engine) is None
    assert "Submitted 4 jobs" in capsys.readouterr().out
    made = preparation.find()
    assert made is not None
    assert digest_of(made.folder) == digest_of(here.folder)
    lines = [line for job in range(1, 9) for line in (cluster / "jobs" / str(job)).read_text().splitlines()]
    names = [line.partition("=")[2] for line in lines if line.startswith(("#SBATCH --job-name", "#SBATCH --array"))]
    chain = ["prepare-verify", "0-1", "prepare-train", "0-0", "prepare-encode", "0-1", "prepare-write", "0-0"]
    assert names == chain * 2
    asked = ("partition=cpu", "time=1:00:00", "mem-per-cpu=3G", "kill-on-invalid-dep=yes")
    assert {f"#SBATCH --{argument}" for argument in asked} <= set(lines)
    assert not [line for line in lines if "qos" in line]


def test_slurm_is_asked_once(made_from: dict[str, Any], cluster: Path, tmp_path: Path) -> None:
    (cluster / "queue").write_text("17 cpu prepare")
    preparation = Preparation(**made_from, shards_dir=tmp_path)
    work = tmp_path / f".{preparation.key(preparation.fingerprints())}.preparing"
    work.mkdir()
    (work / "begun.json").write_text('{"tasks": 3}')
    (work / "jobs").write_text("16,17")
    with pytest.raises(ValueError, match="jobs 16,17 are preparing this already: squeue -j 16,17"):
        run(preparation, Datatrove(executor="slurm", tasks=3, arguments={"partition": "cpu", "time": "1:00:00"}))
    assert not (cluster / "jobs").exists()


def test_what_slurm_does_not_take_is_refused(made_from: dict[str, Any], cluster: Path, tmp_path: Path) -> None:
    (cluster / "refuses").touch()
    arguments = {"partition": "cpu", "time": "1:00:00"}
    preparation = Preparation(**made_from, shards_dir=tmp_path / "tasks")
    with pytest.raises(ValueError, match="SLURM takes no such job"):
        run(preparation, Datatrove(executor="slurm", tasks=1, arguments=arguments))
    assert (cluster / "cancelled").read_text() == "1\n"
    assert not list((tmp_path / "tasks").glob("*.preparing/jobs"))
    with pytest.raises(ValueError, match=r"^data\.shards_dir: .*/my tasks/.*: .* no spaces"):
        run(
            Preparation(**made_from, shards_dir=tmp_path / "my tasks"), Datatrove(executor="slurm", arguments=arguments)
        )


@pytest.mark.slow
def test_ray(made_from: dict[str, Any], tmp_path: Path) -> None:
    """In its local mode, in a process of its own: its server stays as long as that."""
    pytest.importorskip("ray", reason="needs ray: uv pip install ray")
    settings = {**made_from, "filters": {"length": Length(min_bytes=200)}}
    here = prepare(**settings, shards_dir=tmp_path / "here", processes=1)
    manifest = run(
        Preparation(**settings, shards_dir=tmp_path / "tasks"),
        Datatrove(executor="ray", tasks=3, workers=2, arguments={"mem_per_cpu_gb": 0.5}),
    )
    assert manifest is not None
    assert digest_of(manifest.folder) == digest_of(here.folder)


def test_the_command(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('of the folder where the command is given')")
    program = [sys.executable, str(Path(__file__).parents[2] / "prepare.py"), "data=text", f"data.path={corpus}"]
    settings = ["tokenizer=byte", "data.shards_dir=shards", "engine=datatrove", "engine.tasks=3"]
    done = subprocess.run([*program, *settings], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "60  .txt" in done.stdout  # files read, added up over the tasks


class Idle:
    """An executor that waits for ever for a child that has been killed before it began anything."""

    def run(self) -> None:
        child = os.fork()
        if child == 0:
            time.sleep(60)
        os.kill(child, signal.SIGKILL)
        time.sleep(60)


@NEEDS_PROC
def test_a_process_that_is_killed_before_its_task_begins(tmp_path: Path) -> None:
    stages = Stages(Preparation({}, BpeTokenizer(vocab_size=300), tmp_path, 0.2), "key", {}, tmp_path)
    with pytest.raises(ValueError, match=r"^engine: one of its processes was killed: "):
        Datatrove()._run(Idle(), stages, tmp_path)
