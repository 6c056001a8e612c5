"""What a person sees while a sweep runs."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from thunderhead.lab import progress
from thunderhead.lab.jobs import Job
from thunderhead.lab.progress import Board


class Clock:
    """Stands for time.monotonic."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def a_job(folder: Path, name: str) -> Job:
    return Job(choices={"attention": name}, config={}, folder=folder / name)


def write(job: Job, step: int, of: int = 100, *, finished: bool = False) -> None:
    """The record of a run at a step."""
    job.folder.mkdir(exist_ok=True)
    (job.folder / "plan.json").write_text(json.dumps({"steps": of}))
    rows = [f"{i},{5 - i / 100},1234.5,{6 - i / 100 if i == 10 else ''}" for i in range(10, step + 1, 10)]
    (job.folder / "metrics.csv").write_text("\n".join(["step,train/loss,tokens_per_second,val/loss", *rows, ""]))
    if finished:
        (job.folder / "summary.json").write_text(json.dumps({"steps": of, "val_loss": 3.14159}))


def lines_of(board: Board) -> dict[str, list[str]]:
    """Cells of the table's rows, by the name of the run."""
    out = io.StringIO()
    Console(file=out, width=200).print(board.table())
    return {cells[0]: cells[1:] for line in out.getvalue().splitlines() if (cells := line.split())}


def a_board(jobs: list[Job], *, terminal: bool) -> tuple[Board, io.StringIO]:
    out = io.StringIO()
    return Board(jobs, "Sweep", Console(file=out, width=200, force_terminal=terminal, highlight=False)), out


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path, clock: Clock) -> None:
    good, bad, back = (a_job(tmp_path, name) for name in ("mha", "gqa", "mla"))
    board, out = a_board([good, bad, back], terminal=False)
    with board:
        board.started(good, resumed=False)
        write(good, 100, finished=True)
        board.refresh([good])
        clock.now += 300
        board.ended(good, "finished")
        board.started(bad, resumed=False)
        board.ended(bad, "failed", "exit status 1: a [wire] broke")
        write(back, 40)
        board.started(back, resumed=True)
    assert out.getvalue().splitlines() == [
        "mha: begins",
        "mha: finished, validation loss 3.1416; 1 of 3, about 10 min left",
        "gqa: begins",
        "gqa: failed (exit status 1: a [wire] broke); 2 of 3, about 2 min left",
        "mla: goes on from its checkpoint (had logged step 40)",
    ]


def test_a_pipe_is_told_of_running_jobs_every_half_minute(tmp_path: Path, clock: Clock) -> None:
    job = a_job(tmp_path, "mha")
    board, out = a_board([job], terminal=False)
    with board:
        board.started(job, resumed=False)
        write(job, 10)
        clock.now += 20
        board.refresh([job])
        clock.now += 10
        write(job, 20)
        board.refresh([job])
        board.refresh([job])
    assert out.getvalue().splitlines() == ["mha: begins", "mha: step 20/100  loss 4.800  2 min left"]


def test_a_job_that_was_stopped_says_nothing_of_others(tmp_path: Path, clock: Clock) -> None:
    jobs = [a_job(tmp_path, name) for name in ("mha", "gqa")]
    board, out = a_board(jobs, terminal=False)
    board.started(jobs[0], resumed=False)
    clock.now += 1
    board.ended(jobs[0], "stopped")
    assert out.getvalue().splitlines()[-1] == "mha: stopped; 1 of 2"


def test_a_search_counts_all_of_its_trials(tmp_path: Path, clock: Clock) -> None:
    """The third of four: two ended before, and one comes after it."""
    job, out = a_job(tmp_path, "trial=3"), io.StringIO()
    board = Board([job], "Search", Console(file=out, width=200), before=2, total=4)
    board.started(job, resumed=False)
    clock.now += 60
    board.ended(job, "finished")
    assert out.getvalue().splitlines()[-1] == "trial=3: finished; 3 of 4, about 60 s left"


def test_the_table_tells_each_job_from_its_record(tmp_path: Path, clock: Clock) -> None:
    done, running, failed, waiting = (a_job(tmp_path, name) for name in ("mha", "gqa", "mla", "mqa"))
    board, _ = a_board([done, running, failed, waiting], terminal=True)
    with board:
        write(done, 100, finished=True)
        board.ended(done, "finished", "finished before")
        board.started(running, resumed=False)
        board.started(failed, resumed=False)
        board.ended(failed, "failed", "[red]markup[/red]")
        clock.now += 50
        write(running, 20)
        board.refresh([running])
        rows = lines_of(board)
    assert rows["Sweep:"] == ["1", "of", "4", "finished,", "about", "2", "min", "left"]
    assert rows["mha"] == ["finished", "100/100", "4.000", "3.1416", "1,234"]
    # 20 of 100 steps in 50 s: 200 s are left
    assert rows["gqa"] == ["running", "20/100", "4.800", "5.9000", "1,234", "3", "min"]
    assert rows["mla"] == ["failed:", "[red]markup[/red]"]
    assert rows["mqa"] == ["waiting"]


def test_a_resumed_jobs_time_left_counts_from_where_it_goes_on(tmp_path: Path, clock: Clock) -> None:
    """40 steps lay there; 20 more took 10 s, so that the last 40 take 20 s."""
    job = a_job(tmp_path, "mha")
    board, _ = a_board([job], terminal=True)
    write(job, 40)
    with board:
        board.started(job, resumed=True)
        assert lines_of(board)["mha"] == ["running", "40/100"]  # nothing is known yet
        clock.now += 10
        write(job, 60)
        board.refresh([job])
        assert lines_of(board)["mha"][-2:] == ["20", "s"]


def test_records_are_read_every_other_second_only(tmp_path: Path, clock: Clock) -> None:
    job = a_job(tmp_path, "mha")
    board, _ = a_board([job], terminal=True)
    with board:
        board.started(job, resumed=False)
        write(job, 10)
        board.refresh([job])
        write(job, 20)
        clock.now += 1
        board.refresh([job])
        assert lines_of(board)["mha"][1] == "10/100"
        clock.now += 1
        board.refresh([job])
        assert lines_of(board)["mha"][1] == "20/100"
