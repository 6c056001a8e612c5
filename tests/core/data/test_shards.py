import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shard_fixtures import files
from thunderhead.core.data.manifest import Chunk, Manifest, ShardError
from thunderhead.core.data.shards import ShardReader
from thunderhead.core.tokenizer import Tokens
from thunderhead.corpus.shard_files import ShardWriter, VerifiedChunks, verify_chunk, verify_index

MakeShards = Callable[..., Manifest]
ChunkTokens = Callable[[Path, Chunk], Tokens]


@pytest.mark.parametrize("context_length", [1, 7, 64, 1000])
def test_no_target_is_lost(make_shards: MakeShards, chunk_tokens: ChunkTokens, context_length: int) -> None:
    manifest = make_shards()
    shard, folder = manifest.splits["train"]["text"], manifest.shard_folder("train", "text")
    reader = ShardReader(files(folder, shard), shard, context_length, manifest.dtype)
    block = 0
    for chunk, n_blocks in zip(shard.chunks, shard.blocks(context_length), strict=True):
        tokens = chunk_tokens(folder, chunk)
        targets = [reader.view(block + i)[1:] for i in range(n_blocks)]
        inputs = [reader.view(block + i)[:-1] for i in range(n_blocks)]
        used = n_blocks * context_length
        assert len(tokens) - 1 - used < context_length
        assert np.array_equal(np.concatenate(targets), tokens[1 : 1 + used])
        assert np.array_equal(np.concatenate(inputs), tokens[:used])
        block += n_blocks
    assert block == len(reader)
    assert reader.view(0).dtype == np.uint16


def test_a_context_longer_than_a_chunk_gives_no_blocks(make_shards: MakeShards) -> None:
    shard = make_shards().splits["val"]["text"]
    longest = max(chunk.tokens for chunk in shard.chunks)
    assert sum(shard.blocks(longest)) == 0
    assert sum(shard.blocks(longest - 1)) >= 1


def test_chunks_without_a_block_are_stepped_over(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "shard", vocab_size=2000, chunk_bytes=2)  # every document is a chunk
    lengths = [50, 3, 3, 41, 10]
    for i, length in enumerate(lengths):
        writer.add(np.arange(length, dtype=np.uint16) + 100 * i, length)
    shard = writer.close()
    reader = ShardReader(files(tmp_path / "shard", shard), shard, 10, "uint16")
    assert shard.blocks(10) == [4, 0, 0, 4, 0]
    assert [reader.view(i)[0] for i in range(len(reader))] == [0, 10, 20, 30, 300, 310, 320, 330]


def test_first_use_is_verified_before_a_token_is_read(make_shards: MakeShards, flip: Callable[[Path], None]) -> None:
    manifest = make_shards()
    shard, folder = manifest.splits["train"]["text"], manifest.shard_folder("train", "text")
    flip(folder / shard.chunks[1].filename)
    reader = ShardReader(VerifiedChunks(manifest.shard_folder("train", "text"), shard), shard, 64, manifest.dtype)
    first = shard.blocks(64)[0]
    reader.view(first - 1)
    with pytest.raises(ShardError, match="other bytes than were written"):
        reader.view(first)
    verify_chunk(folder / shard.chunks[0].filename, shard, shard.chunks[0])


def test_a_reader_can_be_sent_to_another_process(make_shards: MakeShards) -> None:
    manifest = make_shards()
    shard = manifest.splits["val"]["text"]
    reader = ShardReader(files(manifest.shard_folder("val", "text"), shard), shard, 16, manifest.dtype)
    expected = reader.view(3)
    assert np.array_equal(pickle.loads(pickle.dumps(reader)).view(3), expected)


def test_a_document_larger_than_a_chunk_is_written_whole(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "shard", vocab_size=10, chunk_bytes=100)
    writer.add(np.ones(1000, dtype=np.uint16), 1000)
    writer.add(np.ones(5, dtype=np.uint16), 5)
    shard = writer.close()
    assert [chunk.tokens for chunk in shard.chunks] == [1000, 5]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(10, np.int64), (2**16, np.uint32), (2**16 + 1, np.uint16)])
def test_only_the_type_of_the_vocabulary_is_written(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    writer = ShardWriter(tmp_path / "shard", vocab_size=vocab_size, chunk_bytes=100)
    with pytest.raises(AssertionError):
        writer.add(np.ones(5, dtype=dtype), 5)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32"), (200_019, "uint32")])
def test_every_id_of_a_vocabulary_is_read_back(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    tokens = np.random.default_rng(0).integers(0, vocab_size, 1000).astype(dtype)
    tokens[:2] = 0, vocab_size - 1
    writer = ShardWriter(tmp_path / "shard", vocab_size=vocab_size, chunk_bytes=800)
    for start in range(0, 1000, 100):
        writer.add(tokens[start : start + 100], 100)
    shard = writer.close()
    assert len(shard.chunks) > 1
    assert [chunk.bytes for chunk in shard.chunks] == [
        (tmp_path / "shard" / chunk.filename).stat().st_size for chunk in shard.chunks
    ]
    assert shard.max_token_id == vocab_size - 1
    verify_index(tmp_path / "shard" / "index.json", shard)
    reader = ShardReader(files(tmp_path / "shard", shard), shard, 99, dtype)
    read = np.concatenate([reader.view(i) for i in range(len(reader))])
    starts = np.cumsum([0] + [chunk.tokens for chunk in shard.chunks])
    expected = [
        tokens[start + i * 99 : start + i * 99 + 100]
        for start, n_blocks in zip(starts, shard.blocks(99), strict=False)
        for i in range(n_blocks)
    ]
    assert np.array_equal(read, np.concatenate(expected))
    assert read.dtype == np.dtype(dtype)
