"""Where text comes from: a source yields documents one by one, says what it is cheaply, and refuses bad input early."""

import itertools
import re
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pyarrow.parquet as pq
from annotated_types import Ge

from thunderhead.core.components import placed
from thunderhead.core.types import NonNegativeFloat, PathText, PositiveFloat
from thunderhead.corpus.content import listing
from thunderhead.corpus.records import RECORDS, check_field, parquet
from thunderhead.corpus.text_files import (
    ARCHIVES,
    blocks,
    check_encoding,
    contents,
    cut,
    decoded,
    is_encodable,
    is_readable,
    kind_of,
    named_errors,
    nearest,
    opened,
    walk,
)

SUFFIXES = (".txt", ".md", ".rst", ".tex", ".py", ".jsonl", ".ndjson", ".parquet")
_OF_MANY = (*RECORDS.keys() - {".html", ".htm"}, *ARCHIVES)  # files that hold many documents
_ON_ERROR = {"fail": "strict", "skip": "surrogateescape", "replace": "replace"}
INSIDE = "in an archive, and "  # begins why a member of one is passed over
_FEW_FILES = 40  # by which 5 % are two
_SHOWN = 5  # of the files that something is wrong with


class Document(NamedTuple):
    """A piece of text that is tokenized as one and never split between training and validation."""

    id: str  # the name of a file, :record, #piece
    text: str


@dataclass(eq=False)
class Share:
    """How much a mixture takes of something."""

    weight: NonNegativeFloat | Mapping[float, NonNegativeFloat] = 1.0
    """Share of the tokens in a mixture, relative to the other sources'; or a share for each stage of the run, by the
    fraction of the run at which the stage begins: {0: 0.9, 0.8: 0.5}."""
    max_epochs: PositiveFloat | None = None  # how often a mixture may go through it; null: as weights ask


class Source(Share, ABC):
    """Text to train on. Making one touches no file; methods raise ValueError with a line that names file and fault."""

    sampled = False  # whether fingerprints look at parts of large files only: data.fingerprint
    keeps_whole: bool = False
    """Whether pieces of a document, whose ids differ behind the last #, stay on one side of the split."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Say what the documents depend on (settings, names and bytes of files)."""

    @abstractmethod
    def documents(self, on_read: Callable[[int], None] = lambda _: None) -> Iterator[Document]:
        """Yield the documents in a fixed order, lazily; `on_read` is told the bytes read since before."""

    @abstractmethod
    def disk_bytes(self) -> int | None:
        """Bytes that `documents` will report to `on_read` in all; None if that cannot be known."""

    def part_bytes(self) -> list[int]:
        """Bytes of the parts that several tasks may share out; one, where it cannot be divided."""
        return [self.disk_bytes() or 0]

    def documents_of(self, parts: range, on_read: Callable[[int], None]) -> Iterator[Document]:
        """Yield the documents of consecutive parts, as `documents` does of all."""
        return self.documents(on_read) if parts else iter(())

    @abstractmethod
    def check(self) -> None:
        """Look at the beginning of every file."""

    def verify(self, on_read: Callable[[int], None], parts: range | None = None) -> None:
        """Read all, or parts, where that is cheap, before any work starts; raises ValueError that names all faults."""

    def reading(self) -> dict[str, Any]:
        """Say after `documents` what was read, passed over and skipped; empty where there are no files."""
        return {}

    def notes(self) -> list[str]:
        """Say what a plan should tell about the text."""
        return []

    def connect(self) -> None:
        """Reach what is not on this machine, saying so; comes before the first document is asked for."""

    def _settings(self, *names: str) -> dict[str, Any]:
        """Begin a fingerprint: kind, and settings by their names."""
        return {"source": type(self).__name__, **{name: getattr(self, name) for name in names}}


class FilesSource(Source):
    """Text in files, which several tasks may share out."""

    @abstractmethod
    def _files(self) -> list[tuple[str, Path]]:
        """Name the files in their order; raises ValueError if there are none."""

    @abstractmethod
    def _documents(self, name: str, file: Path, on_read: Callable[[int], None]) -> Iterator[Document]: ...

    def disk_bytes(self) -> int:
        return sum(self.part_bytes())

    def part_bytes(self) -> list[int]:
        return [file.stat().st_size for _, file in self._files()]

    def documents(self, on_read: Callable[[int], None] = lambda _: None) -> Iterator[Document]:
        return self.documents_of(range(len(self._files())), on_read)

    def documents_of(self, parts: range, on_read: Callable[[int], None]) -> Iterator[Document]:
        for name, file in self._files()[parts.start : parts.stop]:
            yield from self._documents(name, file, on_read)


@dataclass(eq=False)
class LocalText(FilesSource):
    """Text files below a path: plain text, records of .jsonl, .ndjson, .json, .csv, .tsv and .parquet, .html pages.

    Also packed (.gz .zst .bz2 .xz) and in archives (.zip .tar). Files come in the order of their names, without hidden
    ones, empty texts and null records. A text longer than `max_document_bytes` is cut at line ends (a longer line
    inside), null never cuts, and holds a whole text in memory. `reading` says what was read and what was passed over.
    """

    _: KW_ONLY
    path: PathText  # a file, of any kind, or a folder
    suffixes: Sequence[str] = SUFFIXES  # of files in a folder; each also stands for its .gz …, and for upper case
    text_field: str = "text"  # field (.jsonl, .json) or column (.csv, .tsv, .parquet) that holds the text
    max_document_bytes: Annotated[int, Ge(64)] | None = 16384
    encoding: str = "utf-8"  # of all files, as Python names it
    on_error: Literal["fail", "skip", "replace"] = "fail"
    """What becomes of a document that cannot be read: all is refused; it is left out and listed; or bytes that are no
    characters become U+FFFD, and other faults are refused."""
    split_by: Literal["document", "piece"] | None = None
    """Whether a file or record that is cut stays whole on one side of the split, or its pieces are divided; null: it
    stays whole, but for fewer than 40 files of plain text, of which validation would get none."""

    def __post_init__(self) -> None:
        check_encoding(self.encoding)
        self.suffixes = tuple(kind_of(f"x.{suffix.lstrip('.')}")[1] if suffix else "" for suffix in self.suffixes)
        self._passed: Counter[tuple[str, str]] = Counter()  # suffix and reason
        self._inside: Counter[tuple[str, str]] = Counter()  # the same of what archives hold
        self._read: Counter[str] = Counter()
        self._skipped: dict[str, list[Any]] = {}

    @cached_property
    def keeps_whole(self) -> bool:  # type: ignore[override]
        if self.split_by is not None:
            return self.split_by == "document"
        files = self._files()
        return len(files) >= _FEW_FILES or any(kind_of(name)[1] in _OF_MANY for name, _ in files)

    def _files(self) -> list[tuple[str, Path]]:
        path = Path(self.path).expanduser()
        if not path.exists():
            raise ValueError(f"path={self.path} does not exist{nearest(path)}")
        self._passed = Counter()

        def passed(name: str, why: str) -> None:
            self._passed[kind_of(name)[1] if "folder" not in why else "", why] += 1

        files = []
        for name, file in walk(path, passed=passed) if path.is_dir() else [(path.name, path)]:
            if not name.isascii() and name.encode("utf-8", "replace") != name.encode("utf-8", "surrogateescape"):
                raise ValueError(f"the name of the file {name!r} is not UTF-8: rename it")
            packed, suffix = kind_of(name)
            if path.is_dir() and suffix not in self.suffixes:
                passed(name, "not one of suffixes")
            elif packed and suffix == ".parquet":
                passed(name, "packed, and not to be read so")
            elif file.stat().st_size == 0:
                passed(name, "empty")
            else:
                files.append((name, file))
        if not files:
            if not path.is_dir():
                raise ValueError(f"path={self.path} is {next(iter(self._passed))[1]}: no file has any text")
            there = ", ".join(f"{n} {suffix or 'without suffix'} ({why})" for (suffix, why), n in self._passed.items())
            found = f"; there are {there}: choose by suffixes=[…]" if there else ""
            raise ValueError(
                f"path={self.path} is a folder without any readable file, {', '.join(self.suffixes)}{found}"
            )
        return files

    def fingerprint(self) -> dict[str, Any]:
        names = ("suffixes", "text_field", "max_document_bytes", "encoding", "on_error", "keeps_whole")
        return {**self._settings(*names), **listing(self._files(), sampled=self.sampled)}

    def check(self) -> None:
        def look(name: str, file: Path) -> None:
            if kind_of(name)[1] == ".parquet":
                with named_errors(file):
                    check_field(pq.read_schema(file).names, self.text_field, file)
            else:
                for _, pieces in itertools.islice(self._texts(name, file, lambda _: None), 1):
                    list(itertools.islice(pieces, 2))  # two: the end of a short file is looked at, too

        if self.on_error != "skip":
            self._refuse(look)

    def verify(self, on_read: Callable[[int], None], parts: range | None = None) -> None:
        if self.on_error != "skip":
            self._refuse(lambda name, file: deque(self._documents(name, file, on_read), maxlen=0), parts)

    def _refuse(self, look: Callable[[str, Path], object], parts: range | None = None) -> None:
        """Look at each file; the ValueError names all that something is wrong with."""
        faults, files = [], self._files()
        files = files if parts is None else files[parts.start : parts.stop]
        for name, file in files:
            try:
                look(name, file)
            except ValueError as error:
                faults.append(str(error))
        if faults:
            more = [f"{len(faults) - _SHOWN} more files"] if len(faults) > _SHOWN else []
            way = " (on_error=skip leaves out what cannot be read)" if len(files) > 1 or parts else ""
            raise ValueError("; ".join([*faults[:_SHOWN], *more]) + way)

    def reading(self) -> dict[str, Any]:
        all_passed = sorted((self._passed + self._inside).items())
        passed = [{"suffix": suffix, "why": why, "files": n} for (suffix, why), n in all_passed]
        skipped = [{"file": name, "documents": n, "why": why} for name, (n, why) in self._skipped.items()]
        return {"read": dict(sorted(self._read.items())), "passed_over": passed, "skipped": skipped}

    def documents_of(self, parts: range, on_read: Callable[[int], None]) -> Iterator[Document]:
        self._read, self._inside, self._skipped = Counter(), Counter(), {}
        yield from super().documents_of(parts, on_read)

    def _documents(self, name: str, file: Path, on_read: Callable[[int], None]) -> Iterator[Document]:
        try:
            for record, pieces in self._texts(name, file, on_read):
                for part, text in enumerate(cut(pieces, self.max_document_bytes)):
                    if self.on_error != "skip" or is_readable(text):
                        yield Document(f"{name}{record}#{part}", text)
                    else:
                        self._skip(name, f"not {self.encoding} text")
        except ValueError as error:
            if self.on_error != "skip":
                raise
            self._skip(name, f"from here on: {error}")

    def _skip(self, name: str, why: str) -> None:
        self._skipped.setdefault(name, [0, why])[0] += 1

    def _texts(self, name: str, file: Path, on_read: Callable[[int], None]) -> Iterator[tuple[str, Iterable[str]]]:
        """Yield (position in the file, pieces that make up one text)."""
        if kind_of(name)[1] == ".parquet":
            self._read[".parquet"] += 1
            yield from ((row, [text]) for row, text in parquet(file, self.text_field, on_read) if text is not None)
            return
        with opened(file, on_read) as raw:
            for inside, stream in contents(file, raw):
                suffix = kind_of(inside or name)[1]
                if stream is None or (why := self._left_out(inside, suffix)):
                    self._inside[suffix, INSIDE + ("a link or no regular file" if stream is None else why)] += 1
                    continue
                self._read[suffix] += 1
                where = f"{file}/{inside}" if inside else str(file)
                texts = decoded(blocks(stream), where, self.encoding, _ON_ERROR[self.on_error])
                place = f"/{inside}" if inside else ""
                if (records := RECORDS.get(suffix)) is None:
                    yield place, texts
                    continue
                for record, text in records(texts, self.text_field, where, partial(self._fault, name)):
                    if text is None:
                        continue
                    whole = re.sub("[\ud800-\udfff]", "\ufffd", text) if self.on_error == "replace" else text
                    if is_encodable(whole):
                        yield f"{place}{record}", [whole]
                    else:
                        self._fault(name, f"{where}, record {record[1:]}: not text (half of a surrogate pair)")

    def _left_out(self, inside: str, suffix: str) -> str:
        """Why a member of an archive is not read, as `walk` passes over files; nothing if it is."""
        if any(part.startswith(".") and part.strip(".") for part in inside.split("/")):
            return "hidden"
        is_other = inside and (suffix not in self.suffixes or suffix in (*ARCHIVES, ".parquet"))
        return "not one of suffixes" if is_other else ""

    def _fault(self, name: str, message: str) -> None:
        if self.on_error != "skip":
            raise ValueError(message)
        self._skip(name, message)


def check_sources(sources: Mapping[str, Source], path: str | None = None) -> None:
    """Look at names, `path` and the beginnings of all files; a ValueError says in one line all that is wrong."""
    if not sources:
        raise ValueError("data.sources is empty: name at least one source")
    problems = []
    if path is not None and not any(getattr(source, "path", None) == path for source in sources.values()):
        message = "choose data=text to train on it, or leave it out; a resumed run keeps its sources"
        problems.append(f"data.path={path} is used by no source: {message}")
    for name, source in sources.items():
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            problems.append(f"data.sources.{name}: use letters, digits, '_', '-' and '.' in names of sources")
        if name.endswith((".json", ".lock")):  # of files that lie beside the folders of sources
            problems.append(f"data.sources.{name}: no folder of shards may be called like a file: rename it")
        problems += refusal(name, source.check)
    if problems:
        raise ValueError("; ".join(problems))


def refusal(name: str, look: Callable[[], object]) -> list[str]:
    """Look at a source, and return what is wrong with it, if anything is."""
    try:
        with named(name):
            look()
    except ValueError as error:
        return [str(error)]
    return []


@contextmanager
def named(name: str) -> Iterator[None]:
    """Begin the message of a ValueError with the config path of the source; a file that is gone is one, too."""
    try:
        yield
    except FileNotFoundError as error:
        message = f"{error.filename} is gone since files were listed: put it back, or start again without it"
        raise ValueError(placed(f"data.sources.{name}", message)) from None
    except ValueError as error:
        raise ValueError(placed(f"data.sources.{name}", str(error))) from None
