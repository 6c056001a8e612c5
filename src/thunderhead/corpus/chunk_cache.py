"""Chunks of shards in object storage, kept on the local disk within bounds, and fetched before they are needed."""

import contextlib
import copy
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from thunderhead.core.data.manifest import Chunk, Shard, ShardError
from thunderhead.core.data.order import Sample
from thunderhead.core.data.shards import ShardReader
from thunderhead.corpus.object_storage import Remote
from thunderhead.corpus.shard_files import verify_chunk

_log = logging.getLogger(__name__)


class ChunkCache:
    """Chunks by their sha256 in a folder of at most `max_bytes`, which several processes and runs may share.

    What is longest unused is deleted for what is new, and nothing but files that this class wrote: they are named by
    their hash. Which chunks this process will need soon is told by `keep`. Not counted are chunks that other processes
    are just fetching, and deleted ones that a process has still mapped: it can read them, and lets them go later.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self._folder, self._max_bytes = folder, max_bytes
        self._verified: set[str] = set()
        self._kept: dict[str, frozenset[str]] = {}

    def keep(self, user: str, hashes: Iterable[str]) -> None:
        """Delete none of these chunks in this process, until told anew by the same user; others see them as used."""
        self._kept[user] = frozenset(hashes)

    def get(self, remote: Remote, folder: str, shard: Shard, number: int) -> Path:
        """Return the file of a chunk, verified by this process, fetched if need be; of several processes one fetches.

        It may be deleted again at any time: who finds it gone asks anew. Raises as `Remote.fetch` does.
        """
        chunk = shard.chunks[number]
        file = self._folder / f"{chunk.sha256}.bin"
        if chunk.sha256 in self._verified and _touch(file):
            return file
        check = partial(verify_chunk, shard=shard, chunk=chunk)
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self._lock(chunk.sha256)):
            if _touch(file):
                try:
                    check(file)
                except ShardError as error:
                    _log.warning("%s; %s/%s/%s is fetched again", error, remote.url, folder, chunk.filename)
                    file.unlink()
            if not file.exists():
                self._make_room(chunk.bytes)
                remote.fetch(f"{folder}/{chunk.filename}", file, check)
            self._verified.add(chunk.sha256)
        return file

    def _lock(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.lock"

    def _make_room(self, n_bytes: int) -> None:
        with FileLock(self._folder / "room.lock"):
            kept = frozenset().union(*list(self._kept.values()))
            for sha256 in kept:
                _touch(self._folder / f"{sha256}.bin")  # the other processes delete by age
            files = []
            for file in self._folder.iterdir():
                if re.fullmatch(r"[0-9a-f]{64}\.bin(\.part)?", file.name):
                    with contextlib.suppress(FileNotFoundError):
                        files.append((file.stat().st_mtime_ns, file.stat().st_size, file))
            excess = sum(size for _, size, _ in files) + n_bytes - self._max_bytes
            for _, size, file in sorted(files):
                if excess > 0 and file.name[:64] not in kept and (file.suffix == ".bin" or self._is_abandoned(file)):
                    file.unlink(missing_ok=True)
                    excess -= size
            if excess > 0:
                _log.warning("%s: data.cache_bytes is %d bytes less than the chunks in use", self._folder, excess)

    def _is_abandoned(self, part: Path) -> bool:
        """Whether no process is writing a .part file any more."""
        try:
            with FileLock(self._lock(part.name[:64]), timeout=0):
                return True
        except Timeout:
            return False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_verified": set(), "_kept": {}}


def _touch(file: Path) -> bool:
    """Mark a file as used now; False if there is none."""
    try:
        os.utime(file)
    except FileNotFoundError:
        return False
    return True


@dataclass(eq=False)
class Prefetcher:
    """Fetch the chunks of the next samples in a thread of the process that reads, one after the other as they come.

    Nothing is started before the first sample is read, so it can be sent to a worker or live through a fork before.
    """

    place: Callable[[int], Sample]  # where sample n lies
    samples: int  # n is less than this
    readers: Mapping[str, ShardReader]  # of each source
    shards: Mapping[str, Shard]  # what the manifest says about each source
    _: KW_ONLY
    ahead: int  # samples to look ahead
    max_bytes: int  # of the chunks for the samples to come; the thread waits when it has so many
    keep: Callable[[frozenset[str]], None]  # is told which chunks (by sha256) will be needed, whenever that changes

    def __post_init__(self) -> None:
        self.place = copy.deepcopy(self.place)  # an own one: orders are not made for two threads
        self._now = 0
        self._thread: threading.Thread | None = None
        self._moved: threading.Event

    def reached(self, n: int) -> None:
        """Say that the samples from n on are read next."""
        self._now = n
        if self._thread is None:
            self._moved = threading.Event()
            self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
            self._thread.start()
        self._moved.set()

    def _run(self) -> None:
        try:
            self._fetch_ahead()
        except Exception as error:  # training can do without
            _log.warning("Fetching ahead has stopped, training waits for each chunk from now on: %s", error)

    def _fetch_ahead(self) -> None:
        start = cursor = self._now
        needed: dict[tuple[str, int], int] = {}  # chunk → the last sample up to the cursor that lies in it
        while True:
            now = self._now
            if now < start:  # from the beginning again
                needed, cursor = {}, now
            start, cursor = now, max(cursor, now)
            while cursor < min(self._now + self.ahead, self.samples):
                source, _, block = self.place(cursor)
                chunk = source, self.readers[source].chunk_of(block)
                if chunk not in needed:
                    needed = {known: last for known, last in needed.items() if last >= self._now}
                    if needed and sum(self._chunk(*known).bytes for known in [*needed, chunk]) > self.max_bytes:
                        break
                    needed[chunk] = cursor
                    self.keep(frozenset(self._chunk(*known).sha256 for known in needed))
                    try:
                        self.readers[source].file(chunk[1])
                    except ShardError as error:  # who reads it will try again, and raise
                        _log.warning("Could not fetch ahead: %s", error)
                needed[chunk] = cursor
                cursor += 1
            self._moved.wait()
            self._moved.clear()

    def _chunk(self, source: str, number: int) -> Chunk:
        return self.shards[source].chunks[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_thread": None, "_moved": None}
