"""Batches of documents through several processes: in order, and remembered on the disk by what was killed meanwhile.

The processes import this module and what the work itself needs, nothing heavier.
"""

import itertools
import os
import pickle
import signal
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from thunderhead.core.tokenizer import Tokenizer, Tokens
from thunderhead.corpus.overlap import Windows, windows
from thunderhead.processes import WHEN_KILLED, end_with

if TYPE_CHECKING:
    from thunderhead.corpus.sources import Document

_FEW_BATCHES = 4  # starting a process takes as long as tokenizing half a MB
Result = TypeVar("Result")


class UselessError(ValueError):
    """Why nothing that was done is of use to the next call."""


class Batch(NamedTuple):
    """Documents that follow each other in a source, and how many bytes of all sources were read until their end."""

    source: str
    documents: "list[Document]"
    held_out: list[bool]  # which of them are for validation
    read: int


Work = Callable[[list[str]], Result]  # done with the texts of a batch, with the same result in every process


class Record(NamedTuple):
    """What is remembered of a batch: its documents, without their texts, and the result."""

    source: str
    ids: list[str]
    held_out: list[bool]
    characters: int
    read: int
    result: Any


class Encoded(NamedTuple):
    """Documents as tokens, one after the other, EOS after each."""

    tokens: Tokens
    lengths: npt.NDArray[np.int64]  # tokens of each document
    n_bytes: npt.NDArray[np.int64]  # bytes of UTF-8 of each document
    windows: Windows


def refuse_ends_inside(record: Record, eos_id: int) -> None:
    """Raise UselessError, which names the first such document, if EOS is anywhere but at the end of an encoded one."""
    found, ends = np.flatnonzero(record.result.tokens == eos_id), np.cumsum(record.result.lengths)
    if len(inside := np.setdiff1d(found, ends - 1, assume_unique=True)):
        document = record.ids[np.searchsorted(ends, inside[0], side="right")]
        wrong = "its text is encoded to the tokenizer's end of document, which would cut it in two"
        remedy = "name another token (tokenizer.eos=…), or mend the tokenizer"
        raise UselessError(f"data.sources.{record.source}: {document}: {wrong}: {remedy}")


class Encode:
    """Turn texts into tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def __call__(self, texts: list[str]) -> Encoded:
        eos = np.array([self._tokenizer.eos_id], dtype=self._tokenizer.dtype)
        try:
            documents = self._tokenizer.encode_batch(texts)
        except ValueError as error:  # a bug, and no refusal of a setting
            raise RuntimeError(
                f"tokenizer: encode_batch fails at the {len(texts)} texts from {texts[0][:60]!r} …"
            ) from error
        return Encoded(
            tokens=np.concatenate([part for tokens in documents for part in (tokens, eos)]),
            lengths=np.array([len(tokens) + 1 for tokens in documents]),
            n_bytes=np.array([len(text.encode()) for text in texts]),
            windows=windows(texts),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _encode_with, (type(self._tokenizer), self._tokenizer.to_json())


def _encode_with(kind: type[Tokenizer], text: str) -> Encode:
    return Encode(kind.from_json(text))


def in_order(work: Work[Result], batches: Iterable[Batch], processes: int) -> Iterator[tuple[Batch, Result]]:
    """Yield each batch with its result, in the order of the batches; a bounded number of them is under way.

    With one process, or few batches, the work is done in this one. Others import neither `__main__` nor torch, and end
    when this one does, however it ends. Raises ValueError if one of them was killed.
    """
    batches = iter(batches)
    first = list(itertools.islice(batches, _FEW_BATCHES))
    batches = itertools.chain(first, batches)
    if processes == 1 or len(first) < _FEW_BATCHES:
        for batch in batches:
            yield batch, work(_texts(batch))
        return

    import loky

    executor = loky.ProcessPoolExecutor(
        processes,
        context=loky.backend.get_context("loky"),
        initializer=_start,
        initargs=(work, os.getpid()),
        env={"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},  # a core is a process here
    )

    def submitted(n: int) -> Iterator[tuple[Batch, Any]]:
        return ((batch, executor.submit(_do, _texts(batch))) for batch in itertools.islice(batches, n))

    try:
        pending = deque(submitted(2 * processes))
        while pending:
            pending.extend(submitted(1))
            done, future = pending.popleft()
            yield done, future.result()
    except loky.process_executor.BrokenProcessPool as error:
        message = f"a process that prepares texts was killed: {WHEN_KILLED}; the next start goes on where this one was"
        raise ValueError(message) from error
    finally:
        executor.shutdown(wait=True, kill_workers=True)


def _texts(batch: Batch) -> list[str]:
    return [document.text for document in batch.documents]


_work: Work[Any] | None = None


def _start(work: Work[Any], parent: int) -> None:
    global _work  # noqa: PLW0603 - sent once a process, not with every batch
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them: the parent ends its workers
    end_with(parent, lambda: os._exit(1))


def _do(texts: list[str]) -> Any:
    assert _work is not None
    return _work(texts)


def remembered(work: Work[Any], batches: Iterable[Batch], processes: int, file: Path) -> Iterator[Record]:
    """Do as `in_order`, and write each result to a file; those that are in the file already are read from there.

    A record that was cut off by a kill is done again. Raises UselessError if a batch is not the one of the last time.
    """
    batches = iter(batches)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+b") as log:
        end = log.seek(0)
        while (record := _read_record(log)) is not None:
            batch = next(batches, None)
            if batch is None or record[:4] != _record(batch, None)[:4]:
                raise UselessError("text changed since the preparation that was interrupted: prepare again")
            yield record
            end = log.tell()
        log.truncate(end)
        for batch, result in in_order(work, batches, processes):
            record = _record(batch, result)
            content = pickle.dumps(tuple(record), protocol=5)
            log.write(len(content).to_bytes(8) + zlib.crc32(content).to_bytes(4) + content)
            log.flush()
            yield record


def _record(batch: Batch, result: Any) -> Record:
    ids, characters = [document.id for document in batch.documents], sum(map(len, _texts(batch)))
    return Record(batch.source, ids, batch.held_out, characters, batch.read, result)


def recorded(files: Iterable[Path]) -> Iterator[Record]:
    """Read again what `remembered` wrote, file by file; raises UselessError if one does not end where a record does."""
    for file in files:
        with open(file, "rb") as log:
            end = 0
            while (record := _read_record(log)) is not None:
                yield record
                end = log.tell()
            if end != os.fstat(log.fileno()).st_size:
                raise UselessError(f"{file} was damaged: prepare again")


def _read_record(log: IO[bytes]) -> Record | None:
    """Read the next record; None where it was cut off or damaged."""
    header = log.read(12)
    content = log.read(min(int.from_bytes(header[:8]), os.fstat(log.fileno()).st_size))
    if not content or zlib.crc32(content) != int.from_bytes(header[8:]):
        return None
    return Record(*pickle.loads(content))  # written here, into a folder of this preparation
