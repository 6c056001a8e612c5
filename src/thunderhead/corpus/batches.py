"""The documents of sources in batches: all of them, or the share of one of several tasks."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from thunderhead.corpus.batch_processing import Batch, UselessError
from thunderhead.corpus.sources import Document, Source, named
from thunderhead.corpus.split import Split

BATCH_CHARACTERS = 1 << 20  # text that is tokenized at once
CHANGED = "files of data.sources changed while they were read: prepare again"


def share(sources: Mapping[str, Source], rank: int, tasks: int) -> dict[str, range]:
    """The parts of each source that fall to a task: consecutive over all sources, and about equally many bytes."""
    sizes = {name: source.part_bytes() for name, source in sources.items()}
    total, before = max(1, sum(sum(parts) for parts in sizes.values())), 0
    found = {}
    for name, parts in sizes.items():
        begins = [before, *(before := before + size for size in parts)][:-1]
        mine = [part for part, begin in enumerate(begins) if min(begin * tasks // total, tasks - 1) == rank]
        found[name] = range(mine[0], mine[-1] + 1) if mine else range(0)
    return found


@dataclass(frozen=True)
class Batches:
    """Documents of each source, in order, in batches; all of them, for training, if nothing more is said.

    Iterating raises UselessError if they are not those of before.
    """

    sources: Mapping[str, Source]
    parts: Mapping[str, range] | None = None  # of each source; None: all of it
    kept: Path | None = None  # a byte for each document of all tasks, 0 if a filter removed it
    first: int = 0  # the place there of the first document that is read
    split: Split | None = None
    trained_on: Mapping[str, int] | None = None  # characters of each source that are for training, if its tail is not
    sides: Path | None = None  # a byte for each document that is kept, 1 if it is for validation, whatever `split` says
    first_kept: int = 0  # the place there of the first document that is read

    def __iter__(self) -> Iterator[Batch]:
        read = 0

        def on_read(n_bytes: int) -> None:
            nonlocal read
            read += n_bytes

        decisions = itertools.repeat(1) if self.kept is None else _bytes(self.kept, self.first)
        sides = itertools.repeat(None) if self.sides is None else _bytes(self.sides, self.first_kept)
        for name, source in self.sources.items():
            documents: list[Document] = []
            held_out: list[bool] = []
            size = 0
            found = (document for document in self._documents(name, source, on_read) if next(decisions))
            trained_on = (self.trained_on or {}).get(name)
            divided = self.split.divide(found, source, trained_on) if self.split else ((text, False) for text in found)
            for document, is_held_out in divided:
                side = next(sides)
                documents.append(document)
                held_out.append(is_held_out if side is None else bool(side))
                size += len(document.text)
                if size >= BATCH_CHARACTERS:
                    yield Batch(name, documents, held_out, read)
                    documents, held_out, size = [], [], 0
            if documents:
                yield Batch(name, documents, held_out, read)

    def _documents(self, name: str, source: Source, on_read: Callable[[int], None]) -> Iterator[Document]:
        with named(name):
            if self.parts is None:
                yield from source.documents(on_read)
            else:
                yield from source.documents_of(self.parts[name], on_read)


def _bytes(file: Path, first: int) -> Iterator[int]:
    with open(file, "rb") as stream:
        stream.seek(first)
        while block := stream.read(1 << 16):
            yield from block
    raise UselessError(CHANGED)
