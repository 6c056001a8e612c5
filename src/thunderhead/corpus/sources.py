"""Where text comes from: a source yields documents one by one, says what it is cheaply, and refuses bad input early."""

import itertools
import json
import platform
import re
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import pyarrow.parquet as pq
from annotated_types import Ge

from thunderhead.core.config import placed
from thunderhead.core.types import NonNegativeFloat, PathText, PositiveFloat
from thunderhead.corpus.text_files import (
    PACKED,
    check_field,
    cut,
    listing,
    named_errors,
    nearest,
    read,
    refuse_long,
    text_of,
    walk,
)

Suffix = Literal[".txt", ".md", ".py", ".jsonl", ".parquet"]


class Document(NamedTuple):
    """A piece of text that is tokenized as one and never split between training and validation."""

    id: str
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

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Say what the documents depend on (settings, names, sizes and times of files), reading no text."""

    @abstractmethod
    def documents(self, on_read: Callable[[int], None] = lambda _: None) -> Iterator[Document]:
        """Yield the documents in a fixed order, lazily; `on_read` is told the bytes read since before."""

    @abstractmethod
    def disk_bytes(self) -> int | None:
        """Bytes that `documents` will report to `on_read` in all; None if that cannot be known."""

    @abstractmethod
    def check(self) -> None:
        """Look at the beginning of every file."""

    def connect(self) -> None:
        """Reach what is not on this machine, saying so; comes before the first document is asked for."""

    def _settings(self, *names: str) -> dict[str, Any]:
        """Begin a fingerprint: kind, and settings by their names."""
        return {"source": type(self).__name__, **{name: getattr(self, name) for name in names}}


@dataclass(eq=False)
class StandardLibrary(Source):
    """The corpus that is always there: this Python's standard library, and its prose on the language.

    Code is every `*.py` below `sysconfig.get_paths()["stdlib"]` without tests and installed packages: about 730 files,
    12 MB. Prose is `pydoc_data.topics` (the language reference as `help()` shows it), each topic a document: 0.5 MB;
    its file is never code, as both may be sources of a mixture. They differ between versions of Python.
    """

    _SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
    _TOPICS = "pydoc_data/topics.py"

    _: KW_ONLY
    include_code: bool
    include_topics: bool

    def __post_init__(self) -> None:
        if not (self.include_code or self.include_topics):
            raise ValueError("include_code and include_topics are both false: nothing to read, set one to true")
        self.python = f"{platform.python_implementation()} {platform.python_version()}"

    def _files(self) -> list[tuple[str, Path]]:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = dict(walk(root, (".py",), skip=self._SKIPPED_FOLDERS))
        topics = files.pop(self._TOPICS, None)
        if (self.include_topics and topics is None) or (self.include_code and not files):
            raise ValueError(f"this Python lacks sources or topics in {root}: use data=text with files of your own")
        found = files if self.include_code else {}
        return list((found | {self._TOPICS: topics} if self.include_topics and topics else found).items())

    def fingerprint(self) -> dict[str, Any]:
        return {**self._settings("python", "include_code", "include_topics"), **listing(self._files())}

    def disk_bytes(self) -> int:
        return sum(file.stat().st_size for _, file in self._files())

    def check(self) -> None:
        self._files()

    def documents(self, on_read: Callable[[int], None] = lambda _: None) -> Iterator[Document]:
        for name, file in self._files():
            if self.include_topics and name == self._TOPICS:
                from pydoc_data.topics import topics

                yield from (Document(f"topics/{topic}", text) for topic, text in topics.items())
            else:
                with tokenize.open(file) as lines:  # in the encoding that the file declares (PEP 263)
                    text = lines.read()
                if text:
                    yield Document(name, text)
            on_read(file.stat().st_size)


@dataclass(eq=False)
class LocalText(Source):
    """Text files below a path: .txt .md .py (a file is a text), .jsonl and .parquet (a record is), also .gz and .zst.

    Text must be UTF-8. Files come in the order of their names, without hidden ones, empty texts and null records. A
    text longer than `max_document_bytes` is cut at line ends (a longer line inside): training and validation are told
    apart by document, so a single file must fall into many. null never cuts, and holds a whole text in memory.
    """

    _: KW_ONLY
    path: PathText  # a file or a folder
    suffixes: Sequence[Suffix] = get_args(Suffix)  # in a folder; each also stands for its .gz and .zst
    text_field: str = "text"  # field (.jsonl) or column (.parquet) that holds the text
    max_document_bytes: Annotated[int, Ge(64)] | None = 16384

    def _files(self) -> list[tuple[str, Path]]:
        path = Path(self.path).expanduser()
        if not path.exists():
            raise ValueError(f"path={self.path} does not exist{nearest(path)}")
        packed = [suffix + end for suffix in self.suffixes if suffix != ".parquet" for end in PACKED]
        readable = (*self.suffixes, *packed)
        found = walk(path, readable) if path.is_dir() else [(path.name, path)]
        files = [(name, file) for name, file in found if name.endswith(readable)]
        if not files:
            kind = "folder without any readable file" if path.is_dir() else "file of a kind that is not read"
            raise ValueError(f"path={self.path} is a {kind}: names must end in {', '.join(self.suffixes)} (.gz, .zst)")
        files = [(name, file) for name, file in files if file.stat().st_size > 0]
        if not files:
            raise ValueError(f"path={self.path} is empty: no file has any text")
        return files

    def fingerprint(self) -> dict[str, Any]:
        return {**self._settings("suffixes", "text_field", "max_document_bytes"), **listing(self._files())}

    def disk_bytes(self) -> int:
        return sum(file.stat().st_size for _, file in self._files())

    def check(self) -> None:
        for _, file in self._files():
            if file.suffix == ".parquet":
                with named_errors(file):
                    check_field(pq.read_schema(file).names, self.text_field, file)
            else:
                for _, pieces in itertools.islice(self._texts(file, lambda _: None), 1):
                    list(itertools.islice(pieces, 2))  # two: the end of a short file is looked at, too

    def documents(self, on_read: Callable[[int], None] = lambda _: None) -> Iterator[Document]:
        for name, file in self._files():
            for record, pieces in self._texts(file, on_read):
                for part, text in enumerate(cut(pieces, self.max_document_bytes)):
                    yield Document(f"{name}{record}#{part}", text)

    def _texts(self, file: Path, on_read: Callable[[int], None]) -> Iterator[tuple[str, Iterable[str]]]:
        """Yield (position in the file, pieces that make up one text)."""
        kind = file.with_suffix("").suffix if file.suffix in PACKED else file.suffix
        if kind == ".parquet":
            with named_errors(file):
                yield from self._parquet(file, on_read)
            return
        if kind != ".jsonl":
            yield "", read(file, on_read, by_line=False)
            return
        for number, line in enumerate(read(file, on_read, by_line=True), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}, line {number}: not JSON ({error})") from None
            if (found := text_of(record, self.text_field, f"{file}, line {number}")) is not None:
                yield f":{number}", [found]

    def _parquet(self, file: Path, on_read: Callable[[int], None]) -> Iterator[tuple[str, Iterable[str]]]:
        with pq.ParquetFile(file) as table:
            check_field(table.schema_arrow.names, self.text_field, file)
            rows, size = table.metadata.num_rows, file.stat().st_size
            for group in map(table.metadata.row_group, range(table.num_row_groups)):
                for column in map(group.column, range(group.num_columns)):
                    if column.path_in_schema == self.text_field:
                        refuse_long(column.total_uncompressed_size / max(group.num_rows, 1), str(file))
            row = told = 0
            # few at a time: a long text that all rows share is on the disk once
            for batch in table.iter_batches(batch_size=16, columns=[self.text_field]):
                for value in batch.column(0):
                    record = {self.text_field: value.as_py()}
                    if (text := text_of(record, self.text_field, f"{file}, row {row}")) is not None:
                        yield f":{row}", [text]
                    row += 1
                on_read(size * row // rows - told)
                told = size * row // rows


def check_sources(sources: Mapping[str, Source], path: str | None = None) -> None:
    """Look at names, `path` and the beginnings of all files; a ValueError says in one line all that is wrong."""
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


@contextmanager
def named(name: str) -> Iterator[None]:
    """Begin the message of a ValueError with the config path of the source."""
    try:
        yield
    except ValueError as error:
        raise ValueError(placed(f"data.sources.{name}", str(error))) from None
