"""Files of shards: written so that the same tokens give the same bytes, and compared with what was written.

litdata keeps no checksums: it reads flipped bytes, swapped chunks or a wrong dtype without complaint.
"""

import json
import warnings
from array import array
from pathlib import Path
from typing import Literal

import numpy as np

from thunderhead.core.data.manifest import REMEDY, Chunk, Manifest, MissingFileError, Shard, ShardError, sha256_of
from thunderhead.core.tokenizer import Tokens, dtype_for

# litdata's names for a one-dimensional numpy array, whose type it numbers by its own table.
DATA_FORMATS = {"uint16": "no_header_numpy:5", "uint32": "no_header_numpy:6"}


class ShardWriter:
    """Write documents of tokens into an empty folder, in their order and in this process: the same bytes every time.

    With `list_documents`, documents.npy says how many bytes of text and tokens each has, (documents, 2) of int64.
    """

    def __init__(self, folder: Path, *, vocab_size: int, chunk_bytes: int, list_documents: bool = False):
        from litdata.streaming.item_loader import TokensLoader  # half a second, which reading shards does not need
        from litdata.streaming.writer import BinaryWriter

        folder.mkdir(parents=True)
        self._folder = folder
        self._writer = BinaryWriter(str(folder), chunk_bytes=chunk_bytes, item_loader=TokensLoader())
        self._writer._rank = 0  # else it numbers files by torch.distributed's rank, and waits for all ranks
        self._dtype = dtype_for(vocab_size)
        self._counts = np.zeros(vocab_size, dtype=np.int64)
        self._documents = self._bytes = self.tokens = 0
        self._listed = array("q") if list_documents else None

    def add(self, tokens: Tokens, n_bytes: int) -> None:
        """Add a document (EOS included) that stands for `n_bytes` of text."""
        assert tokens.dtype == self._dtype  # litdata would write a mixture of types without complaint
        with warnings.catch_warnings(action="ignore"):  # a document larger than a chunk gets a larger chunk: no harm
            self._writer.add_item(self._documents, tokens)
        np.add.at(self._counts, tokens, 1)  # bincount takes as long as the vocabulary is large
        self._documents += 1
        self.tokens += len(tokens)
        self._bytes += n_bytes
        if self._listed is not None:
            self._listed.extend((n_bytes, len(tokens)))

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
        file.write_text(json.dumps(index, sort_keys=True), encoding="utf-8")
        chunks = []
        for chunk in index["chunks"]:
            sha256 = sha256_of(self._folder / chunk["filename"])
            chunks.append(Chunk(chunk["filename"], sha256, chunk["chunk_bytes"], chunk["dim"], chunk["chunk_size"]))
        documents = self._folder / "documents.npy"
        if self._listed is not None:
            np.save(documents, np.array(self._listed, dtype="<i8").reshape(-1, 2))
        seen = self._counts[self._counts > 0]
        return Shard(
            tokens=self.tokens,
            documents=self._documents,
            bytes=self._bytes,
            unigram_entropy=float(np.log(self.tokens) - (seen * np.log(seen)).sum() / self.tokens),
            max_token_id=int(np.flatnonzero(self._counts)[-1]),
            index_sha256=sha256_of(file),
            chunks=tuple(chunks),
            documents_sha256=None if self._listed is None else sha256_of(documents),
        )


def verify(manifest: Manifest, level: Literal["full", "sizes"] = "full") -> None:
    """Compare all but the chunks, each chunk's size and (full) sha256; a ShardError names the file and its fault."""
    manifest.load_tokenizer()
    for source in manifest.sources:
        manifest.load_documents(source)
    for split, source, shard in manifest.shards():
        folder = manifest.shard_folder(split, source)
        verify_index(folder / "index.json", shard)
        for chunk in shard.chunks:
            verify_chunk(folder / chunk.filename, shard, chunk, level)


def verify_index(file: Path, shard: Shard) -> None:
    """Compare litdata's index of a shard, which also names the type of the tokens, with the manifest."""
    if not file.exists():
        raise MissingFileError(f"{file} is missing: {REMEDY}")
    if sha256_of(file) != shard.index_sha256:
        raise ShardError(f"{file} was changed since it was written: {REMEDY}")


def verify_chunk(file: Path, shard: Shard, chunk: Chunk, level: Literal["full", "sizes"] = "full") -> None:
    """Compare a file with what the manifest says about a chunk of a shard."""
    if not file.exists():
        raise MissingFileError(f"{file} is missing, the shards are incomplete: {REMEDY}")
    size = file.stat().st_size
    if level == "sizes" and size == chunk.bytes:
        return
    digest = sha256_of(file)
    if digest == chunk.sha256:
        return
    if other := [known.filename for known in shard.chunks if known.sha256 == digest]:
        raise ShardError(f"{file} holds what {other[0]} should hold: {REMEDY}")
    if size != chunk.bytes:
        raise ShardError(f"{file} has {size} bytes, {chunk.bytes} were written: {REMEDY}")
    raise ShardError(f"{file} holds other bytes than were written (its hash differs): {REMEDY}")


class VerifiedChunks:
    """Say where the chunks of a shard in a folder lie; each is compared with its sha256 before it is first used."""

    def __init__(self, folder: Path, shard: Shard):
        self._folder, self._shard = folder.absolute(), shard
        self._unverified = set(range(len(shard.chunks)))

    def __call__(self, number: int) -> Path:
        chunk = self._shard.chunks[number]
        file = self._folder / chunk.filename
        if number in self._unverified:
            verify_chunk(file, self._shard, chunk)
            self._unverified.remove(number)
        return file
