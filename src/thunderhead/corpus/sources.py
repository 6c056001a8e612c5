"""Where text comes from: a source yields documents one by one, says what it is cheaply, and refuses bad input early."""

import itertools
import json
import platform
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pyarrow.parquet as pq
from annotated_types import Ge, Gt
from typing_extensions import override

from thunderhead.corpus.text_files import (
    BLOCK_BYTES,
    cut,
    decoded,
    decompressed,
    listing,
    named_errors,
    nearest,
    tell_reading,
    walk,
)

PLAIN_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*PLAIN_SUFFIXES, ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")


class Document(NamedTuple):
    """A piece of text that is tokenized as one and never split between training and validation."""

    id: str
    text: str


def _ignore(_: int) -> None:
    """Take no notice of progress."""


Weight = Annotated[float, Ge(0)]


@dataclass(eq=False)
class Share:
    """How much a mixture takes of something.

    Args:
        weight: share of the tokens in a mixture, relative to the other sources'; or a share for each stage of the
            run, by the fraction of the run at which the stage begins: {0: 0.9, 0.8: 0.5}.
        max_epochs: how often the mixture may go through the source; null: as often as its weight asks for.
    """

    weight: Weight | Mapping[float, Weight] = 1.0
    max_epochs: Annotated[float, Gt(0)] | None = None


class Source(Share, ABC):
    """Text to train on. Making one is cheap and touches no file; problems are reported by `fingerprint` and `check`."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Say what the documents depend on (settings, names, sizes and times of files), reading no text.

        Raises:
            ValueError: there is nothing to read.
        """

    @abstractmethod
    def documents(self, on_read: Callable[[int], None] = _ignore) -> Iterator[Document]:
        """Yield the documents in a fixed order, lazily; `on_read` is told the bytes taken from the disk since before.

        Raises:
            ValueError: a file is not what its name says (with file and byte offset or line).
        """

    @abstractmethod
    def disk_bytes(self) -> int | None:
        """Bytes that `documents` will report to `on_read` in all; None if that cannot be known."""

    @abstractmethod
    def check(self) -> None:
        """Look at the beginning of every file.

        Raises:
            ValueError: in one line, what is wrong with which file.
        """

    def connect(self) -> None:
        """Reach what is not on this machine, saying so; comes before the first document is asked for.

        Raises:
            ValueError: in one line, what cannot be reached and why.
        """


@dataclass(eq=False)
class StandardLibrary(Source):
    """The corpus that is always there: this Python's standard library, and its prose on the language.

    Code is every `*.py` below `sysconfig.get_paths()["stdlib"]` without tests and installed packages: about 730 files,
    12 MB. Prose is `pydoc_data.topics` (the language reference as `help()` shows it), each topic a document: 0.5 MB;
    the file that holds it is never code, as code and prose may be two sources of a mixture. Both differ between
    versions of Python: the fingerprint tells.
    """

    _SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
    _TOPICS = "pydoc_data/topics.py"

    _: KW_ONLY
    include_code: bool
    include_topics: bool

    def __post_init__(self) -> None:
        if not (self.include_code or self.include_topics):
            raise ValueError("include_code and include_topics are both false: nothing to read, set one to true")

    def _files(self) -> list[tuple[str, Path]]:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = dict(walk(root, (".py",), skip=self._SKIPPED_FOLDERS))
        topics = files.pop(self._TOPICS, None)
        if self.include_topics and topics is None:
            raise ValueError(f"this Python has no {root / self._TOPICS}: set include_topics to false")
        if self.include_code and not files:
            raise ValueError(f"this Python has no source files in {root}: use data=text with files of your own")
        code = list(files.items()) if self.include_code else []
        return [*code, (self._TOPICS, topics)] if topics is not None and self.include_topics else code

    @override
    def fingerprint(self) -> dict[str, Any]:
        return {
            "source": type(self).__name__,
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "include_code": self.include_code,
            "include_topics": self.include_topics,
            **listing(self._files()),
        }

    @override
    def disk_bytes(self) -> int:
        return sum(file.stat().st_size for _, file in self._files())

    @override
    def check(self) -> None:
        self._files()

    @override
    def documents(self, on_read: Callable[[int], None] = _ignore) -> Iterator[Document]:
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

    Text must be UTF-8. Files come in the order of their names, hidden ones are left out, empty texts and null records
    too. A text longer than `max_document_bytes` is cut at line ends (a longer line inside): training and validation are
    told apart by document, so a corpus in a single file must fall into many. null never cuts, and holds a whole text in
    memory.

    Args:
        path: a file or a folder.
        suffixes: which files to read in a folder; each also stands for its .gz and .zst.
        text_field: the field (.jsonl) or column (.parquet) that holds the text.
        max_document_bytes: longest document in bytes of UTF-8, or null.
    """

    _: KW_ONLY
    path: str
    suffixes: Sequence[str] = SUFFIXES
    text_field: str = "text"
    max_document_bytes: Annotated[int, Ge(64)] | None = 16384

    def __post_init__(self) -> None:
        self.suffixes = tuple(self.suffixes)
        if unknown := [suffix for suffix in self.suffixes if suffix not in SUFFIXES]:
            raise ValueError(f"suffixes={unknown} cannot be read: use some of {', '.join(SUFFIXES)}")

    def _files(self) -> list[tuple[str, Path]]:
        path = Path(self.path).expanduser()
        if not path.exists():
            raise ValueError(f"path={self.path} does not exist{nearest(path)}")
        packed = tuple(suffix + end for suffix in self.suffixes if suffix != ".parquet" for end in COMPRESSIONS)
        readable = (*self.suffixes, *packed)
        if path.is_dir():
            files = list(walk(path, readable))
        else:
            files = [(path.name, path)] if path.name.endswith(readable) else []
        if not files:
            kind = "folder without any readable file" if path.is_dir() else "file of a kind that is not read"
            raise ValueError(f"path={self.path} is a {kind}: names must end in {', '.join(self.suffixes)} (.gz, .zst)")
        files = [(name, file) for name, file in files if file.stat().st_size > 0]
        if not files:
            raise ValueError(f"path={self.path} is empty: no file has any text")
        return files

    @override
    def fingerprint(self) -> dict[str, Any]:
        return {
            "source": type(self).__name__,
            "suffixes": list(self.suffixes),
            "text_field": self.text_field,
            "max_document_bytes": self.max_document_bytes,
            **listing(self._files()),
        }

    @override
    def disk_bytes(self) -> int:
        return sum(file.stat().st_size for _, file in self._files())

    @override
    def check(self) -> None:
        for _, file in self._files():
            if file.suffix == ".parquet":
                with named_errors(file):
                    self._check_column(pq.read_schema(file).names, file)
            else:
                for _, pieces in itertools.islice(self._texts(file, _ignore), 1):
                    for _ in itertools.islice(pieces, 2):  # two: the end of a short file is looked at, too
                        pass

    @override
    def documents(self, on_read: Callable[[int], None] = _ignore) -> Iterator[Document]:
        for name, file in self._files():
            for record, pieces in self._texts(file, on_read):
                for part, text in enumerate(cut(pieces, self.max_document_bytes)):
                    yield Document(f"{name}{record}#{part}", text)

    def _texts(self, file: Path, on_read: Callable[[int], None]) -> Iterator[tuple[str, Iterable[str]]]:
        """Yield (position in the file, pieces that make up one text)."""
        kind = file.with_suffix("").suffix if file.suffix in COMPRESSIONS else file.suffix
        if kind == ".parquet":
            with named_errors(file):
                yield from self._parquet(file, on_read)
            return
        with open(file, "rb", buffering=1 << 20) as raw, decompressed(raw, file.suffix) as stream:
            parts = stream if kind == ".jsonl" else iter(lambda: stream.read(BLOCK_BYTES), b"")
            text = tell_reading(decoded(iter(parts), file), raw, on_read)
            if kind == ".jsonl":
                for number, line in enumerate(text, start=1):
                    yield from self._record(line, number, file)
            else:
                yield "", text

    def _record(self, line: str, number: int, file: Path) -> Iterator[tuple[str, Iterable[str]]]:
        if not line.strip():
            return
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: not JSON ({error})") from None
        if not isinstance(record, dict):
            raise ValueError(f"{file}, line {number}: a JSON object is needed, found {type(record).__name__}")
        if self.text_field not in record:
            fields = ", ".join(sorted(record))
            raise ValueError(f"{file}, line {number}: no field text_field={self.text_field}; there are: {fields}")
        text = record[self.text_field]
        if text is not None:
            yield f":{number}", self._pieces(text, f"{file}, line {number}")

    def _parquet(self, file: Path, on_read: Callable[[int], None]) -> Iterator[tuple[str, Iterable[str]]]:
        with pq.ParquetFile(file) as table:
            self._check_column(table.schema_arrow.names, file)
            rows, size = table.metadata.num_rows, file.stat().st_size
            row = told = 0
            for batch in table.iter_batches(batch_size=256, columns=[self.text_field]):
                for text in batch.column(0).to_pylist():
                    if text is not None:
                        yield f":{row}", self._pieces(text, f"{file}, row {row}")
                    row += 1
                on_read(size * row // rows - told)
                told = size * row // rows

    def _check_column(self, columns: list[str], file: Path) -> None:
        if self.text_field not in columns:
            raise ValueError(f"{file}: no column text_field={self.text_field}; there are: {', '.join(columns)}")

    def _pieces(self, text: object, where: str) -> list[str]:
        if not isinstance(text, str):
            raise ValueError(f"{where}: {self.text_field} is {type(text).__name__}, not text")
        # JSON can spell half of a surrogate pair, which is no character and has no UTF-8.
        return [text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")]
