"""Training on shards that were prepared elsewhere: in a folder, or in object storage through a bounded cache."""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from typing_extensions import override

from thunderhead.core.config import Problem
from thunderhead.core.data.datamodule import Blocks, refusals
from thunderhead.core.data.manifest import (
    ForeignTokenizerError,
    Manifest,
    MissingManifestError,
    Shard,
    SplitName,
    verify_chunk,
    verify_index,
)
from thunderhead.core.data.order import Sample
from thunderhead.core.data.shards import Chunks
from thunderhead.core.types import PositiveFloat, PositiveInt
from thunderhead.corpus.curation import Filter
from thunderhead.corpus.files import nearest
from thunderhead.corpus.mixed_shards import MixedShards
from thunderhead.corpus.mixture import trained_blocks
from thunderhead.corpus.object_storage import ChunkCache, Remote, fetch_record, is_remote
from thunderhead.corpus.prefetch import Prefetcher
from thunderhead.corpus.sources import Share
from thunderhead.corpus.tokenizer import Tokenizer


def find_prepared(tokenizer: Tokenizer | None, *, path: str, cache_dir: str, attempts: int, timeout: float) -> Manifest:
    """Look up prepared shards; of those in object storage fetch all but the chunks, into the cache.

    Args:
        tokenizer: must be the one that made them, if given.
        path: a folder with manifest.json, or the URL of one.
        cache_dir: for what is fetched.
        attempts: see `Remote`.
        timeout: see `Remote`.

    Raises:
        ShardError: there is no manifest, it is damaged, storage fails, or `tokenizer` is another one.
        ValueError: the URL cannot be one of shards.
    """
    if is_remote(path):
        remote = Remote(path, attempts=attempts, timeout=timeout)
        folder = Path(cache_dir, "shards", hashlib.sha256(remote.url.encode()).hexdigest()[:16])
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"data.cache_dir={cache_dir} cannot be written: {error}") from None
        with FileLock(folder / ".lock"):
            fetch_record(remote, folder)
            manifest = Manifest.load(folder)
            for split, by_source in manifest.splits.items():
                for source, shard in by_source.items():
                    shard_folder = manifest.shard_folder(split, source)
                    shard_folder.mkdir(parents=True, exist_ok=True)
                    index = shard_folder / "index.json"
                    remote.fetch(index.relative_to(folder).as_posix(), index)
                    verify_index(shard_folder, shard, manifest.dtype)
    else:
        if not Path(path, "manifest.json").is_file():
            hint = nearest(Path(path)) if not Path(path).exists() else ""
            raise MissingManifestError(
                f"data.path={path} has no manifest.json{hint}: give the folder that prepare.py made, or use data=text"
            )
        manifest = Manifest.load(path)
    manifest.load_tokenizer()
    made_with = manifest.tokenizer
    if tokenizer is not None and (tokenizer.name, tokenizer.settings) != (made_with.name, made_with.settings):
        raise ForeignTokenizerError(
            f"tokenizer: {path} was made with {made_with.name} {made_with.settings}, not with {tokenizer.name}"
            f" {tokenizer.settings}: leave tokenizer= out, the shards bring theirs"
        )
    return manifest


class CachedChunks:
    """The chunks of a shard in object storage, fetched into the cache when they are asked for, and verified."""

    def __init__(self, remote: Remote, cache: ChunkCache, folder: str, shard: Shard):
        self._remote, self._cache, self._folder, self._shard = remote, cache, folder, shard

    def file(self, number: int) -> Path:
        """Return the verified file of a chunk; raises as `Remote.fetch` does."""
        chunk = self._shard.chunks[number]
        name = f"{self._folder}/{chunk.filename}"
        return self._cache.get(self._remote, name, chunk, partial(verify_chunk, shard=self._shard, chunk=chunk))


@dataclass(eq=False, repr=False)
class PreparedShards(MixedShards):
    """Load batches from shards that lie somewhere already; nothing is prepared, and the tokenizer is theirs.

    A folder is read in place. From object storage, manifest, tokenizer and indices are fetched at the start, and each
    chunk as a whole when its first token is needed, or before that by a thread that knows the order. A chunk is
    compared with its sha256 before a token of it is used. Chunks are kept in `cache_dir`, where those that are longest
    unused are deleted for new ones; nothing else is ever deleted.

    Args:
        tokenizer: must be the one that made the shards, if given.
        filters: none: they were applied when the shards were prepared.
        path: a folder with manifest.json, or s3://bucket/prefix, gs://bucket/prefix,
            hf://datasets/owner/name/prefix, http(s)://host/prefix of one.
        sources: weights of a mixture, for all sources of the manifest by name; null: they weigh the same.
        cache_dir: folder for what is fetched from object storage; several runs may share it.
        cache_bytes: of chunks in `cache_dir`, at most.
        attempts: how often an object is asked for until the run is given up, with pauses of 1, 2, 4 … 30 s between.
        timeout: seconds without an answer, or with less than 10 kB a second of it, after which an attempt has failed.
        verify: first_use: see above. full: the same for all chunks at the start; from object storage, that fetches all.
    """

    tokenizer: Tokenizer | None
    filters: Mapping[str, Filter]
    _: KW_ONLY
    path: str
    sources: Mapping[str, Share] | None = None
    cache_dir: str = "data/cache"
    cache_bytes: PositiveInt = 20_000_000_000
    attempts: PositiveInt = 6
    timeout: PositiveFloat = 30.0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self._cache = ChunkCache(Path(self.cache_dir).absolute() / "chunks", self.cache_bytes)

    @cached_property
    def _remote(self) -> Remote | None:
        return Remote(self.path, attempts=self.attempts, timeout=self.timeout) if is_remote(self.path) else None

    @override
    def find(self) -> Manifest:
        where = {"cache_dir": self.cache_dir, "attempts": self.attempts, "timeout": self.timeout}
        return find_prepared(self.tokenizer, path=self.path, **where)  # type: ignore[arg-type]

    @override
    def shares(self) -> dict[str, Share]:
        return shares(self.found, self.sources or {})

    @override
    def problems(self, run: Any) -> list[Problem]:
        found = super().problems(run)
        if not found:
            found = refusals(self._check_cache)
        if self.filters:
            found.append(Problem("curation", "was done when these shards were prepared: use curation=none"))
        return found

    def _check_cache(self) -> None:
        if self._remote is not None:
            check_cache(
                self.found,
                self.context_length,
                cache_bytes=self.cache_bytes,
                shuffle_window=self.shuffle_window,
                max_training_tokens=self.max_training_tokens,
            )

    @override
    def notes(self) -> list[str]:
        if self._remote is None:
            return super().notes()
        size = f"{self.cache_bytes / 1e9:,.3g} GB"
        return [
            f"data is fetched from {self.path} into {self.cache_dir}: at most {size}, then the longest unused goes",
            *super().notes(),
        ]

    @override
    def check_files(self) -> None:
        """Compare the shards with their manifest, of those in object storage all but the chunks.

        Raises:
            ValueError: they are damaged (a `ShardError`), or data.cache_bytes is too small for the shuffling.
        """
        if self._remote is None:
            super().check_files()
            return
        self._check_cache()
        for split, by_source in self.found.splits.items():
            for source, shard in by_source.items():
                verify_index(self.found.shard_folder(split, source), shard, self.found.dtype)
                for number in range(len(shard.chunks)) if self.verify == "full" else ():
                    self.chunks(split, source, shard).file(number)

    @override
    def chunks(self, split: SplitName, source: str, shard: Shard) -> Chunks:
        if self._remote is None:
            return super().chunks(split, source, shard)
        return CachedChunks(self._remote, self._cache, f"{source}/{split}", shard)

    @override
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
                {source: self.found.splits[split][source] for source in sources},
                ahead=self.shuffle_window,
                max_bytes=self.cache_bytes // (2 if split == "train" else 4 * len(self.found.sources)),
                keep=partial(self._cache.keep, f"{split} of {', '.join(sources)}"),
            )
            blocks.on_read = prefetcher.reached
        return blocks


def shares(manifest: Manifest, given: Mapping[str, Share]) -> dict[str, Share]:
    """Weigh the sources of prepared shards: as given, or all the same.

    Raises:
        ValueError: weights are given, and not for these sources.
    """
    if given and set(given) != set(manifest.sources):
        raise ValueError(
            f"data.sources has {', '.join(given)}, the shards have {', '.join(manifest.sources)}: give each of these a"
            " weight (0 leaves it out), or data.sources=null"
        )
    return dict(given) or {name: Share() for name in manifest.sources}


def check_cache(
    manifest: Manifest, context_length: int, *, cache_bytes: int, shuffle_window: int, max_training_tokens: int | None
) -> None:
    """Refuse a cache that cannot hold what is shuffled together: chunks would be fetched again and again.

    Half of the cache is for the current windows of all sources and the next ones, at most two chunks longer each. The
    blocks of a window lie further apart where only a part of the data is trained on.

    Raises:
        ValueError: it is too small.
    """
    train = manifest.splits["train"]
    available = {source: sum(shard.blocks(context_length)) for source, shard in train.items()}
    trained = trained_blocks(available, context_length, max_training_tokens)
    window = math.ceil(shuffle_window * sum(available.values()) / max(sum(trained.values()), 1))
    needed = 0
    for shard in train.values():
        largest = max(chunk.bytes for chunk in shard.chunks)
        window_bytes = window * context_length * np.dtype(manifest.dtype).itemsize
        needed += min(sum(chunk.bytes for chunk in shard.chunks), 2 * (window_bytes + 2 * largest))
    if cache_bytes < 2 * needed:
        raise ValueError(
            f"data.cache_bytes={cache_bytes} is too small to shuffle data.shuffle_window={shuffle_window} blocks of"
            f" {context_length} tokens: use at least {2 * needed}, or a smaller window"
        )
