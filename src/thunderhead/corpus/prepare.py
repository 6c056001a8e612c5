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
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from thunderhead.core.config import located as at
from thunderhead.core.data.manifest import (
    FORMAT,
    ForeignTokenizerError,
    Manifest,
    Shard,
    SplitName,
    TokenizerRecord,
)
from thunderhead.core.data.shards import CHUNK_BYTES, ShardWriter
from thunderhead.corpus.curation import Filter, Removals, first_reason
from thunderhead.corpus.sources import Document, Source
from thunderhead.corpus.split import SPLIT_RULE, is_validation
from thunderhead.corpus.tokenizer import Tokenizer
from thunderhead.corpus.workers import Batch, Encode, Encoded, Inspect, cores, remembered

_MARKER = ".thunderhead-shards"  # lies in every folder that `prepare` makes: others are never deleted
_BATCH_CHARACTERS = 1 << 20  # text that is tokenized at once
_NO_FILTERS: Mapping[str, Filter] = {}
_log = logging.getLogger(__name__)


def check_sources(sources: Mapping[str, Source], path: str | None = None) -> None:
    """Look at the beginnings of all files of all sources.

    Raises:
        ValueError: there is no source, a name cannot name a folder, `path` is given and no source uses it, or a source
            has nothing to read or something unreadable; in one line.
    """
    if not sources:
        raise ValueError("data.sources is empty: name at least one source")
    problems = []
    if path is not None and not any(getattr(source, "path", None) == path for source in sources.values()):
        problems.append(f"data.path={path} is used by no source: choose data=text to train on it, or leave it out")
    for name, source in sources.items():
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            problems.append(f"data.sources.{name}: use letters, digits, '_', '-' and '.' in names of sources")
        try:
            with _named(name):
                source.check()
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))


def find_manifest(
    sources: Mapping[str, Source],
    tokenizer: Tokenizer,
    *,
    shards_dir: str | Path,
    validation_fraction: float,
    filters: Mapping[str, Filter] = _NO_FILTERS,
    chunk_bytes: int = CHUNK_BYTES,
) -> Manifest | None:
    """Look up the shards made from exactly this; None if there are none yet. Reads no text and writes nothing.

    Raises:
        ValueError: a source has nothing to read.
        MissingManifestError: the place of the shards holds something else.
        ShardError: the manifest is damaged or belongs to another tokenizer.
    """
    folder = Path(shards_dir) / _key(_fingerprints(sources), tokenizer, validation_fraction, filters, chunk_bytes)
    if not folder.exists() or not any(folder.iterdir()):
        return None
    manifest = Manifest.load(folder)
    if (manifest.tokenizer.name, manifest.tokenizer.settings) != (tokenizer.name, tokenizer.settings):
        made = f"{manifest.tokenizer.name} {manifest.tokenizer.settings}"
        raise ForeignTokenizerError(
            f"{folder} was made with the tokenizer {made}, not {tokenizer.name} {tokenizer.settings}: remove it"
        )
    return manifest


def prepare(
    sources: Mapping[str, Source],
    tokenizer: Tokenizer,
    *,
    shards_dir: str | Path,
    validation_fraction: float,
    filters: Mapping[str, Filter] = _NO_FILTERS,
    processes: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Manifest:
    """Train the tokenizer on the training split, and write the shards; or return those that are there already.

    The shards appear under their name when they are complete. A call that is killed leaves what it has done, and the
    next one for the same shards goes on from there (on the disk, that takes as much again as the shards). Of several
    calls at a time one prepares, the others wait. Memory does not grow with the corpus. The same input gives the same
    bytes, whatever the number of processes and however often it was killed.

    Args:
        sources: by name; the names become folders.
        tokenizer: trained or not, it is trained anew (on what the filters keep).
        shards_dir: where the folder `<key>` of the shards will lie.
        validation_fraction: share of the documents (chosen by hash) to hold out.
        filters: decide in their order which documents of all sources are kept; what goes is told by curation.json.
        processes: how many tokenize; None: one for each core. One works in this process.
        chunk_bytes: size of the chunk files.

    Raises:
        ValueError: a source is unreadable (see `check_sources`) or cannot be reached, changes while it is read, or
            leaves one of the splits empty; or a folder is in the way that was not made here.
    """
    check_sources(sources)
    fingerprints = _fingerprints(sources)
    key = _key(fingerprints, tokenizer, validation_fraction, filters, chunk_bytes)
    folder = Path(shards_dir) / key
    work = Path(shards_dir) / f".{key}.preparing"
    folder.parent.mkdir(parents=True, exist_ok=True)

    with _locked(folder.parent / f".{key}.lock"):
        found = find_manifest(
            sources,
            tokenizer,
            shards_dir=shards_dir,
            validation_fraction=validation_fraction,
            filters=filters,
            chunk_bytes=chunk_bytes,
        )
        if found is not None:
            return found
        for name, source in sources.items():
            with _named(name):
                source.connect()
        _open(work)
        try:
            trained, splits, curation = _write(
                work,
                sources,
                tokenizer,
                validation_fraction=validation_fraction,
                filters=filters,
                processes=processes or cores(),
                chunk_bytes=chunk_bytes,
            )
            if _fingerprints(sources) != fingerprints:
                raise ValueError("files of data.sources changed while they were read: prepare again")
            Manifest(
                format=FORMAT,
                key=key,
                eos_id=trained.eos_id,
                vocab_size=trained.vocab_size,
                max_token_id=max(shard.max_token_id for by_source in splits.values() for shard in by_source.values()),
                dtype=trained.dtype.name,
                tokenizer=TokenizerRecord(trained.name, tokenizer.settings, trained.sha256),
                split_rule=SPLIT_RULE,
                validation_fraction=validation_fraction,
                sources=fingerprints,
                splits=splits,
                curation=curation,
            ).save(work / "shards")
            os.rename(work / "shards", folder)
        except ValueError:  # what was done is of no use; after any other end, the next call goes on
            shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
    return Manifest.load(folder)


def _fingerprints(sources: Mapping[str, Source]) -> dict[str, dict[str, Any]]:
    fingerprints = {}
    for name, source in sources.items():
        with _named(name):
            fingerprints[name] = source.fingerprint()
    return fingerprints


def _key(
    fingerprints: dict[str, dict[str, Any]],
    tokenizer: Tokenizer,
    validation_fraction: float,
    filters: Mapping[str, Filter],
    chunk_bytes: int,
) -> str:
    """Name shards by all that they are made from, with a readable beginning."""
    made_from = {
        "format": FORMAT,
        "sources": fingerprints,
        "tokenizer": [tokenizer.name, tokenizer.settings],
        "split": [SPLIT_RULE, validation_fraction],
        "chunk_bytes": chunk_bytes,
    }
    if filters:
        made_from["filters"] = [[name, rule.settings()] for name, rule in filters.items()]
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    return f"{'+'.join(fingerprints)[:40]}-{tokenizer.name}-{digest[:12]}"


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


# --------------------------------------------------------------------------------------------------------------------
# The passes over the sources: which documents, which tokenizer, which tokens


def _write(
    work: Path,
    sources: Mapping[str, Source],
    tokenizer: Tokenizer,
    *,
    validation_fraction: float,
    filters: Mapping[str, Filter],
    processes: int,
    chunk_bytes: int,
) -> tuple[Tokenizer, dict[SplitName, dict[str, Shard]], dict[str, Any] | None]:
    """Write the trained tokenizer, the shards of all sources and the report of the filters into work/shards."""
    with _Display(sources) as display:
        curation = None
        if filters:
            removed = _curate(work, sources, filters, processes, display)
            _write_whole(work / "shards" / "curation.json", json.dumps(removed, indent=1) + "\n")
            curation = {"filters": {name: rule.settings() for name, rule in filters.items()}, **removed}
        reader = _Reader(sources, work / "kept" if filters else None)
        trained = _train(work, reader, tokenizer, validation_fraction, display)
        _write_whole(work / "shards" / "tokenizer.json", trained.to_json())
        display.begin("Tokenizing")
        encoded = remembered(Encode(trained, validation_fraction), reader.batches(), processes, work / "encoded")
        written: dict[str, dict[SplitName, Shard | None]] = {name: {"train": None, "val": None} for name in sources}
        for name, of_source in itertools.groupby(encoded, key=lambda done: done[0].source):
            writers: dict[SplitName, ShardWriter] = {
                split: ShardWriter(
                    work / "shards" / name / split, vocab_size=trained.vocab_size, chunk_bytes=chunk_bytes
                )
                for split in ("train", "val")
            }
            for batch, result, from_before in of_source:
                _add(writers, result)
                display.advance(batch.read, n_tokens=len(result.tokens), from_before=from_before)
            written[name] = {split: writer.close() for split, writer in writers.items()}

    splits: dict[SplitName, dict[str, Shard]] = {"train": {}, "val": {}}
    for name, by_split in written.items():
        n_documents = sum(shard.documents for shard in by_split.values() if shard is not None)
        if n_documents == 0 and curation is not None and curation["sources"][name]["documents"] > 0:
            raise ValueError(f"data.sources.{name}: curation.filters keep none of its documents")
        for split, shard in by_split.items():
            if shard is None:
                raise ValueError(_empty_split(name, sources[name], split, n_documents, validation_fraction))
            splits[split][name] = shard
    return trained, splits, curation


def _add(writers: Mapping[SplitName, ShardWriter], encoded: Encoded) -> None:
    start = 0
    for length, n_bytes, validation in zip(encoded.lengths, encoded.n_bytes, encoded.validation, strict=True):
        writers["val" if validation else "train"].add(encoded.tokens[start : start + length], int(n_bytes))
        start += length


def _curate(
    work: Path, sources: Mapping[str, Source], filters: Mapping[str, Filter], processes: int, display: "_Display"
) -> dict[str, Any]:
    """Decide about all documents: a byte each in work/kept, 1 if it is kept. Returns what curation.json holds."""
    report = work / "curation.json"
    if report.exists():
        decided: dict[str, Any] = json.loads(report.read_bytes())
        return decided
    display.begin("Curating")
    for rule in filters.values():
        rule.reset()
    removals = Removals()
    for name in sources:
        removals.add_source(name)
    inspected = remembered(Inspect(filters), _Reader(sources).batches(), processes, work / "inspected")
    with open(work / "kept", "wb") as kept:
        for batch, evidence, _ in inspected:
            for document, found in zip(batch.documents, evidence, strict=True):
                reason = first_reason(filters, document.id, found)
                removals.add(batch.source, document, reason)
                kept.write(bytes([reason is None]))
            display.advance(batch.read)
    _write_whole(report, json.dumps(removals.to_dict()))
    (work / "inspected").unlink(missing_ok=True)
    return removals.to_dict()


def _train(
    work: Path, reader: "_Reader", tokenizer: Tokenizer, validation_fraction: float, display: "_Display"
) -> Tokenizer:
    """Train the tokenizer on the training split, or load the one that was trained before an interruption."""
    file = work / "tokenizer.json"
    if file.exists():
        return type(tokenizer).from_json(file.read_text())
    display.begin("Training the tokenizer")
    trained = tokenizer.train(
        document.text
        for batch in display.told(reader.batches())
        for document in batch.documents
        if not is_validation(document.text, validation_fraction)
    )
    _write_whole(file, trained.to_json())
    return trained


class _Reader:
    """The documents of all sources, in order, without those that a curation removed.

    Args:
        sources: by name.
        kept: a file with a byte for each document of all sources, 0 if it is removed; None: all are kept.
    """

    def __init__(self, sources: Mapping[str, Source], kept: Path | None = None):
        self._sources, self._kept = sources, kept

    def batches(self) -> Iterator[Batch]:
        """Group documents of a source until they make enough text to send to another process."""
        decisions = None if self._kept is None else self._decisions(self._kept)
        self._read = 0
        for name, source in self._sources.items():
            documents: list[Document] = []
            size = 0
            with _named(name):
                for document in source.documents(self._on_read):
                    if decisions is not None and not next(decisions):
                        continue
                    documents.append(document)
                    size += len(document.text)
                    if size >= _BATCH_CHARACTERS:
                        yield Batch(name, documents, self._read)
                        documents, size = [], 0
            if documents:
                yield Batch(name, documents, self._read)

    def _on_read(self, n_bytes: int) -> None:
        self._read += n_bytes

    @staticmethod
    def _decisions(file: Path) -> Iterator[int]:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 16):
                yield from block
        raise ValueError("files of data.sources changed while they were read: prepare again")


def _write_whole(file: Path, text: str) -> None:
    """Write a file that is either there and complete, or not there."""
    part = file.with_name(f"{file.name}.part")
    part.write_bytes(text.encode())
    os.replace(part, file)


def _empty_split(name: str, source: Source, split: SplitName, n_documents: int, fraction: float) -> str:
    if n_documents == 0:
        return f"data.sources.{name}: there is no text in it"
    smaller = ""
    if hasattr(source, "max_document_bytes"):
        smaller = f", or set data.sources.{name}.max_document_bytes (now {source.max_document_bytes}) lower"
    what, change = ("validation", "raise") if split == "val" else ("training", "lower")
    return (
        f"data.sources.{name}: none of its {n_documents} documents fell to the {what} split:"
        f" {change} data.validation_fraction={fraction}{smaller}"
    )


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Begin the message of a ValueError with the config path of the source."""
    try:
        yield
    except ValueError as error:
        raise ValueError(at(f"data.sources.{name}", str(error))) from None


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


class _Display:
    """A progress bar for each pass, on a terminal: bytes read, tokens per second, and the time left."""

    def __init__(self, sources: Mapping[str, Source]):
        sizes = [source.disk_bytes() for source in sources.values()]
        self._total = None if None in sizes else sum(size for size in sizes if size is not None)
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[tokens]}"),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "_Display":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()
        self._bar.stop()

    def begin(self, what: str) -> None:
        """Begin a pass."""
        self._finish()
        self._bar.add_task(what, total=self._total, tokens="")
        self._tokens = self._tokens_now = 0
        self._begun: float | None = None

    def _finish(self) -> None:
        """Show the pass that ends as complete: whoever trains a tokenizer may need no text."""
        for task in self._bar.tasks[-1:]:
            self._bar.update(task.id, completed=task.total or task.completed, total=task.total or task.completed)

    def advance(self, read: int, *, n_tokens: int = 0, from_before: bool = False) -> None:
        """Show that `read` bytes are done in all. The rate counts what is done now, not before an interruption."""
        self._tokens += n_tokens
        if not from_before:
            self._begun = self._begun or time.monotonic()
            self._tokens_now += n_tokens
        tokens = ""
        if self._tokens:
            seconds = time.monotonic() - self._begun if self._begun is not None else 0.0
            rate = f", {self._tokens_now / seconds / 1e3:,.0f} k/s" if seconds > 0.5 else ""
            tokens = f"{self._tokens / 1e6:.1f} M tokens{rate}"
        self._bar.update(self._bar.tasks[-1].id, completed=read, tokens=tokens)

    def told(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass batches on, and show how far they were read."""
        for batch in batches:
            yield batch
            self.advance(batch.read)
