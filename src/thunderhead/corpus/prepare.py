"""From sources and a tokenizer to shards: prepared once, found again by what they were made from."""

import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from typing_extensions import TypedDict

from thunderhead import disk
from thunderhead.core.config import read_mapping
from thunderhead.core.data.manifest import Manifest
from thunderhead.core.tokenizer import Tokenizer
from thunderhead.corpus.batch_processing import UselessError
from thunderhead.corpus.engines import Engine, Local
from thunderhead.corpus.preparation import Preparation, load
from thunderhead.corpus.sources import Source, check_sources, named
from thunderhead.corpus.stages import Stages
from thunderhead.disk import write_text

_log = logging.getLogger(__name__)


def run(preparation: Preparation, engine: Engine | None = None) -> Manifest | None:
    """Train the tokenizer on the training split, and write the shards; or return those that are there already.

    They appear under their name when they are complete. A call that is killed leaves what it has done, from which
    the next one for the same shards goes on (on the disk, that takes as much again). Of several calls at a time one
    prepares, the others wait. Memory does not grow with the corpus. The same input gives the same bytes, whatever
    the engine (None: this machine, a process for each core), its number of tasks and processes, and of kills. Returns
    None where the engine has only handed the work on.

    Raises ValueError if a source is unreadable, cannot be reached, changes meanwhile, holds a text in which
    the tokenizer finds an EOS, or leaves a split empty; or if the work was begun with another number of tasks.
    """
    engine = engine or Local()
    check_sources(preparation.sources)
    fingerprints = preparation.fingerprints()
    key = preparation.key(fingerprints)
    folder, work = Path(preparation.shards_dir, key), Path(preparation.shards_dir, f".{key}.preparing")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with disk.naming(folder), _lock(folder.parent / f".{key}.lock"):
        if (found := load(folder)) is not None:
            shutil.rmtree(work, ignore_errors=True)  # of a kill after the last step
            return found
        for name, source in preparation.sources.items():
            with named(name):
                source.connect()
        _begin(work, engine.tasks)
        try:
            done = engine.carry(Stages(preparation, key, fingerprints, work, engine.tasks))
        except BaseException as error:
            if isinstance(error, OSError) and not (work / "begun.json").exists():
                shutil.rmtree(work, ignore_errors=True)  # what was written since
                raise ValueError(f"{work} was removed meanwhile: the same command begins anew") from error
            if isinstance(error, UselessError) or not _has_begun(work):  # nothing there is of use to the next call
                shutil.rmtree(work, ignore_errors=True)
            elif isinstance(error, KeyboardInterrupt):
                _log.warning("What is finished is kept in %s: the same command goes on with it", work)
            raise
    return Manifest.load(folder) if done else None


def _begin(work: Path, tasks: int) -> None:
    """Make the folder of the work, or go on in it."""
    file = work / "begun.json"
    try:
        begun = json.loads(file.read_bytes())["tasks"]
    except (OSError, ValueError, LookupError, TypeError):
        if file.exists():
            _log.warning("%s is damaged: what was begun there is made again", file)
        shutil.rmtree(work, ignore_errors=True)  # of a call that was killed before it began
        work.mkdir()
        write_text(file, json.dumps({"tasks": tasks}))
        return
    _log.warning("Going on with %s, left by a preparation that was interrupted", work)
    if begun != tasks:
        way = f"prepare.py and engine={'local' if begun == 1 else f'datatrove engine.tasks={begun}'}"
        raise ValueError(f"engine: {work} was begun by {begun} tasks: go on with {way}, or delete that folder")


def _has_begun(work: Path) -> bool:
    """Say whether anything is remembered that a next call need not do again."""
    return any(
        (work / name).exists() for name in ("encoded", "inspected", "related", "curation.json", "tokenizer.json")
    )


class _PassedOver(TypedDict):
    files: int
    suffix: str
    why: str


class _Skipped(TypedDict):
    file: str
    documents: int
    why: str


class _Files(TypedDict):
    read: dict[str, int]
    passed_over: list[_PassedOver]
    skipped: list[_Skipped]


class _Overlap(TypedDict):
    documents: int
    near_duplicates: int


class _Reading(TypedDict):
    sources: dict[str, _Files]
    validation: _Overlap


def read_reading(folder: Path, where: str = "") -> dict[str, Any] | None:
    """The reading.json of shards; None if they were made by something else. ConfigError if it is damaged."""
    file = folder / "reading.json"
    return read_mapping(file, where, _Reading) if file.exists() else None


def told_overlap(folder: Path) -> str | None:
    """Say how much of the validation text of some shards is in their training text, too; None: nothing of it."""
    if (reading := read_reading(folder)) is None:
        return None
    found = reading["validation"]
    if found["near_duplicates"] == 0:
        return None
    what = f"{found['near_duplicates']:,} of {found['documents']:,} validation documents are near duplicates"
    remedy = "data.near_duplicates=together keeps such on one side, curation=deduplication removes most of them"
    return f"{what} of training documents (half of their text or more): {remedy}"


def prepare(
    sources: Mapping[str, Source], tokenizer: Tokenizer, *, processes: int | None = None, **settings: Any
) -> Manifest:
    """Make the shards of this and the settings of `Preparation`, on this machine; see `run`."""
    manifest = run(Preparation(sources, tokenizer, **settings), Local(processes=processes))
    assert manifest is not None
    return manifest


def _lock(file: Path) -> AbstractContextManager[object]:
    """Take a lock that ends with this process, however it ends."""
    lock = FileLock(file)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        _log.warning("Another process prepares the same shards: waiting for it (%s)", file)
        return lock.acquire()
