"""From sources and a tokenizer to shards: prepared once, found again by what they were made from."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from thunderhead.data.curation import Filter, Removals, curated
from thunderhead.data.manifest import (
    DTYPE_NAME,
    FORMAT,
    ForeignTokenizerError,
    Manifest,
    Shard,
    SplitName,
    TokenizerRecord,
)
from thunderhead.data.shards import CHUNK_BYTES, ShardWriter
from thunderhead.data.sources import Document, Source
from thunderhead.data.tokenizer import DTYPE, Tokenizer

SPLIT_RULE = "a document is for validation if the first 8 bytes of its text's sha256, over 2**64, are < fraction"
_MARKER = ".thunderhead-shards"  # lies in every folder that `prepare` makes: others are never deleted
_BATCH_BYTES = 1 << 20  # text that is tokenized at once
_log = logging.getLogger(__name__)
_NO_FILTERS: Mapping[str, Filter] = {}


def check_sources(sources: Mapping[str, Source], path: str | None = None) -> None:
    """Look at the beginnings of all files of all sources.

    Raises:
        ValueError: there is no source, a name cannot name a folder, `path` is given and no source uses it, or a source
            has nothing to read or something unreadable; in one line.
    """
    if not sources:
        raise ValueError("data.sources is empty: name at least one source")
    if path is not None and not any(getattr(source, "path", None) == path for source in sources.values()):
        raise ValueError(f"data.path={path} is used by no source: choose data=text to train on it, or leave it out")
    for name, source in sources.items():
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise ValueError(f"data.sources.{name}: use letters, digits, '_', '-' and '.' in names of sources")
        with _named(name):
            source.check()


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
    folder = Path(shards_dir) / _key(_fingerprints(sources), tokenizer, validation_fraction, chunk_bytes, filters)
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
    chunk_bytes: int = CHUNK_BYTES,
) -> Manifest:
    """Train the tokenizer on the training split, and write the shards; or return those that are there already.

    Works in a temporary folder beside the final one and renames it at the end: what was killed on the way is not taken
    for shards, and is removed by the next call for the same shards. Of several processes one prepares, the others wait.
    Memory does not grow with the corpus. The same input gives the same bytes.

    Args:
        sources: by name; the names become folders.
        tokenizer: trained or not, it is trained anew.
        shards_dir: where the folder `<key>` of the shards will lie.
        validation_fraction: share of the documents (chosen by hash) to hold out.
        filters: which documents are left out, by name; what they removed is in curation.json beside the manifest.
        chunk_bytes: size of the chunk files.

    Raises:
        ValueError: a source is unreadable (see `check_sources`), changes while it is read, or leaves one of the splits
            empty; or a folder is in the way that was not made here.
    """
    check_sources(sources)
    fingerprints = _fingerprints(sources)
    key = _key(fingerprints, tokenizer, validation_fraction, chunk_bytes, filters)
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
        _remove_stale(work)
        work.mkdir()
        (work / _MARKER).touch()
        try:
            trained, splits = _write(
                work,
                sources,
                tokenizer,
                validation_fraction=validation_fraction,
                filters=filters,
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
                dtype=DTYPE_NAME,
                tokenizer=TokenizerRecord(trained.name, tokenizer.settings, trained.sha256),
                split_rule=SPLIT_RULE,
                validation_fraction=validation_fraction,
                sources=fingerprints,
                splits=splits,
            ).save(work)
            os.rename(work, folder)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
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
    chunk_bytes: int,
    filters: Mapping[str, Filter],
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


def _write(
    work: Path,
    sources: Mapping[str, Source],
    tokenizer: Tokenizer,
    *,
    validation_fraction: float,
    filters: Mapping[str, Filter],
    chunk_bytes: int,
) -> tuple[Tokenizer, dict[SplitName, dict[str, Shard]]]:
    """Write the trained tokenizer and the shards of all sources into a folder."""
    total = sum(source.disk_bytes() for source in sources.values())
    with _progress() as bar:
        task = bar.add_task("Training the tokenizer", total=total, tokens="")
        trained = tokenizer.train(
            _training_texts(sources, filters, validation_fraction, lambda n: bar.advance(task, n))
        )
        bar.update(task, completed=total)
        (work / "tokenizer.json").write_bytes(trained.to_json().encode())

        task = bar.add_task("Tokenizing", total=total, tokens="")
        splits: dict[SplitName, dict[str, Shard]] = {"train": {}, "val": {}}
        removals = Removals()
        _reset(filters)
        for name, source in sources.items():
            with _named(name):
                written = _write_source(
                    work / name,
                    source,
                    trained,
                    curation=partial(curated, filters=filters, note=partial(removals.add, name)),
                    validation_fraction=validation_fraction,
                    chunk_bytes=chunk_bytes,
                    bar=bar,
                )
            for split, shard in written.items():
                if shard is None:
                    n_documents = sum(other.documents for other in written.values() if other is not None)
                    raise ValueError(_empty_split(name, source, split, n_documents, validation_fraction))
                splits[split][name] = shard
    if filters:
        (work / "curation.json").write_text(json.dumps(removals.to_dict(), indent=1) + "\n")
    return trained, splits


def _write_source(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    *,
    curation: Callable[[Iterator[Document]], Iterator[Document]],
    validation_fraction: float,
    chunk_bytes: int,
    bar: Progress,
) -> dict[SplitName, Shard | None]:
    writers: dict[SplitName, ShardWriter] = {
        split: ShardWriter(folder / split, vocab_size=tokenizer.vocab_size, chunk_bytes=chunk_bytes)
        for split in ("train", "val")
    }
    task = bar.task_ids[-1]
    eos = np.array([tokenizer.eos_id], dtype=DTYPE)
    for batch in _batches(curation(source.documents(lambda n: bar.advance(task, n)))):
        for document, tokens in zip(batch, tokenizer.encode_batch([text for _, text in batch]), strict=True):
            split: SplitName = "val" if is_validation(document.text, validation_fraction) else "train"
            writers[split].add(np.concatenate([tokens, eos]), len(document.text.encode()))
        n_tokens = sum(writer.tokens for writer in writers.values())
        elapsed = bar.tasks[-1].elapsed or 1
        bar.update(task, tokens=f"{n_tokens / 1e6:.1f} M tokens, {n_tokens / elapsed / 1e3:,.0f} k/s")
    return {split: writer.close() for split, writer in writers.items()}


def is_validation(text: str, fraction: float) -> bool:
    """Say on which side of the split a document falls: by its text alone, so equal documents never end up on both."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < fraction * 2**64


def _reset(filters: Mapping[str, Filter]) -> None:
    for rule in filters.values():
        rule.reset()


def _training_texts(
    sources: Mapping[str, Source],
    filters: Mapping[str, Filter],
    validation_fraction: float,
    on_read: Callable[[int], None],
) -> Iterator[str]:
    _reset(filters)
    for name, source in sources.items():
        with _named(name):
            for document in curated(source.documents(on_read), filters, lambda document, why: None):
                if not is_validation(document.text, validation_fraction):
                    yield document.text


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Group documents until they make enough text to keep all cores busy."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _empty_split(name: str, source: Source, split: SplitName, n_documents: int, fraction: float) -> str:
    if n_documents == 0:
        return f"data.sources.{name}: there is no text in it, or the filters of curation leave none"
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
        if str(error).startswith("data.sources."):
            raise
        raise ValueError(f"data.sources.{name}: {error}") from None


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


def _remove_stale(work: Path) -> None:
    """Remove what a killed `prepare` left: under the lock nobody else works there."""
    if not work.exists():
        return
    if not (work / _MARKER).exists() and any(work.iterdir()):
        raise ValueError(f"{work} is in the way and was not made by Thunderhead: move it, or choose data.shards_dir")
    _log.warning("Removing %s, left by a preparation that was interrupted", work)
    shutil.rmtree(work)


def _progress() -> Progress:
    """Make a progress bar that is quiet off a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[tokens]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
