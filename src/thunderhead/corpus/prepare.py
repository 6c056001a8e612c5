"""From sources and a tokenizer to shards: prepared once, found again by what they were made from.

What one call has done is kept beside the place of the shards until they are complete, so that the next call goes on
where a killed one stopped:

    <shards_dir>/.<key>.preparing/inspected, kept, curation.json      what filters found and decided, if there are any
                                 /tokenizer.json                      trained
                                 /encoded                             the tokens of each batch of documents
                                 /shards/…                            becomes <shards_dir>/<key>
"""

import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from thunderhead.core.data.manifest import FORMAT, Manifest, Shard, ShardError, SplitName, TokenizerRecord
from thunderhead.core.processes import allowed_cores
from thunderhead.core.tokenizer import Tokenizer
from thunderhead.corpus.batch_processing import SPLIT_RULE, Encode, Inspect, is_validation, remembered
from thunderhead.corpus.curation import Filter, Removals, first_reason
from thunderhead.corpus.document_batches import CHANGED, check_sources, named, read_batches
from thunderhead.corpus.preparation_progress import Passes
from thunderhead.corpus.shard_files import CHUNK_BYTES, ShardWriter
from thunderhead.corpus.sources import Source
from thunderhead.training.record import write_text

_MARKER = ".thunderhead-shards"  # lies in every folder that is made here: others are never deleted
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preparation:
    """All that shards are made from.

    Args:
        sources: by name; the names become folders.
        tokenizer: trained or not, it is trained anew (on what the filters keep).
        shards_dir: where the folder of the shards will lie, named by what they are made from.
        validation_fraction: share of the documents (chosen by hash) to hold out.
        filters: decide in their order which documents of all sources are kept; what goes is told by curation.json.
        chunk_bytes: size of the chunk files.
    """

    sources: Mapping[str, Source]
    tokenizer: Tokenizer
    shards_dir: str | Path
    validation_fraction: float
    filters: Mapping[str, Filter] = field(default_factory=dict)
    chunk_bytes: int = CHUNK_BYTES

    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """Say of each source what its documents depend on."""
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
            "split": [SPLIT_RULE, self.validation_fraction],
            "chunk_bytes": self.chunk_bytes,
        }
        if self.filters:
            made_from["filters"] = [[name, rule.settings()] for name, rule in self.filters.items()]
        digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        return f"{'+'.join(fingerprints)[:40]}-{self.tokenizer.name}-{digest[:12]}"

    def find(self) -> Manifest | None:
        """Look up the shards made from exactly this; None if there are none yet. Reads no text and writes nothing.

        Raises:
            ValueError: a source has nothing to read.
            ShardError: the place of the shards holds something else, a damaged manifest, or one of another tokenizer.
        """
        folder = Path(self.shards_dir) / self.key(self.fingerprints())
        if not folder.exists() or not any(folder.iterdir()):
            return None
        manifest = Manifest.load(folder)
        made_with, asked = manifest.tokenizer, self.tokenizer
        if (made_with.name, made_with.settings) != (asked.name, asked.settings):
            made = f"was made with the tokenizer {made_with.name} {made_with.settings}"
            raise ShardError(f"{folder} {made}, not {asked.name} {asked.settings}: remove it")
        return manifest

    def run(self, processes: int | None = None) -> Manifest:
        """Train the tokenizer on the training split, and write the shards; or return those that are there already.

        The shards appear under their name when they are complete. A call that is killed leaves what it has done, and
        the next one for the same shards goes on from there (on the disk, that takes as much again as the shards). Of
        several calls at a time one prepares, the others wait. Memory does not grow with the corpus. The same input
        gives the same bytes, whatever the number of processes and however often it was killed.

        Args:
            processes: how many tokenize; None: one for each core. One works in this process.

        Raises:
            ValueError: a source is unreadable (see `check_sources`) or cannot be reached, changes while it is read, or
                leaves one of the splits empty; or a folder is in the way that was not made here.
        """
        check_sources(self.sources)
        fingerprints = self.fingerprints()
        key = self.key(fingerprints)
        folder, work = Path(self.shards_dir, key), Path(self.shards_dir, f".{key}.preparing")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / f".{key}.lock"):
            if (found := self.find()) is not None:
                return found
            for name, source in self.sources.items():
                with named(name):
                    source.connect()
            _open(work)
            try:
                content = self._write(work, processes or allowed_cores())
                if self.fingerprints() != fingerprints:
                    raise ValueError(CHANGED)
                manifest = Manifest(format=FORMAT, key=key, sources=fingerprints, **content)
                write_text(work / "shards" / "manifest.json", json.dumps(manifest.to_dict(), indent=1) + "\n")
                os.rename(work / "shards", folder)
            except ValueError:  # what was done is of no use; after any other end, the next call goes on
                shutil.rmtree(work, ignore_errors=True)
                raise
            shutil.rmtree(work, ignore_errors=True)
        return Manifest.load(folder)

    # --- the passes over the sources: which documents, which tokenizer, which tokens ----------------------------------

    def _write(self, work: Path, processes: int) -> dict[str, Any]:
        """Write the trained tokenizer, the shards and the report of the filters into work/shards.

        Returns:
            What the manifest says about them.
        """
        written: dict[str, dict[SplitName, Shard | None]] = {
            name: {"train": None, "val": None} for name in self.sources
        }
        with Passes(self.sources) as passes:
            curation = self._curate(work, processes, passes) if self.filters else None
            decisions = work / "kept" if self.filters else None
            trained = self._train(work, decisions, passes)
            write_text(work / "shards" / "tokenizer.json", trained.to_json())
            passes.begin("Tokenizing")
            batches, work_on = read_batches(self.sources, decisions), Encode(trained, self.validation_fraction)
            encoded = remembered(work_on, batches, processes, work / "encoded")
            for name, of_source in itertools.groupby(encoded, key=lambda done: done[0].source):
                settings = {"vocab_size": trained.vocab_size, "chunk_bytes": self.chunk_bytes}
                train, val = (ShardWriter(work / "shards" / name / split, **settings) for split in ("train", "val"))
                for batch, result, from_before in of_source:
                    start = 0
                    documents = zip(result.lengths, result.n_bytes, result.validation, strict=True)
                    for length, n_bytes, held_out in documents:
                        (val if held_out else train).add(result.tokens[start : start + length], int(n_bytes))
                        start += length
                    passes.advance(batch.read, n_tokens=len(result.tokens), from_before=from_before)
                written[name] = {"train": train.close(), "val": val.close()}
        splits = self._splits(written, curation)
        return {
            "eos_id": trained.eos_id,
            "vocab_size": trained.vocab_size,
            "max_token_id": max(shard.max_token_id for by_source in splits.values() for shard in by_source.values()),
            "dtype": trained.dtype.name,
            "tokenizer": TokenizerRecord(trained.name, self.tokenizer.settings, trained.sha256),
            "split_rule": SPLIT_RULE,
            "validation_fraction": self.validation_fraction,
            "splits": splits,
            "curation": curation,
        }

    def _splits(
        self, written: Mapping[str, Mapping[SplitName, Shard | None]], curation: dict[str, Any] | None
    ) -> dict[SplitName, dict[str, Shard]]:
        """Sort the shards by split; refuse empty ones."""
        splits: dict[SplitName, dict[str, Shard]] = {"train": {}, "val": {}}
        for name, by_split in written.items():
            n_documents = sum(shard.documents for shard in by_split.values() if shard is not None)
            if n_documents == 0 and curation is not None and curation["sources"][name]["documents"] > 0:
                raise ValueError(f"data.sources.{name}: curation.filters keep none of its documents")
            if n_documents == 0:
                raise ValueError(f"data.sources.{name}: there is no text in it")
            for split, shard in by_split.items():
                if shard is not None:
                    splits[split][name] = shard
                    continue
                smaller, what, change = "", *(("validation", "raise") if split == "val" else ("training", "lower"))
                if hasattr(source := self.sources[name], "max_document_bytes"):
                    now = source.max_document_bytes
                    smaller = f", or set data.sources.{name}.max_document_bytes (now {now}) lower"
                raise ValueError(
                    f"data.sources.{name}: none of its {n_documents} documents fell to the {what} split:"
                    f" {change} data.validation_fraction={self.validation_fraction}{smaller}"
                )
        return splits

    def _curate(self, work: Path, processes: int, passes: Passes) -> dict[str, Any]:
        """Decide about all documents: a byte each in work/kept, 1 if it is kept. Returns what the manifest says."""
        report = work / "curation.json"
        if not report.exists():
            passes.begin("Curating")
            for rule in self.filters.values():
                rule.reset()
            removals = Removals(self.sources)
            inspected = remembered(Inspect(self.filters), read_batches(self.sources), processes, work / "inspected")
            with open(work / "kept", "wb") as kept:
                for batch, evidence, _ in inspected:
                    for document, found in zip(batch.documents, evidence, strict=True):
                        reason = first_reason(self.filters, document.id, found)
                        removals.add(batch.source, document, reason)
                        kept.write(bytes([reason is None]))
                    passes.advance(batch.read)
            write_text(report, json.dumps(removals.to_dict(), indent=1) + "\n")
            (work / "inspected").unlink(missing_ok=True)
        shutil.copy(report, work / "shards" / "curation.json")
        settings = {name: rule.settings() for name, rule in self.filters.items()}
        return {"filters": settings, **json.loads(report.read_bytes())}

    def _train(self, work: Path, decisions: Path | None, passes: Passes) -> Tokenizer:
        """Train the tokenizer on the training split, or load the one that was trained before an interruption."""
        file = work / "tokenizer.json"
        if file.exists():
            return type(self.tokenizer).from_json(file.read_text(encoding="utf-8"))
        passes.begin("Training the tokenizer")
        trained = self.tokenizer.train(
            document.text
            for batch in passes.told(read_batches(self.sources, decisions))
            for document in batch.documents
            if not is_validation(document.text, self.validation_fraction)
        )
        write_text(file, trained.to_json())
        return trained


def find_manifest(sources: Mapping[str, Source], tokenizer: Tokenizer, **settings: Any) -> Manifest | None:
    """Look up the shards made from this and the settings of `Preparation`; see `Preparation.find`."""
    return Preparation(sources, tokenizer, **settings).find()


def prepare(
    sources: Mapping[str, Source], tokenizer: Tokenizer, *, processes: int | None = None, **settings: Any
) -> Manifest:
    """Make the shards of this and the settings of `Preparation`; see `Preparation.run`."""
    return Preparation(sources, tokenizer, **settings).run(processes)


def _open(work: Path) -> None:
    """Make the folder to work in, or take on the one that a killed call left: under the lock nobody else works there.

    Raises:
        ValueError: the folder was not made here.
    """
    if work.exists() and any(work.iterdir()):
        if not (work / _MARKER).exists():
            raise ValueError(
                f"{work} is in the way and was not made by Thunderhead: move it, or choose data.shards_dir"
            )
        _log.warning("Going on with %s, left by a preparation that was interrupted", work)
    work.mkdir(exist_ok=True)
    (work / _MARKER).touch()
    shutil.rmtree(work / "shards", ignore_errors=True)  # half-written; made again from what is remembered
    (work / "shards").mkdir()
    (work / "shards" / _MARKER).touch()


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold a lock that ends with this process, however it ends."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.warning("Another process prepares the same shards: waiting for it (%s)", file)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
