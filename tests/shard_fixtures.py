import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from object_store import Store
from thunderhead.core.data.manifest import Chunk, Manifest, Shard
from thunderhead.core.tokenizer import Tokens
from thunderhead.corpus.preparation import Preparation
from thunderhead.corpus.prepare import prepare
from thunderhead.corpus.sources import LocalText
from thunderhead.corpus.trained_tokenizers import ByteTokenizer


def words(n_words: int, seed: int) -> str:
    """Text of lines of random words, so that no two documents are alike."""
    draw = random.Random(seed)
    vocabulary = ["token", "block", "chunk", "shard", "epoch", "order", "seed", "naïve", "数据", "cloud"]
    return "".join(draw.choice(vocabulary) + (" " if i % 8 else "\n") for i in range(1, n_words + 1))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of 60 text files of 200 words each."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i:03}.txt").write_text(words(200, seed=i))
    return folder


def find_manifest(*made_from: object, **settings: object) -> Manifest | None:
    """Look up the shards made from this, see `Preparation`."""
    return Preparation(*made_from, **settings).find()


def digest_of(folder: Path) -> dict[str, str]:
    """The files of a folder, by their names."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def files(folder: Path, shard: Shard) -> Callable[[int], Path]:
    """Say where the chunks of a shard lie, by their number."""
    return [folder / chunk.filename for chunk in shard.chunks].__getitem__


@pytest.fixture
def make_shards(tmp_path: Path, corpus: Path) -> Callable[..., Manifest]:
    """Prepare the corpus as bytes, in several small chunks."""

    def make(**settings: object) -> Manifest:
        defaults = {"shards_dir": tmp_path / "shards", "validation_fraction": 0.2, "chunk_bytes": 20_000}
        return prepare({"text": LocalText(path=str(corpus))}, ByteTokenizer(), **{**defaults, **settings})

    return make


@pytest.fixture
def chunk_tokens() -> Callable[[Path, Chunk], Tokens]:
    """Read a chunk by litdata's documented format, not by its code: counts and offsets of 4 bytes, then the tokens."""

    def read(folder: Path, chunk: Chunk) -> Tokens:
        return np.frombuffer((folder / chunk.filename).read_bytes(), dtype=np.uint16, offset=4 * (chunk.documents + 2))

    return read


@pytest.fixture
def flip() -> Callable[[Path], None]:
    """Flip one bit in the middle of a file."""

    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    return flip


@pytest.fixture
def shards(make_shards: Callable[..., Manifest], store: Store) -> Manifest:
    """The corpus in many small chunks, here and in s3://bucket/some/prefix."""
    manifest = make_shards(chunk_bytes=8_000)
    store.upload(manifest.folder, "bucket", "some/prefix")
    return manifest
