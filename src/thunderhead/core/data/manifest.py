"""What a folder of shards must hold, and the comparison with what it does hold.

    <shards_dir>/<key>/manifest.json            written last
                      /tokenizer.json
                      /curation.json            what filters removed, if there were any
                      /<source>/train/index.json, chunk-0-0.bin, chunk-0-1.bin …
                      /<source>/val/…

litdata keeps no checksums: flipped bytes, swapped chunks or a wrong dtype it reads without complaint. `verify` finds
them.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import StringConstraints, TypeAdapter, ValidationError

from thunderhead.corpus.tokenizer import MAX_VOCAB_SIZE, Tokenizer, dtype_for, load_tokenizer

FORMAT = 1  # raise when the same text would give other shards
# litdata's names for a one-dimensional numpy array, whose type it numbers by its own table.
DATA_FORMATS = {"uint16": "no_header_numpy:5", "uint32": "no_header_numpy:6"}
SplitName = Literal["train", "val"]
REMEDY = "remove the shards' folder to prepare them anew, or copy it again from where it is whole"
# A manifest may come from elsewhere, and these become parts of paths.
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class ShardError(ValueError):
    """The shards are not what their manifest says."""


class MissingManifestError(ShardError):
    """A folder of shards has no manifest.json."""


class DamagedManifestError(ShardError):
    """manifest.json cannot be read, or contradicts itself."""


class ForeignTokenizerError(ShardError):
    """The shards were made with another tokenizer than the one asked for, or the one that lies beside them."""


class WrongDtypeError(ShardError):
    """The manifest names another type of token than its vocabulary needs, or the index of a shard another one."""


class DamagedIndexError(ShardError):
    """The index of a shard is missing or was changed."""


class MissingChunkError(ShardError):
    """A chunk is not there."""


class TruncatedChunkError(ShardError):
    """A chunk has another size than when it was written."""


class SwappedChunkError(ShardError):
    """A chunk holds what another one should hold."""


class DamagedChunkError(ShardError):
    """A chunk has the right size and other bytes than were written."""


@dataclass(frozen=True)
class Chunk:
    """A file of tokens; `bytes` is its size."""

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
    def load(cls, folder: Path | str) -> Self:
        """Read `folder`/manifest.json.

        Raises:
            MissingManifestError: there is none.
            DamagedManifestError: it is not a manifest of this version, or contradicts itself.
            WrongDtypeError: its type of tokens is not that of its vocabulary.
        """
        folder = Path(folder)
        file = folder / "manifest.json"
        try:
            content = {**json.loads(file.read_bytes()), "folder": folder}
            manifest = TypeAdapter(cls).validate_python(content)
        except FileNotFoundError:
            raise MissingManifestError(
                f"{folder} has no manifest.json, so it holds no shards, or half of them: {REMEDY}"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, ValidationError) as error:
            reason = str(error).replace("\n", " ")
            raise DamagedManifestError(f"{file} is damaged ({reason}): {REMEDY}") from None
        shards = [shard for by_source in manifest.splits.values() for shard in by_source.values()]
        if manifest.format != FORMAT:
            raise DamagedManifestError(
                f"{file} has format {manifest.format}, and this version of Thunderhead reads {FORMAT}: prepare anew"
            )
        if manifest.dtype != (dtype := dtype_for(manifest.vocab_size).name):
            raise WrongDtypeError(
                f"{file} says dtype {manifest.dtype}, but {manifest.vocab_size:,} tokens are told apart by {dtype}:"
                f" {REMEDY}"
            )
        if (
            set(manifest.splits) != {"train", "val"}
            or any(set(by_source) != set(manifest.sources) for by_source in manifest.splits.values())
            or any(sum(chunk.tokens for chunk in shard.chunks) != shard.tokens for shard in shards)
            or max((shard.max_token_id for shard in shards), default=-1) != manifest.max_token_id
            or any(chunk.bytes != chunk_bytes(chunk, dtype) for shard in shards for chunk in shard.chunks)
            or not max(manifest.max_token_id, manifest.eos_id) < manifest.vocab_size <= MAX_VOCAB_SIZE
        ):
            raise DamagedManifestError(f"{file} contradicts itself: {REMEDY}")
        return manifest

    def save(self, folder: Path) -> Self:
        """Write manifest.json into `folder`, and return the manifest as one that lies there."""
        content = asdict(self)
        del content["folder"]
        (folder / "manifest.json").write_text(json.dumps(content, indent=1) + "\n")
        return type(self)(**{**self.__dict__, "folder": folder})

    def summary(self) -> dict[str, Any]:
        """Return all but the chunks, as plain values: the record of a run says what it was trained on."""
        content = asdict(self)
        del content["folder"]
        for by_source in content["splits"].values():
            for shard in by_source.values():
                del shard["chunks"]
        return content

    def load_tokenizer(self) -> Tokenizer:
        """Load the trained tokenizer that made these shards.

        Raises:
            ForeignTokenizerError: tokenizer.json is missing or is not the one of the manifest.
        """
        file = self.folder / "tokenizer.json"
        if not file.exists() or sha256_of(file) != self.tokenizer.sha256:
            what = "is not the tokenizer that made these shards (its hash differs)" if file.exists() else "is missing"
            raise ForeignTokenizerError(f"{file} {what}: {REMEDY}")
        return load_tokenizer(self.tokenizer.name, file.read_text())

    def check_blocks(self, context_length: int) -> None:
        """Refuse shards that are too small for the context length.

        Raises:
            ValueError: a split of a source has no full block; says what to change.
        """
        for split, by_source in self.splits.items():
            for source, shard in by_source.items():
                if any(shard.blocks(context_length)):
                    continue
                name, change = ("validation", "raise") if split == "val" else ("training", "lower")
                cut = self.sources[source].get("max_document_bytes")
                smaller = f", lower data.sources.{source}.max_document_bytes={cut}" if cut and split == "val" else ""
                raise ValueError(
                    f"data.sources.{source}: the {name} split has {shard.tokens} tokens, too few for one block of"
                    f" model.context_length + 1 = {context_length + 1}: lower model.context_length, {change}"
                    f" data.validation_fraction={self.validation_fraction}{smaller}, or give more text"
                )

    def shard_folder(self, split: SplitName, source: str) -> Path:
        """Name the folder of one split of one source."""
        return self.folder / source / split


def verify(manifest: Manifest, level: Literal["full", "sizes"] = "full") -> None:
    """Compare the files with the manifest: tokenizer, indices, and each chunk's size and (full) sha256.

    Raises:
        ShardError: one of its subclasses, naming the file.
    """
    manifest.load_tokenizer()
    for split, by_source in manifest.splits.items():
        for source, shard in by_source.items():
            folder = manifest.shard_folder(split, source)
            verify_index(folder, shard, manifest.dtype)
            for chunk in shard.chunks:
                verify_chunk(folder / chunk.filename, shard, chunk, level)


def verify_index(folder: Path, shard: Shard, dtype: str) -> None:
    """Compare litdata's index of a shard with the manifest and its type of tokens; raises as `verify` does."""
    file = folder / "index.json"
    if not file.exists():
        raise DamagedIndexError(f"{file} is missing: {REMEDY}")
    try:
        data_format = json.loads(file.read_bytes())["config"]["data_format"]
    except (ValueError, KeyError, TypeError):
        data_format = None
    if data_format is not None and data_format != [DATA_FORMATS[dtype]]:
        raise WrongDtypeError(
            f"{file} says tokens are {data_format}, the manifest says {dtype} ({DATA_FORMATS[dtype]}): {REMEDY}"
        )
    if sha256_of(file) != shard.index_sha256:
        raise DamagedIndexError(f"{file} was changed since it was written: {REMEDY}")


def verify_chunk(file: Path, shard: Shard, chunk: Chunk, level: Literal["full", "sizes"] = "full") -> None:
    """Compare a file with what the manifest says about a chunk of a shard; raises as `verify` does."""
    if not file.exists():
        raise MissingChunkError(f"{file} is missing, the shards are incomplete: {REMEDY}")
    size = file.stat().st_size
    if level == "sizes" and size == chunk.bytes:
        return
    digest = sha256_of(file)
    if digest == chunk.sha256:
        return
    if other := [known.filename for known in shard.chunks if known.sha256 == digest]:
        raise SwappedChunkError(f"{file} holds what {other[0]} should hold: {REMEDY}")
    if size != chunk.bytes:
        raise TruncatedChunkError(f"{file} has {size} bytes, {chunk.bytes} were written: {REMEDY}")
    raise DamagedChunkError(f"{file} holds other bytes than were written (its hash differs): {REMEDY}")


def chunk_bytes(chunk: Chunk, dtype: str) -> int:
    """Size of a chunk in litdata's format: the number of documents, where each begins and the last ends, the tokens."""
    return 4 * (chunk.documents + 2) + np.dtype(dtype).itemsize * chunk.tokens


def sha256_of(file: Path) -> str:
    """Hash a file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
