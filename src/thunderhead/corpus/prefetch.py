"""Chunks before they are needed: the order of the samples is known, so a thread can fetch what comes next."""

import copy
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from thunderhead.core.data.manifest import Shard, ShardError
from thunderhead.core.data.order import Sample
from thunderhead.core.data.shards import ShardReader

_log = logging.getLogger(__name__)


class Prefetcher:
    """Fetch the chunks of the next samples in a thread of the process that reads, one after the other as they come.

    Nothing is started before the first sample is read, so it can be sent to a worker or live through a fork before.

    Args:
        place: where sample n lies.
        samples: n is less than this.
        readers: of each source.
        shards: what the manifest says about each source.
        ahead: samples to look ahead.
        max_bytes: of the chunks for the samples to come; the thread waits when it has so many.
        keep: is told which chunks (by sha256) will be needed, whenever that changes.
    """

    def __init__(
        self,
        place: Callable[[int], Sample],
        samples: int,
        readers: Mapping[str, ShardReader],
        shards: Mapping[str, Shard],
        *,
        ahead: int,
        max_bytes: int,
        keep: Callable[[frozenset[str]], None],
    ):
        self._place, self._samples = copy.deepcopy(place), samples  # an own one: orders are not made for two threads
        self._readers, self._shards = readers, shards
        self._ahead, self._max_bytes, self._keep = ahead, max_bytes, keep
        self._now = 0
        self._thread: threading.Thread | None = None
        self._moved = threading.Event()

    def reached(self, n: int) -> None:
        """Say that the samples from n on are read next."""
        self._now = n
        self._moved.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._try_to_run, name="prefetch", daemon=True)
            self._thread.start()

    def _try_to_run(self) -> None:
        try:
            self._run()
        except Exception as error:  # training can do without
            _log.warning("Fetching ahead has stopped, training waits for each chunk from now on: %s", error)

    def _run(self) -> None:
        start = cursor = self._now
        needed: dict[tuple[str, int], int] = {}  # chunk → the last sample up to the cursor that lies in it
        while True:
            now = self._now
            if now < start:  # from the beginning again
                needed, cursor = {}, now
            start, cursor = now, max(cursor, now)
            while cursor < min(self._now + self._ahead, self._samples):
                source, _, block = self._place(cursor)
                chunk = source, self._readers[source].chunk_of(block)
                if chunk not in needed:
                    needed = {known: last for known, last in needed.items() if last >= self._now}
                    if needed and self._bytes(needed) + self._bytes([chunk]) > self._max_bytes:
                        break
                    needed[chunk] = cursor
                    self._keep(frozenset(self._shards[name].chunks[k].sha256 for name, k in needed))
                    self._fetch(*chunk)
                needed[chunk] = cursor
                cursor += 1
            self._moved.wait()
            self._moved.clear()

    def _bytes(self, chunks: Any) -> int:
        return sum(self._shards[source].chunks[k].bytes for source, k in chunks)

    def _fetch(self, source: str, chunk: int) -> None:
        try:
            self._readers[source].chunks.file(chunk)
        except ShardError as error:  # who reads it will try again, and raise
            _log.warning("Could not fetch ahead: %s", error)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_thread": None, "_moved": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _moved=threading.Event())
