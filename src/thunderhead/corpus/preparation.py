"""All that shards are made from, and the name that follows from it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thunderhead.core.data.manifest import FORMAT, Manifest, ShardError
from thunderhead.core.tokenizer import Tokenizer
from thunderhead.corpus.curation import Filter
from thunderhead.corpus.sources import Source, named
from thunderhead.corpus.split import Split

CHUNK_BYTES = 64 * 2**20  # litdata's usual chunk: large enough to stream from object storage


@dataclass(frozen=True)
class Preparation:
    """All that shards are made from."""

    sources: Mapping[str, Source]  # by name; the names become folders
    tokenizer: Tokenizer  # trained or not, it is trained anew (on what the filters keep)
    shards_dir: str | Path  # where the folder of the shards will lie, named by what they are made from
    validation_fraction: float  # of the text, to hold out
    validation: str = "hash"  # how it is chosen: see `Split`
    near_duplicates_together: bool = False  # on one side of the split
    filters: Mapping[str, Filter] = field(default_factory=dict)  # which documents are kept: see curation.json
    chunk_bytes: int = CHUNK_BYTES

    @property
    def split(self) -> Split:
        return Split(self.validation, self.validation_fraction, self.near_duplicates_together)

    def fingerprints(self) -> dict[str, dict[str, Any]]:
        found = {}
        for name, source in self.sources.items():
            with named(name):
                found[name] = source.fingerprint()
        return found

    def key(self, fingerprints: dict[str, dict[str, Any]]) -> str:
        """Name the shards by all that they are made from, with a readable beginning."""
        made_from = {
            "format": FORMAT,
            "sources": fingerprints,
            "tokenizer": [self.tokenizer.name, self.tokenizer.settings],
            "split": self.split.settings(),
            "chunk_bytes": self.chunk_bytes,
        }
        if self.filters:
            made_from["filters"] = [[name, rule.settings()] for name, rule in self.filters.items()]
        digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        return f"{'+'.join(fingerprints)[:40]}-{self.tokenizer.name}-{digest[:12]}"

    def find(self) -> Manifest | None:
        """Look up the shards made from exactly this; None if there are none yet. Reads no text and writes nothing."""
        return load(Path(self.shards_dir) / self.key(self.fingerprints()))


def load(folder: Path) -> Manifest | None:
    """The shards in the folder of their name; None if there are none. ShardError for others, or where a file lies."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise ShardError(f"{folder} is a file, where a folder of shards would be: move it away")
    if not any(folder.iterdir()):
        return None
    manifest = Manifest.load(folder)
    if manifest.key != folder.name:
        raise ShardError(f"{folder} holds {manifest.key}, shards of something else: give the folder its own name back")
    return manifest
