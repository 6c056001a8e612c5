"""Tokens on the disk: writing litdata chunks, and reading blocks of tokens back by their number."""

import bisect
import contextlib
import json
import mmap
import warnings
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from litdata.streaming.item_loader import TokensLoader
from litdata.streaming.writer import BinaryWriter

from thunderhead.core.data.manifest import DATA_FORMATS, Chunk, MissingChunkError, Shard, sha256_of, verify_chunk
from thunderhead.corpus.tokenizer import Tokens, dtype_for

CHUNK_BYTES = 64 * 2**20  # litdata's usual chunk: large enough to stream from object storage


class ShardWriter:
    """Write documents of tokens into an empty folder, in their order and in this process: the same bytes every time."""

    def __init__(self, folder: Path, *, vocab_size: int, chunk_bytes: int):
        folder.mkdir(parents=True)
        self._folder = folder
        self._writer = BinaryWriter(str(folder), chunk_bytes=chunk_bytes, item_loader=TokensLoader())
        self._writer._rank = 0  # else it numbers files by torch.distributed's rank, and waits for all ranks
        self._dtype = dtype_for(vocab_size)
        self._counts = np.zeros(vocab_size, dtype=np.int64)
        self._documents = self._bytes = self.tokens = 0

    def add(self, tokens: Tokens, n_bytes: int) -> None:
        """Add a document (EOS included) that stands for `n_bytes` of text."""
        assert tokens.dtype == self._dtype  # litdata would write a mixture of types without complaint
        with warnings.catch_warnings(action="ignore"):  # a document larger than a chunk gets a larger chunk: no harm
            self._writer.add_item(self._documents, tokens)
        np.add.at(self._counts, tokens, 1)  # bincount takes as long as the vocabulary is large
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
        assert index["config"]["data_format"] == [DATA_FORMATS[self._dtype.name]]
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


class Chunks(Protocol):
    """The chunks of a shard, wherever they lie."""

    def file(self, number: int) -> Path:
        """Return the file of a chunk, verified as far as it was asked for; it may be gone again when it is opened."""


class LocalChunks:
    """The chunks of a shard in a local folder, which are read where they lie.

    Args:
        folder: the shard.
        shard: what the manifest says about it.
        verify_on_first_use: compare each chunk's sha256 with the manifest before its first token is used.
    """

    def __init__(self, folder: Path, shard: Shard, *, verify_on_first_use: bool = False):
        self._folder, self._shard = folder.absolute(), shard
        self._unverified = set(range(len(shard.chunks))) if verify_on_first_use else set()

    def file(self, number: int) -> Path:
        """Return the file of a chunk; raises as `verify_chunk` does."""
        file = self._folder / self._shard.chunks[number].filename
        if number in self._unverified:
            verify_chunk(file, self._shard, self._shard.chunks[number])
            self._unverified.remove(number)
        return file


class ShardReader:
    """Read blocks of tokens by their number, in the order in which they lie in the shard.

    A chunk is mapped into memory when its first block is read: litdata's StreamingDataset reads the same files, at
    half the speed (docs/decisions/0020).

    Args:
        chunks: where the files are.
        shard: what the manifest says about them.
        context_length: a block is one token longer.
        dtype: of the tokens, as the manifest says.
    """

    _KEEP = 16  # chunks that stay open; a window of the order spans three of the usual size at a context of 1024

    def __init__(self, chunks: Chunks, shard: Shard, context_length: int, dtype: str):
        self.chunks, self._shard, self._context_length = chunks, shard, context_length
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
        first = chunk.bytes - chunk.tokens * self._dtype.itemsize
        for _ in range(3):
            path = self.chunks.file(number)
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                tokens: Tokens = np.frombuffer(mapped, self._dtype, offset=first)
                self._open[number] = tokens
                return tokens
        raise MissingChunkError(f"{path} was deleted while it was in use")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}
