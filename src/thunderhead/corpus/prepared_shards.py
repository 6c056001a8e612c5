"""Training on shards that were prepared elsewhere: in a folder, or in object storage through a bounded cache."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from thunderhead.core.config import Problem
from thunderhead.core.data.manifest import Manifest, MissingFileError, ShardError, SplitName
from thunderhead.core.data.order import Sample
from thunderhead.core.data.shard_datamodule import Blocks
from thunderhead.core.types import PathText, PositiveFloat, PositiveInt
from thunderhead.corpus.chunk_cache import ChunkCache, Prefetcher
from thunderhead.corpus.object_storage import Remote, fetch_record
from thunderhead.corpus.shard_data import ShardData, refusals
from thunderhead.corpus.sources import Share
from thunderhead.corpus.text_files import nearest


@dataclass(eq=False, repr=False)
class PreparedShards(ShardData):
    """Load batches from shards that lie somewhere already; nothing is prepared, and the tokenizer is theirs.

    A folder is read in place. From object storage, all but the chunks is fetched at the start, and each chunk as a
    whole when its first token is needed, or before that by a thread that knows the order. A chunk is compared with its
    sha256 before a token of it is used. Chunks are kept in `cache_dir`, where those that are longest
    unused are deleted for new ones; nothing else is ever deleted. `verify=full` fetches all of them at the start.
    """

    _: KW_ONLY
    path: PathText  # a folder with manifest.json, or its URL (see `Remote`)
    sources: Mapping[str, Share] | None = None  # weights, for all sources of the manifest; null: they weigh the same
    cache_dir: PathText = "data/cache"  # for what is fetched from object storage; several runs may share it
    cache_bytes: PositiveInt = 20_000_000_000  # of chunks in `cache_dir`, at most
    attempts: PositiveInt = 6  # to get an object until the run is given up, with pauses of 1, 2, 4 … 30 s between
    timeout: PositiveFloat = 30.0  # seconds without an answer, or with less than 10 kB of it in each, end an attempt

    def __post_init__(self) -> None:
        self._remote: Remote | None = None  # set by `find`
        self._cache = ChunkCache(Path(self.cache_dir).absolute() / "chunks", self.cache_bytes)
        super().__post_init__()

    def find(self) -> Manifest:
        if "://" in self.path:
            self._remote = Remote(self.path, attempts=self.attempts, timeout=self.timeout)
            manifest = self._fetch(self._remote)
        elif Path(self.path, "manifest.json").is_file():
            manifest = Manifest.load(self.path)
        else:
            hint = nearest(Path(self.path)) if not Path(self.path).exists() else ""
            remedy = "give the folder that prepare.py made, or use data=text"
            raise MissingFileError(f"data.path={self.path} has no manifest.json{hint}: {remedy}")
        made_with, asked = manifest.tokenizer, self.tokenizer
        if asked is not None and (asked.name, asked.settings) != (made_with.name, made_with.settings):
            other = f"was made with {made_with.name} {made_with.settings}, not with {asked.name} {asked.settings}"
            raise ShardError(f"tokenizer: {self.path} {other}: leave tokenizer= out, the shards bring theirs")
        return manifest

    def _fetch(self, remote: Remote) -> Manifest:
        """Fetch all but the chunks, into the cache."""
        folder = Path(self.cache_dir, "shards", hashlib.sha256(remote.url.encode()).hexdigest()[:16])
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"data.cache_dir={self.cache_dir} cannot be written: {error}") from None
        with FileLock(folder / ".lock"):
            return fetch_record(remote, folder)

    def shares(self) -> Mapping[str, Share]:
        known = list(self.manifest.sources) if self.is_prepared else []
        if self.sources and known and set(self.sources) != set(known):
            both = f"data.sources has {', '.join(self.sources)}, the shards have {', '.join(known)}"
            raise ValueError(f"{both}: give each of these a weight (0 leaves it out), or data.sources=null")
        return self.sources or {name: Share() for name in known}

    def problems(self, run: Any) -> list[Problem]:
        found = super().problems(run) or refusals(self._check_cache)
        if self.filters:
            found.append(Problem("curation", "was done when these shards were prepared: use curation=none"))
        return found

    def _check_cache(self) -> None:
        """Refuse a cache that cannot hold what is shuffled together: chunks would be fetched again and again."""
        if self._remote is None:
            return
        # Half of the cache is for the current windows of all sources and the next ones, at most two chunks longer each.
        # The blocks of a window lie further apart where only a part of the data is trained on.
        available, trained = sum(map(sum, self.blocks("train").values())), sum(self.trained_blocks().values())
        window = math.ceil(self.shuffle_window * available / max(trained, 1))
        window_bytes = window * self.context_length * np.dtype(self.manifest.dtype).itemsize
        needed = 0
        for shard in self.manifest.splits["train"].values():
            sizes = [chunk.bytes for chunk in shard.chunks]
            needed += min(sum(sizes), 2 * (window_bytes + 2 * max(sizes)))
        if self.cache_bytes < 2 * needed:
            raise ValueError(
                f"data.cache_bytes={self.cache_bytes} is too small to shuffle data.shuffle_window={self.shuffle_window}"
                f" blocks of {self.context_length} tokens: use at least {2 * needed}, or a smaller window"
            )

    def notes(self) -> list[str]:
        if self._remote is None:
            return [*super().notes(), *self._lost()]
        bound = f"at most {self.cache_bytes / 1e9:,.3g} GB, then the longest unused goes"
        return [f"data is fetched from {self.path} into {self.cache_dir}: {bound}", *super().notes()]

    def check_files(self) -> None:
        if self._remote is None:
            super().check_files()
            return
        self._check_cache()  # the files were compared when they were fetched
        for split, source, shard in self.manifest.shards() if self.verify == "full" else ():
            for number in range(len(shard.chunks)):
                self.chunk_file(split, source)(number)

    def chunk_file(self, split: SplitName, source: str) -> Callable[[int], Path]:
        if self._remote is None:
            return super().chunk_file(split, source)
        return partial(self._cache.get, self._remote, f"{source}/{split}", self.manifest.splits[split][source])

    def dataset(self, split: SplitName, sources: list[str], place: Callable[[int], Sample], samples: int) -> Blocks:
        blocks = super().dataset(split, sources, place, samples)
        if self._remote is not None:
            assert self.trainer is not None
            if split == "train" and self.trainer.max_steps > 0:  # what comes after the run need not be fetched
                samples = min(samples, self.trainer.max_steps * self.sequences_per_step)
            prefetcher = Prefetcher(
                place,
                samples,
                blocks.readers,
                self.manifest.splits[split],
                ahead=self.shuffle_window,
                max_bytes=self.cache_bytes // (2 if split == "train" else 4 * len(self.manifest.sources)),
                keep=partial(self._cache.keep, f"{split} of {', '.join(sources)}"),
            )
            blocks.on_read = prefetcher.reached
        return blocks
