"""Documents of all sources: looked at before anything begins, and read in batches."""

import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from thunderhead.core.config import placed
from thunderhead.corpus.batch_processing import Batch
from thunderhead.corpus.sources import Document, Source

_BATCH_CHARACTERS = 1 << 20  # text that is tokenized at once
CHANGED = "files of data.sources changed while they were read: prepare again"


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
            with named(name):
                source.check()
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))


def read_batches(sources: Mapping[str, Source], kept: Path | None = None) -> Iterator[Batch]:
    """Group the documents of each source, in order, until they make enough text to send to another process.

    Args:
        sources: by name.
        kept: a file with a byte for each document of all sources, 0 if a curation removed it; None: all are kept.
    """
    read = 0

    def on_read(n_bytes: int) -> None:
        nonlocal read
        read += n_bytes

    decisions = itertools.repeat(1) if kept is None else _decisions(kept)
    for name, source in sources.items():
        documents: list[Document] = []
        size = 0
        with named(name):
            for document in source.documents(on_read):
                if next(decisions):
                    documents.append(document)
                    size += len(document.text)
                if size >= _BATCH_CHARACTERS and documents:
                    yield Batch(name, documents, read)
                    documents, size = [], 0
        if documents:
            yield Batch(name, documents, read)


def _decisions(file: Path) -> Iterator[int]:
    with open(file, "rb") as stream:
        while block := stream.read(1 << 16):
            yield from block
    raise ValueError(CHANGED)


@contextmanager
def named(name: str) -> Iterator[None]:
    """Begin the message of a ValueError with the config path of the source."""
    try:
        yield
    except ValueError as error:
        raise ValueError(placed(f"data.sources.{name}", str(error))) from None
