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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from thunderhead import disk
from thunderhead.core.data.manifest import FORMAT, Manifest, Shard, SplitName, TokenizerRecord
from thunderhead.core.tokenizer import Tokenizer
from thunderhead.corpus.batch_processing import Batch, Encode, UselessError, inspect, recorded, remembered
from thunderhead.corpus.curation import Curation, Filter
from thunderhead.corpus.overlap import Overlap
from thunderhead.corpus.passes import Passes
from thunderhead.corpus.shard_files import CHUNK_BYTES, ShardWriter
from thunderhead.corpus.sources import Document, Source, check_sources, named, refusal
from thunderhead.corpus.split import Split
from thunderhead.disk import write_text
from thunderhead.processes import allowed_cores

_BATCH_CHARACTERS = 1 << 20  # text that is tokenized at once
_CHANGED = "files of data.sources changed while they were read: prepare again"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preparation:
    """All that shards are made from."""

    sources: Mapping[str, Source]  # by name; the names become folders
    tokenizer: Tokenizer  # trained or not, it is trained anew (on what the filters keep)
    shards_dir: str | Path  # where the folder of the shards will lie, named by what they are made from
    validation_fraction: float  # of the text, to hold out
    validation: str = "hash"  # how it is chosen: see `Split`
    filters: Mapping[str, Filter] = field(default_factory=dict)  # which documents are kept: see curation.json
    chunk_bytes: int = CHUNK_BYTES

    @property
    def split(self) -> Split:
        return Split(self.validation, self.validation_fraction)

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
        return _load(Path(self.shards_dir) / self.key(self.fingerprints()))

    def run(self, processes: int | None = None) -> Manifest:
        """Train the tokenizer on the training split, and write the shards; or return those that are there already.

        They appear under their name when they are complete. A call that is killed leaves what it has done, from which
        the next one for the same shards goes on (on the disk, that takes as much again). Of several calls at a time one
        prepares, the others wait. Memory does not grow with the corpus. The same input gives the same bytes, whatever
        the number of `processes` (None: one for each core; one works in this process) and of kills.

        Raises ValueError if a source is unreadable, cannot be reached, changes meanwhile, holds a text in which
        the tokenizer finds an EOS, or leaves a split empty.
        """
        check_sources(self.sources)
        fingerprints = self.fingerprints()
        key = self.key(fingerprints)
        folder, work = Path(self.shards_dir, key), Path(self.shards_dir, f".{key}.preparing")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with disk.naming(folder), _lock(folder.parent / f".{key}.lock"):
            if (found := _load(folder)) is not None:
                return found
            for name, source in self.sources.items():
                with named(name):
                    source.connect()
            if work.exists():
                _log.warning("Going on with %s, left by a preparation that was interrupted", work)
            shutil.rmtree(work / "shards", ignore_errors=True)  # half-written; made again from what is remembered
            (work / "shards").mkdir(parents=True)
            try:
                content = self._write(work, processes or allowed_cores())
                if self.fingerprints() != fingerprints:
                    raise UselessError(_CHANGED)
                manifest = Manifest(format=FORMAT, key=key, sources=fingerprints, **content)
                write_text(work / "shards" / "manifest.json", json.dumps(manifest.to_dict(), indent=1) + "\n")
                os.rename(work / "shards", folder)
            except BaseException as error:
                if isinstance(error, UselessError) or not _has_begun(work):  # nothing there is of use to the next call
                    shutil.rmtree(work, ignore_errors=True)
                raise
            shutil.rmtree(work, ignore_errors=True)
        return Manifest.load(folder)

    def _write(self, work: Path, processes: int) -> dict[str, Any]:
        """Write trained tokenizer, shards and report into work/shards; return what the manifest says about them."""
        splits: dict[SplitName, dict[str, Shard]] = {"train": {}, "val": {}}
        with Passes(self.sources) as passes:
            self._verify(passes)
            curation = self._curate(work, processes, passes) if self.filters else None
            decisions = work / "kept" if self.filters else None
            totals = self._measure(decisions, passes) if self.validation == "tail" else {}
            batches = partial(read_batches, self.sources, decisions, split=self.split, totals=totals)
            trained = self._train(work, batches, passes)
            write_text(work / "shards" / "tokenizer.json", trained.to_json())
            passes.begin("Tokenizing")
            encoded = remembered(Encode(trained), batches(), processes, work / "encoded")
            overlap = Overlap()
            for name, of_source in itertools.groupby(encoded, key=lambda done: done[0].source):
                settings = {"vocab_size": trained.vocab_size, "chunk_bytes": self.chunk_bytes}
                writers = {
                    split: ShardWriter(work / "shards" / name / split, **settings, list_documents=split == "val")
                    for split in splits
                }
                for batch, result in of_source:
                    result.refuse_ends_inside(batch, trained.eos_id)
                    overlap.add_validation(result.windows, batch.held_out)
                    documents = np.split(result.tokens, np.cumsum(result.lengths[:-1]))
                    for tokens, n_bytes, held_out in zip(documents, result.n_bytes, batch.held_out, strict=True):
                        writers["val" if held_out else "train"].add(tokens, int(n_bytes))
                    passes.reach(batch.read, n_tokens=len(result.tokens))
                for split, writer in writers.items():
                    if (shard := writer.close()) is not None:
                        splits[split][name] = shard
        self._refuse_empty(splits, curation)
        again = ((result.windows, held_out) for result, held_out in recorded(work / "encoded"))
        validation = {"documents": overlap.judged, "near_duplicates": overlap.near_duplicates(again)}
        by_source = {name: found for name, source in self.sources.items() if (found := source.reading())}
        reading = {"sources": by_source, "validation": validation}
        write_text(work / "shards" / "reading.json", json.dumps(reading, indent=1) + "\n")
        return {
            "eos_id": trained.eos_id,
            "vocab_size": trained.vocab_size,
            "max_token_id": max(shard.max_token_id for by_source in splits.values() for shard in by_source.values()),
            "dtype": trained.dtype.name,
            "tokenizer": TokenizerRecord(trained.name, self.tokenizer.settings, trained.sha256),
            "split_rule": str(self.split),
            "validation_fraction": self.validation_fraction,
            "splits": splits,
            "curation": curation,
        }

    def _refuse_empty(self, splits: dict[SplitName, dict[str, Shard]], curation: dict[str, Any] | None) -> None:
        for name, source in self.sources.items():
            path, shards = f"data.sources.{name}", [shards[name] for shards in splits.values() if name in shards]
            if not shards and curation is not None and curation["sources"][name]["documents"] > 0:
                raise UselessError(f"{path}: curation.filters keep none of its documents")
            if not shards:
                raise UselessError(f"{path}: there is no text in it")
            if len(shards) < len(splits):
                lacks_validation = name in splits["train"]
                remedy = self.split.remedy(name, source, lacks_validation=lacks_validation)
                what = "validation" if lacks_validation else "training"
                found = f"none of its {shards[0].documents} documents fell to the {what} split"
                raise UselessError(f"{path}: {found}: {remedy}")

    def _verify(self, passes: Passes) -> None:
        """Read what is cheap to read, so that all that is wrong with it is said before work starts."""
        passes.begin("Checking")
        faults: list[str] = []
        for name, source in self.sources.items():
            faults += refusal(name, partial(source.verify, passes.add))
        if faults:
            raise ValueError("; ".join(faults))

    def _measure(self, decisions: Path | None, passes: Passes) -> dict[str, int]:
        """Count the characters of each source."""
        passes.begin("Measuring")
        totals = dict.fromkeys(self.sources, 0)
        for batch in read_batches(self.sources, decisions):
            totals[batch.source] += sum(len(document.text) for document in batch.documents)
            passes.reach(batch.read)
        return totals

    def _curate(self, work: Path, processes: int, passes: Passes) -> dict[str, Any]:
        """Decide about all documents: a byte each in work/kept, 1 if it is kept. Returns what the manifest says."""
        report = work / "curation.json"
        if not report.exists():
            passes.begin("Curating")
            curation, work_on = Curation(self.filters, self.sources), partial(inspect, dict(self.filters))
            inspected = remembered(work_on, read_batches(self.sources), processes, work / "inspected")
            with open(work / "kept", "wb") as kept:
                for batch, evidence in inspected:
                    for document, found in zip(batch.documents, evidence, strict=True):
                        kept.write(bytes([curation.keep(batch.source, document, found)]))
                    passes.reach(batch.read)
            write_text(report, json.dumps(curation.record, indent=1) + "\n")
            (work / "inspected").unlink(missing_ok=True)
        shutil.copy(report, work / "shards" / "curation.json")
        settings = {name: rule.settings() for name, rule in self.filters.items()}
        return {"filters": settings, **json.loads(report.read_bytes())}

    def _train(self, work: Path, batches: Callable[[], Iterator[Batch]], passes: Passes) -> Tokenizer:
        """Train the tokenizer on the training split, or load the one that was trained before an interruption."""
        file = work / "tokenizer.json"
        if file.exists():
            return type(self.tokenizer).from_json(file.read_text(encoding="utf-8"))
        passes.begin("Training the tokenizer")
        trained = self.tokenizer.train(_training_texts(batches(), passes))
        write_text(file, trained.to_json())
        return trained


def _training_texts(batches: Iterable[Batch], passes: Passes) -> Iterator[str]:
    for batch in batches:
        for document, held_out in zip(batch.documents, batch.held_out, strict=True):
            if not held_out:
                yield document.text
        passes.reach(batch.read)


def _load(folder: Path) -> Manifest | None:
    return Manifest.load(folder) if folder.exists() and any(folder.iterdir()) else None


def _has_begun(work: Path) -> bool:
    """Say whether anything is remembered that a next call need not do again."""
    return any((work / name).exists() for name in ("encoded", "inspected", "curation.json", "tokenizer.json"))


def told_overlap(folder: Path) -> str | None:
    """Say how much of the validation text of some shards is in their training text, too; None: nothing of it."""
    try:
        found = json.loads((folder / "reading.json").read_bytes())["validation"]
    except FileNotFoundError:  # they were made by something else
        return None
    if found["near_duplicates"] == 0:
        return None
    what = f"{found['near_duplicates']:,} of {found['documents']:,} validation documents are near duplicates"
    return f"{what} of training documents (half of their text or more): curation=deduplication removes such"


def prepare(
    sources: Mapping[str, Source], tokenizer: Tokenizer, *, processes: int | None = None, **settings: Any
) -> Manifest:
    """Make the shards of this and the settings of `Preparation`; see `Preparation.run`."""
    return Preparation(sources, tokenizer, **settings).run(processes)


def _lock(file: Path) -> AbstractContextManager[object]:
    """Take a lock that ends with this process, however it ends."""
    lock = FileLock(file)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        _log.warning("Another process prepares the same shards: waiting for it (%s)", file)
        return lock.acquire()


def read_batches(
    sources: Mapping[str, Source],
    kept: Path | None = None,
    *,
    split: Split | None = None,
    totals: Mapping[str, int] | None = None,
) -> Iterator[Batch]:
    """Group each source's documents, in order, to batches.

    `kept` is a file of a byte for each document, 0 if it was removed; `totals` are the characters of each source, which
    a split by the tail needs. Without a split, all are for training.
    """
    read = 0

    def on_read(n_bytes: int) -> None:
        nonlocal read
        read += n_bytes

    decisions = itertools.repeat(1) if kept is None else _decisions(kept)
    for name, source in sources.items():
        documents: list[Document] = []
        held_out: list[bool] = []
        size = 0
        found = (document for document in _documents(name, source, on_read) if next(decisions))
        no_split = zip(found, itertools.repeat(False))
        for document, is_held_out in split.divide(found, source, (totals or {}).get(name)) if split else no_split:
            documents.append(document)
            held_out.append(is_held_out)
            size += len(document.text)
            if size >= _BATCH_CHARACTERS:
                yield Batch(name, documents, held_out, read)
                documents, held_out, size = [], [], 0
        if documents:
            yield Batch(name, documents, held_out, read)


def _documents(name: str, source: Source, on_read: Callable[[int], None]) -> Iterator[Document]:
    with named(name):
        yield from source.documents(on_read)


def _decisions(file: Path) -> Iterator[int]:
    with open(file, "rb") as stream:
        while block := stream.read(1 << 16):
            yield from block
    raise UselessError(_CHANGED)
