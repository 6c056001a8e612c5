"""Tokens on the disk, read by the number of their block."""

import bisect
import contextlib
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from thunderhead.core.data.manifest import MissingFileError, Shard
from thunderhead.core.tokenizer import Tokens


class ShardReader:
    """Read blocks of tokens by their number, in the order in which they lie in the shard.

    A chunk is mapped into memory when its first block is read: litdata's StreamingDataset reads the same files, at
    half the speed (docs/decisions/0020). `file` says where a chunk lies, by its number; it may be gone again when it is
    opened. A block is one token longer than context_length.
    """

    _KEEP = 16  # chunks that stay open; a window of the order spans three of the usual size at a context of 1024

    def __init__(self, file: Callable[[int], Path], shard: Shard, context_length: int, dtype: str):
        self.file, self._shard, self._context_length = file, shard, context_length
        self._dtype = np.dtype(dtype)
        self._ends: list[int] = np.cumsum(shard.blocks(context_length)).tolist()
        self._open: dict[int, Tokens] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def chunk_of(self, block: int) -> int:
        """Number the chunk that holds a block."""
        return bisect.bisect_right(self._ends, block)

    def view(self, block: int) -> Tokens:
        """Return block `block`, (context_length + 1,) token ids, where they lie: read-only, and read when looked at."""
        chunk = bisect.bisect_right(self._ends, block)
        tokens = self._open.get(chunk)
        if tokens is None:
            tokens = self._map(chunk)
        start = (block - (self._ends[chunk - 1] if chunk else 0)) * self._context_length
        return tokens[start : start + self._context_length + 1]

    def _map(self, number: int) -> Tokens:
        """Map the tokens of a chunk, and let the one go that was mapped first if there are too many."""
        while len(self._open) >= self._KEEP:
            del self._open[next(iter(self._open))]
        chunk = self._shard.chunks[number]
        for _ in range(3):
            path = self.file(number)
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                first = chunk.bytes - chunk.tokens * self._dtype.itemsize
                tokens: Tokens = np.frombuffer(mapped, self._dtype, offset=first)
                self._open[number] = tokens
                return tokens
        raise MissingFileError(f"{path} was deleted while it was in use")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}
