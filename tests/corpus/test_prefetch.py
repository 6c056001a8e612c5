import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from thunderhead.core.data.manifest import Chunk, Shard, ShardError
from thunderhead.core.data.order import Sample
from thunderhead.core.data.shards import ShardReader
from thunderhead.corpus.chunk_cache import Prefetcher

BLOCKS = 10  # in each chunk


class Chunks:
    """Chunks that only note that they were asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.broken: set[int] = set()

    def __call__(self, number: int) -> Path:
        self.asked.append(number)
        if number in self.broken:
            raise ShardError(f"chunk {number}")
        return Path()


class InTurn:
    """Sample n is block n."""

    def __call__(self, n: int) -> Sample:
        return Sample("text", 0, n)


def make(ahead: int, max_chunks: int, samples: int = 1000) -> tuple[Prefetcher, Chunks, list[set[int]]]:
    sizes = {"sha256": "", "bytes": 100, "tokens": BLOCKS + 1, "documents": 1}
    chunks = tuple(Chunk(filename=str(k), **{**sizes, "sha256": str(k)}) for k in range(100))
    shard = Shard(1, 1, 1, 0.0, 1, "", chunks)
    files, kept = Chunks(), []
    prefetcher = Prefetcher(
        InTurn(),
        samples,
        {"text": ShardReader(files, shard, 1, "uint16")},
        {"text": shard},
        ahead=ahead,
        max_bytes=100 * max_chunks,
        keep=lambda hashes: kept.append({int(sha256) for sha256 in hashes}),
    )
    return prefetcher, files, kept


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)  # it would go on, if it did
    return condition()


def test_chunks_are_fetched_in_order_as_far_as_it_looks_ahead() -> None:
    prefetcher, files, kept = make(ahead=25, max_chunks=50)
    assert not files.asked
    prefetcher.reached(0)
    assert eventually(lambda: files.asked == [0, 1, 2])
    prefetcher.reached(5)
    assert eventually(lambda: files.asked == [0, 1, 2])
    prefetcher.reached(16)
    assert eventually(lambda: files.asked == [0, 1, 2, 3, 4])
    assert kept[-1] == {1, 2, 3, 4}  # sample 16 lies in chunk 1; 0 is done with


def test_a_run_that_begins_in_the_middle_fetches_what_it_needs() -> None:
    prefetcher, files, _ = make(ahead=10, max_chunks=50)
    prefetcher.reached(555)
    assert eventually(lambda: files.asked == [55, 56])


def test_it_waits_where_the_cache_is_full() -> None:
    prefetcher, files, kept = make(ahead=900, max_chunks=3)
    prefetcher.reached(0)
    assert eventually(lambda: files.asked == [0, 1, 2])
    prefetcher.reached(10)
    assert eventually(lambda: files.asked == [0, 1, 2, 3])
    assert max(len(hashes) for hashes in kept) == 3


def test_it_ends_with_the_samples_and_begins_again() -> None:
    prefetcher, files, _ = make(ahead=900, max_chunks=50, samples=15)
    prefetcher.reached(0)
    assert eventually(lambda: files.asked == [0, 1])
    prefetcher.reached(14)
    assert eventually(lambda: files.asked == [0, 1])
    prefetcher.reached(0)
    assert eventually(lambda: files.asked == [0, 1, 0, 1])


def test_what_cannot_be_fetched_is_left_to_who_reads_it(caplog: pytest.LogCaptureFixture) -> None:
    prefetcher, files, _ = make(ahead=25, max_chunks=50)
    files.broken = {1}
    prefetcher.reached(0)
    assert eventually(lambda: files.asked == [0, 1, 2])
    assert "Could not fetch ahead: chunk 1" in caplog.text


def test_an_order_that_ends_ends_the_fetching_alone(caplog: pytest.LogCaptureFixture) -> None:
    prefetcher, files, _ = make(ahead=2000, max_chunks=500, samples=10_000)
    prefetcher.reached(985)  # there are 1000 blocks
    assert eventually(lambda: "Fetching ahead has stopped" in caplog.text)
    assert files.asked == [98, 99]
    prefetcher.reached(986)


def test_the_thread_does_not_keep_the_program() -> None:
    prefetcher, _, _ = make(ahead=25, max_chunks=50)
    before = set(threading.enumerate())
    prefetcher.reached(0)
    (thread,) = set(threading.enumerate()) - before
    assert thread.daemon
