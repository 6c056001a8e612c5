"""Tokens on the disk: writing litdata chunks, and reading blocks of tokens back by their number."""

import bisect
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from litdata import StreamingDataset
from litdata.streaming.item_loader import Interval
from litdata.streaming.item_loader import TokensLoader as LitdataTokensLoader
from litdata.streaming.sampler import ChunkedIndex
from litdata.streaming.writer import BinaryWriter

from thunderhead.data.manifest import DATA_FORMAT, Chunk, Shard, sha256_of, verify_chunk
from thunderhead.data.tokenizer import DTYPE, Tokens

CHUNK_BYTES = 64 * 2**20  # litdata's usual chunk: large enough to stream from object storage


class ShardWriter:
    """Write documents of tokens into an empty folder, in their order and in this process: the same bytes every time."""

    def __init__(self, folder: Path, *, vocab_size: int, chunk_bytes: int):
        folder.mkdir(parents=True)
        self._folder = folder
        self._writer = BinaryWriter(str(folder), chunk_bytes=chunk_bytes, item_loader=LitdataTokensLoader())
        self._writer._rank = 0  # else it numbers files by torch.distributed's rank, and waits for all ranks
        self._counts = np.zeros(vocab_size, dtype=np.int64)
        self._documents = self._bytes = self.tokens = 0

    def add(self, tokens: Tokens, n_bytes: int) -> None:
        """Add a document (EOS included) that stands for `n_bytes` of text."""
        assert tokens.dtype == DTYPE  # litdata would write a mixture of types without complaint
        with warnings.catch_warnings(action="ignore"):  # a document larger than a chunk gets a larger chunk: no harm
            self._writer.add_item(self._documents, tokens)
        self._counts += np.bincount(tokens, minlength=len(self._counts))
        self._documents += 1
        self.tokens += len(tokens)
        self._bytes += n_bytes

    def close(self) -> Shard | None:
        """Write what is left; None if there was no document."""
        if self._documents == 0:
            return None
        with warnings.catch_warnings(action="ignore"):
            self._writer.done()
        self._writer._merge_no_wait()
        file = self._folder / "index.json"
        index = json.loads(file.read_bytes())
        index["updated_at"] = "0"  # litdata puts the time here; without it the same text gives the same bytes
        assert index["config"]["data_format"] == [DATA_FORMAT]
        file.write_text(json.dumps(index, sort_keys=True))
        chunks = tuple(
            Chunk(
                filename=chunk["filename"],
                sha256=sha256_of(self._folder / chunk["filename"]),
                bytes=chunk["chunk_bytes"],
                tokens=chunk["dim"],
                documents=chunk["chunk_size"],
            )
            for chunk in index["chunks"]
        )
        seen = self._counts[self._counts > 0]
        return Shard(
            tokens=self.tokens,
            documents=self._documents,
            bytes=self._bytes,
            unigram_entropy=float(np.log(self.tokens) - (seen * np.log(seen)).sum() / self.tokens),
            max_token_id=int(np.flatnonzero(self._counts)[-1]),
            index_sha256=sha256_of(file),
            chunks=chunks,
        )


# --- reading ---------------------------------------------------------------------------------------------------------


def blocks_per_chunk(shard: Shard, context_length: int) -> list[int]:
    """Count the blocks in each chunk.

    A block is context_length + 1 tokens and the next one begins context_length later, on the last token of the one
    before: each token but a chunk's first is a target once. What is left at the end of a chunk (fewer than
    context_length targets) is not used.
    """
    return [max(0, (chunk.tokens - 1) // context_length) for chunk in shard.chunks]


class TokensLoader(LitdataTokensLoader):  # type: ignore[misc]  # litdata has no types; it compares the class's name
    """litdata's reader of tokens, with blocks that share a token instead of losing a target between them."""

    _KEEP = 64  # open chunks: litdata's own 4 would be opened again and again when a shuffle window spans more

    def set_posix_fast(self, enabled: bool, keep: int = _KEEP, *, willneed: bool = True) -> None:
        """Keep more chunks open."""
        super().set_posix_fast(enabled, max(keep, self._KEEP), willneed=willneed)

    def generate_intervals(self) -> list[Interval]:
        """Number the blocks: (begin, begin, end, end) for each chunk."""
        intervals, begin = [], 0
        for chunk in self._chunks:
            end = begin + max(0, (chunk["dim"] - 1) // self._block_size)
            intervals.append(Interval(begin, begin, end, end))
            begin = end
        return intervals

    def load_item_from_chunk(
        self, index: int, chunk_index: int, chunk_filepath: str, begin: int, filesize_bytes: int
    ) -> Tokens:
        """Read a block: context_length + 1 tokens."""
        if chunk_index not in self._buffers:  # litdata's own method waits for the file and maps it
            super().load_item_from_chunk(index, chunk_index, chunk_filepath, begin, filesize_bytes)
        offset = (index - begin) * self._block_size * np.dtype(DTYPE).itemsize
        buffer = self._buffers[chunk_index]
        block: Tokens = np.frombuffer(buffer, dtype=DTYPE, count=self._block_size + 1, offset=offset)
        return block.copy()  # the map may be closed before the block is used


class ShardReader:
    """Read blocks of tokens by their number, in the order in which they lie in the shard.

    Args:
        folder: the shard.
        shard: what the manifest says about it.
        context_length: a block is one token longer.
        verify_on_first_use: compare each chunk's sha256 with the manifest before its first token is used.
    """

    def __init__(self, folder: Path, shard: Shard, context_length: int, *, verify_on_first_use: bool = False):
        self._folder, self._shard, self._context_length = folder, shard, context_length
        sizes = blocks_per_chunk(shard, context_length)
        self._ends: list[int] = np.cumsum(sizes).tolist()
        self._unverified = set(range(len(sizes))) if verify_on_first_use else set()
        self._dataset: StreamingDataset | None = None

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, block: int) -> Tokens:
        """Read block `block`: (context_length + 1,) token ids."""
        chunk = bisect.bisect_right(self._ends, block)
        if chunk in self._unverified:
            verify_chunk(self._folder, self._shard, self._shard.chunks[chunk])
            self._unverified.remove(chunk)
        if self._dataset is None:  # opened where it is used: in this process or in a worker
            self._dataset = StreamingDataset(
                str(self._folder.absolute()), item_loader=TokensLoader(self._context_length)
            )
        tokens: Tokens = self._dataset[ChunkedIndex(block, chunk)]
        return tokens

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dataset": None}
