import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from programs import NEEDS_PROC
from thunderhead.corpus.batch_processing import Batch, Record, UselessError, in_order, recorded, remembered
from thunderhead.corpus.sources import Document


class Lengths:
    """Counts characters, and writes down each batch that it did."""

    def __init__(self, log: Path):
        self.log = log

    def __call__(self, texts: list[str]) -> list[int]:
        time.sleep(0.05 if texts[0].startswith("0") else 0)  # the first is slow: others overtake it
        with open(self.log, "a") as log:
            log.write(f"{texts[0]} {os.getpid()}\n")
        return [len(text) for text in texts]


BATCHES = [Batch("a", [Document(str(i), f"{i} " + "x" * i), Document("", "y")], [False] * 2, i) for i in range(30)]
EXPECTED = [[len(document.text) for document in batch.documents] for batch in BATCHES]
RECORDS = [Record("a", [str(i), ""], [False] * 2, sum(lengths), i, lengths) for i, lengths in enumerate(EXPECTED)]


def test_its_processes_do_not_import_torch() -> None:
    """Which takes seconds, and 300 MB, of each of them."""
    needed = "thunderhead.corpus.batch_processing, thunderhead.corpus.deduplication"
    code = f"import sys, {needed}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def done(log: Path) -> list[str]:
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.parametrize("processes", [1, 3])
def test_results_come_in_the_order_of_the_batches(processes: int, tmp_path: Path) -> None:
    results = list(in_order(Lengths(tmp_path / "log"), BATCHES, processes))
    assert results == list(zip(BATCHES, EXPECTED, strict=True))
    pids = {line.split()[-1] for line in (tmp_path / "log").read_text().splitlines()}
    assert (str(os.getpid()) in pids) == (processes == 1)
    assert len(pids) <= processes


def test_a_bounded_number_of_batches_is_read_ahead(tmp_path: Path) -> None:
    read = []
    results = in_order(Lengths(tmp_path / "log"), (read.append(batch) or batch for batch in BATCHES), 2)
    next(results)
    assert len(read) < 10
    results.close()


def test_few_batches_start_no_process(tmp_path: Path) -> None:
    list(in_order(Lengths(tmp_path / "log"), BATCHES[:3], 2))
    assert f" {os.getpid()}" in (tmp_path / "log").read_text()


def test_an_error_of_a_worker_is_raised_here() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(in_order(Lengths(Path("/nowhere/log")), BATCHES, 2))


@pytest.mark.parametrize("cut", [0, 1, 200])
def test_what_was_done_is_not_done_again(cut: int, tmp_path: Path) -> None:
    file, log = tmp_path / "results", tmp_path / "log"
    first = remembered(Lengths(log), BATCHES, 1, file)
    for _ in range(10):
        next(first)
    first.close()
    content = file.read_bytes()
    file.write_bytes(content[: len(content) - cut])  # as a kill may leave it
    again = list(remembered(Lengths(log), BATCHES, 1, file))
    assert again == RECORDS
    twice = [text for text in done(log) if done(log).count(text) > 1]
    assert not twice if cut == 0 else 0 < len(twice) < 20
    # And now all are known.
    n_done = len(done(log))
    assert list(remembered(Lengths(log), BATCHES, 1, file)) == again
    assert len(done(log)) == n_done


def test_a_damaged_record_is_done_again(tmp_path: Path) -> None:
    file = tmp_path / "results"
    list(remembered(Lengths(tmp_path / "log"), BATCHES, 1, file))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert list(remembered(Lengths(tmp_path / "log"), BATCHES, 1, file)) == RECORDS
    assert 30 < len(done(tmp_path / "log")) < 60


def test_other_batches_than_the_last_time_are_refused(tmp_path: Path) -> None:
    list(remembered(Lengths(tmp_path / "log"), BATCHES, 1, tmp_path / "results"))
    with pytest.raises(ValueError, match="text changed since"):
        list(remembered(Lengths(tmp_path / "log"), BATCHES[1:], 1, tmp_path / "results"))
    with pytest.raises(ValueError, match="text changed since"):
        list(remembered(Lengths(tmp_path / "log"), BATCHES[:5], 1, tmp_path / "results"))


def test_results_are_read_again_and_damage_is_noticed(tmp_path: Path) -> None:
    files = [tmp_path / "0", tmp_path / "1"]
    for file, batches in zip(files, (BATCHES[:12], BATCHES[12:]), strict=True):
        list(remembered(Lengths(tmp_path / "log"), batches, 1, file))
    assert list(recorded(files)) == RECORDS
    files[0].write_bytes(files[0].read_bytes()[:-1])
    with pytest.raises(UselessError, match="was damaged"):
        list(recorded(files))


def test_a_killed_worker_is_said_in_one_line(tmp_path: Path) -> None:
    results = in_order(Lengths(tmp_path / "log"), (Batch("a", [Document("", "0")], [False], i) for i in range(1000)), 2)
    next(results)
    os.kill(int((tmp_path / "log").read_text().split()[1]), signal.SIGKILL)
    with pytest.raises(ValueError, match=r"was killed: .*memory.*the next start goes on"):
        list(results)


@NEEDS_PROC
def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    code = """
        import os, time
        from pathlib import Path
        from thunderhead.corpus.sources import Document
        from thunderhead.corpus.batch_processing import Batch, in_order

        class Sleep:
            def __call__(self, texts):
                (Path({folder!r}) / str(os.getpid())).touch()
                time.sleep(0.1)

        for _ in in_order(Sleep(), [Batch("a", [Document("", "x")], [False], 0)] * 10_000, 2):
            print("one", flush=True)
    """
    code = code.replace("{folder!r}", repr(str(tmp_path)))
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "one\n"
        process.send_signal(signal.SIGKILL)
    workers = [int(file.name) for file in tmp_path.iterdir()]
    assert workers
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
