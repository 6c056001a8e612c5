"""Training on shards that were prepared elsewhere: in a folder, or in object storage through a bounded cache."""

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from filelock import FileLock
from typing_extensions import override

from thunderhead.core.data.datamodule import Blocks, TokenDataModule
from thunderhead.core.data.manifest import (
    ForeignTokenizerError,
    Manifest,
    MissingManifestError,
    Shard,
    SplitName,
    verify,
    verify_chunk,
    verify_index,
)
from thunderhead.core.data.mixture import AtMaxEpochs, Turns, trained_blocks
from thunderhead.core.data.order import blocks
from thunderhead.core.data.shards import Chunks
from thunderhead.core.types import NonNegativeInt, PositiveFloat, PositiveInt
from thunderhead.corpus.files import nearest
from thunderhead.corpus.object_storage import ChunkCache, Remote, fetch_record, is_remote
from thunderhead.corpus.prefetch import Prefetcher
from thunderhead.corpus.sources import Share
from thunderhead.corpus.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


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


class PreparedShards(TokenDataModule):
    """Load batches from shards that lie somewhere already; nothing is prepared, and the tokenizer is theirs.

    A folder is read in place. From object storage, manifest, tokenizer and indices are fetched at the start, and each
    chunk as a whole when its first token is needed, or before that by a thread that knows the order. A chunk is
    compared with its sha256 before a token of it is used. Chunks are kept in `cache_dir`, where those that are longest
    unused are deleted for new ones; nothing else is ever deleted.

    Args:
        tokenizer: the trained one that lies beside the shards.
        context_length: as for `TokenDataModule`, as are all that are not listed here.
        path: a folder with manifest.json, or s3://bucket/prefix, gs://bucket/prefix,
            hf://datasets/owner/name/prefix, http(s)://host/prefix of one.
        sources: weights of a mixture, for all sources of the manifest by name; null: they weigh the same.
        cache_dir: folder for what is fetched from object storage; several runs may share it.
        cache_bytes: of chunks in `cache_dir`, at most.
        attempts: how often an object is asked for until the run is given up, with pauses of 1, 2, 4 … 30 s between.
        timeout: seconds without an answer, or with less than 10 kB a second of it, after which an attempt has failed.
        verify: first_use: see above. full: the same for all chunks at the start; from object storage, that fetches all.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        context_length: int,
        micro_batch_size: int,
        sequences_per_step: int,
        seed: int,
        *,
        path: str,
        sources: Mapping[str, Share] | None = None,
        cache_dir: str = "data/cache",
        cache_bytes: PositiveInt = 20_000_000_000,
        attempts: PositiveInt = 6,
        timeout: PositiveFloat = 30.0,
        max_training_tokens: PositiveInt | None = None,
        max_validation_tokens: PositiveInt = 65_536,
        shuffle_window: PositiveInt = 65_536,
        num_workers: NonNegativeInt = 0,
        temperature: PositiveFloat = 1.0,
        at_max_epochs: AtMaxEpochs = "redistribute",
        verify: Literal["full", "first_use"] = "first_use",
    ):
        super().__init__(
            tokenizer,
            context_length,
            micro_batch_size,
            sequences_per_step,
            seed,
            sources={},  # what the shards hold is known in `setup`
            max_training_tokens=max_training_tokens,
            max_validation_tokens=max_validation_tokens,
            shuffle_window=shuffle_window,
            num_workers=num_workers,
            temperature=temperature,
            at_max_epochs=at_max_epochs,
            verify=verify,
        )
        self._find = partial(find_prepared, path=path, cache_dir=cache_dir, attempts=attempts, timeout=timeout)
        self._remote = Remote(path, attempts=attempts, timeout=timeout) if is_remote(path) else None
        self._cache_bytes, self._shares = cache_bytes, sources or {}
        self._cache = ChunkCache(Path(cache_dir).absolute() / "chunks", cache_bytes)

    @override
    def prepare_data(self) -> None:
        """Fetch the manifest, if it was not given."""
        if self.manifest is None:
            self.manifest = self._find(None)

    @override
    def setup(self, stage: str) -> None:
        """Compare the shards with their manifest, of those in object storage all but the chunks.

        Raises:
            ValueError: they are damaged (a `ShardError`), too small for the context length, or data.cache_bytes is too
                small for the shuffling.
        """
        if self.manifest is None:  # `prepare_data` ran in another process
            self.manifest = self._find(None)
        self._weigh()
        super().setup(stage)

    def _weigh(self) -> None:
        assert self.manifest is not None
        self.sources = shares(self.manifest, self._shares)  # type: ignore[assignment]  # only their weights are used

    @override
    def _turns(self, steps: int) -> Turns:
        self._weigh()
        return super()._turns(steps)

    @override
    def _verify(self) -> None:
        assert self.manifest is not None
        if self._remote is None:
            verify(self.manifest, "full" if self.verify == "full" else "sizes")
            return
        self.manifest.load_tokenizer()
        check_cache(
            self.manifest,
            self.context_length,
            cache_bytes=self._cache_bytes,
            shuffle_window=self.shuffle_window,
            max_training_tokens=self.max_training_tokens,
        )
        for split, by_source in self.manifest.splits.items():
            for source, shard in by_source.items():
                verify_index(self.manifest.shard_folder(split, source), shard, self.manifest.dtype)
                for number in range(len(shard.chunks)) if self.verify == "full" else ():
                    self._chunks(split, source, shard).file(number)

    @override
    def _chunks(self, split: SplitName, source: str, shard: Shard) -> Chunks:
        if self._remote is None:
            return super()._chunks(split, source, shard)
        return CachedChunks(self._remote, self._cache, f"{source}/{split}", shard)

    @override
    def _dataset(
        self, split: SplitName, sources: Sequence[str], place: Callable[[int], tuple[str, int]], samples: int
    ) -> Blocks:
        blocks = super()._dataset(split, sources, place, samples)
        if self._remote is not None:
            assert self.manifest is not None
            assert self.trainer is not None
            if split == "train" and self.trainer.max_steps > 0:  # what comes after the run need not be fetched
                samples = min(samples, self.trainer.max_steps * self.sequences_per_step)
            blocks.prefetcher = Prefetcher(
                place,
                samples,
                blocks.readers,
                {source: self.manifest.splits[split][source] for source in sources},
                ahead=self.shuffle_window,
                max_bytes=self._cache_bytes // (2 if split == "train" else 4 * len(self.manifest.sources)),
                keep=partial(self._cache.keep, f"{split} of {', '.join(sources)}"),
            )
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
    available = {source: blocks(manifest, source, context_length) for source in manifest.splits["train"]}
    trained = trained_blocks(available, context_length, max_training_tokens)
    window = math.ceil(shuffle_window * sum(available.values()) / max(sum(trained.values()), 1))
    needed = 0
    for shard in manifest.splits["train"].values():
        largest = max(chunk.bytes for chunk in shard.chunks)
        window_bytes = window * context_length * np.dtype(manifest.dtype).itemsize
        needed += min(sum(chunk.bytes for chunk in shard.chunks), 2 * (window_bytes + 2 * largest))
    if cache_bytes < 2 * needed:
        raise ValueError(
            f"data.cache_bytes={cache_bytes} is too small to shuffle data.shuffle_window={shuffle_window} blocks of"
            f" {context_length} tokens: use at least {2 * needed}, or a smaller window"
        )
