"""What a folder of shards holds, as the manifest beside them says.

In <shards_dir>/<key>/:

manifest.json                                           written last
tokenizer.json
reading.json                                            which files were read, passed over or skipped, and near
                                                        duplicates across the split
curation.json                                           what filters removed, if there were any
<source>/train/index.json, chunk-0-0.bin, chunk-0-1.bin …
<source>/val/…                                          the same, and documents.npy: bytes of text and tokens of each
"""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import StringConstraints, TypeAdapter, ValidationError

from thunderhead.core.config import first_fault
from thunderhead.core.tokenizer import MAX_VOCAB_SIZE, Tokenizer, dtype_for, load_tokenizer

FORMAT = 2  # raise when the same text would give other shards
SplitName = Literal["train", "val"]
REMEDY = "remove the shards' folder to prepare them anew, or copy it again from where it is whole"
# A manifest may come from elsewhere, and these become parts of paths.
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class ShardError(ValueError):
    """The shards are not what their manifest says."""


class MissingFileError(ShardError):
    """A file of the shards is not there."""


@dataclass(frozen=True)
class Chunk:
    """A file of tokens in litdata's format: 4-byte numbers (how many documents, where each begins, the end), tokens."""

    filename: FileName
    sha256: Sha256
    bytes: int
    tokens: int
    documents: int


@dataclass(frozen=True)
class Shard:
    """One split of one source. `bytes` counts the text, tokens include an EOS per document."""

    tokens: int
    documents: int
    bytes: int
    unigram_entropy: float
    """Nats a token of a model that knows only how frequent each token of this split is."""
    max_token_id: int
    index_sha256: str
    chunks: tuple[Chunk, ...]
    documents_sha256: str | None = None
    """Of documents.npy, which the validation split has."""

    def blocks(self, context_length: int) -> list[int]:
        """Count the blocks in each chunk.

        A block is context_length + 1 tokens and the next one begins context_length later, on the last token of the one
        before: each token but a chunk's first is a target once. What is left at the end of a chunk (fewer than
        context_length targets) is not used.
        """
        return [max(0, (chunk.tokens - 1) // context_length) for chunk in self.chunks]


@dataclass(frozen=True)
class TokenizerRecord:
    """Which tokenizer made the tokens: its kind, what was asked of it, and the hash of the trained one."""

    name: str
    settings: dict[str, Any]
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds. Made by `thunderhead.corpus.prepare`, never changed afterwards."""

    format: int
    key: str
    eos_id: int
    vocab_size: int
    max_token_id: int
    dtype: str
    tokenizer: TokenizerRecord
    split_rule: str
    validation_fraction: float
    sources: dict[FileName, dict[str, Any]]
    """Fingerprint of each source."""
    splits: dict[SplitName, dict[str, Shard]]
    """By split, then source."""
    curation: dict[str, Any] | None = None
    """The settings of the filters by name, and what they removed (as in curation.json); None: there were none."""
    folder: Path = field(default=Path(), compare=False)
    """Where it lies (of shards in object storage: the local copy of all but the chunks); not part of the file."""

    @classmethod
    def load(cls, folder: Path | str, file: Path | None = None) -> Self:
        """Read `folder`/manifest.json, or `file` that will become it.

        Raises MissingFileError if there is none, and ShardError if it is of another version or contradicts itself.
        """
        folder = Path(folder)
        file = file or folder / "manifest.json"
        content = b""
        try:
            content = file.read_bytes()
            manifest = TypeAdapter(cls).validate_python({**json.loads(content), "folder": folder})
        except FileNotFoundError:
            message = f"{folder} has no manifest.json, so it holds no shards, or half of them: {REMEDY}"
            raise MissingFileError(message) from None
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, TypeError, ValidationError) as error:
            beginning = content[:40].decode("utf-8", "replace")
            is_json = beginning.lstrip().startswith("{")
            why = first_fault(error) if isinstance(error, ValidationError) else str(error)
            reason = why if is_json else f"it begins with {beginning!r}, not with '{{'"
            raise ShardError(f"{file} is damaged ({reason}): {REMEDY}") from None
        if manifest.format != FORMAT:
            message = f"has format {manifest.format}, and this version of Thunderhead reads {FORMAT}: prepare anew"
            raise ShardError(f"{file} {message}")
        if manifest.dtype != (dtype := dtype_for(manifest.vocab_size)).name:
            needed = f"{manifest.vocab_size:,} tokens are told apart by {dtype}"
            raise ShardError(f"{file} says dtype {manifest.dtype}, but {needed}: {REMEDY}")
        shards = [shard for _, _, shard in manifest.shards()]
        if (
            set(manifest.splits) != {"train", "val"}
            or any(set(by_source) != set(manifest.sources) for by_source in manifest.splits.values())
            or any(sum(chunk.tokens for chunk in shard.chunks) != shard.tokens for shard in shards)
            or any(shard.documents_sha256 is None for shard in manifest.splits["val"].values())
            or max((shard.max_token_id for shard in shards), default=-1) != manifest.max_token_id
            or any(
                chunk.bytes != 4 * (chunk.documents + 2) + dtype.itemsize * chunk.tokens
                for shard in shards
                for chunk in shard.chunks
            )
            or not max(manifest.max_token_id, manifest.eos_id) < manifest.vocab_size <= MAX_VOCAB_SIZE
        ):
            raise ShardError(f"{file} contradicts itself: {REMEDY}")
        return manifest

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, as in the file."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}

    def shards(self) -> Iterator[tuple[SplitName, str, Shard]]:
        """Yield (split, source, shard) of all."""
        for split, by_source in self.splits.items():
            for source, shard in by_source.items():
                yield split, source, shard

    def load_tokenizer(self) -> Tokenizer:
        """Load the trained tokenizer that made these shards; ShardError if the file is missing or another one."""
        file = self.folder / "tokenizer.json"
        self.verify_tokenizer(file)
        return load_tokenizer(self.tokenizer.name, file.read_text(encoding="utf-8"))

    def verify_tokenizer(self, file: Path) -> None:
        """Compare a file with the tokenizer that made these shards; ShardError if it is missing or another one."""
        if not file.exists():
            raise MissingFileError(f"{file} is missing: {REMEDY}")
        if sha256_of(file) != self.tokenizer.sha256:
            raise ShardError(f"{file} is not the tokenizer that made these shards (its hash differs): {REMEDY}")

    def load_documents(self, source: str, file: Path | None = None) -> npt.NDArray[np.int64]:
        """Load how many bytes of text and tokens (EOS included) each held-out document of a source has, (documents, 2).

        Raises ShardError if the file is missing, another one, or contradicts the manifest.
        """
        file = file or self.shard_folder("val", source) / "documents.npy"
        shard = self.splits["val"][source]
        if not file.exists():
            raise MissingFileError(f"{file} is missing: {REMEDY}")
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != shard.documents_sha256:
            raise ShardError(f"{file} was changed since it was written: {REMEDY}")
        documents: npt.NDArray[np.int64] = np.load(io.BytesIO(content), allow_pickle=False)
        if documents.shape != (shard.documents, 2) or documents.sum(axis=0).tolist() != [shard.bytes, shard.tokens]:
            raise ShardError(f"{file} contradicts the manifest: {REMEDY}")
        return documents

    def shard_folder(self, split: SplitName, source: str) -> Path:
        """Name the folder of one split of one source."""
        return self.folder / source / split


def sha256_of(file: Path) -> str:
    """Hash a file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
