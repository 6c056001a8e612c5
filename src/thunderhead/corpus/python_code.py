"""Corpora that are always there: the code of an installed package, and of Python's standard library."""

import importlib.metadata
import importlib.util
import platform
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from thunderhead.corpus.content import listing
from thunderhead.corpus.sources import Document, FilesSource
from thunderhead.corpus.text_files import walk

_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "benchmarks", "site-packages", "dist-packages", "__pycache__"}
)


class PythonFiles(FilesSource):
    """Files of Python that are installed."""

    def check(self) -> None:
        self._files()

    def _documents(self, name: str, file: Path, on_read: Callable[[int], None]) -> Iterator[Document]:
        with tokenize.open(file) as lines:  # in the encoding that the file declares (PEP 263)
            text = lines.read()
        if text:
            yield Document(name, text)
        on_read(file.stat().st_size)


@dataclass(eq=False)
class InstalledPackage(PythonFiles):
    """The code of an installed package: every `*.py` without tests. Of one version it is the same on every machine.

    Raises ValueError if the package is not installed, or has no such files.
    """

    _: KW_ONLY
    package: str  # as it is imported; or a part of it: sympy.logic
    sha256: str | None = None  # of the files' names and bytes, where published losses were measured; null: of none

    def _files(self) -> list[tuple[str, Path]]:
        try:
            found = importlib.util.find_spec(self.package)
        except (ImportError, ValueError):  # the latter for what is no name
            found = None
        folders = (found and found.submodule_search_locations) or []
        files = [(n, file) for folder in folders for n, file in walk(Path(folder), _SKIPPED_FOLDERS) if n[-3:] == ".py"]
        if not files:
            raise ValueError(f"package={self.package} is not installed here as files of Python: use data=stdlib")
        return files

    def _version(self) -> str:
        name = self.package.partition(".")[0]
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"

    @cached_property
    def _listing(self) -> dict[str, Any]:
        return listing(self._files())  # of a few MB

    def fingerprint(self) -> dict[str, Any]:
        return {**self._settings("package"), **self._listing}

    def notes(self) -> list[str]:
        if self.sha256 is None or self._listing["sha256"] == self.sha256:
            return []
        what = f"{self.package} {self._version()} is not the corpus that the published losses are of"
        return [f"{what} (constraints.txt pins it): they cannot be reached exactly"]


@dataclass(eq=False)
class StandardLibrary(PythonFiles):
    """The corpus that is always there: this Python's standard library, and its prose on the language.

    Code is every `*.py` below `sysconfig.get_paths()["stdlib"]` without tests and installed packages: about 730 files,
    12 MB. Prose is `pydoc_data.topics` (the language reference as `help()` shows it), each topic a document: 0.5 MB;
    its file is never code, as both may be sources of a mixture. They differ between versions of Python.
    """

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
        files = {name: file for name, file in walk(root, _SKIPPED_FOLDERS) if name.endswith(".py")}
        topics = files.pop(self._TOPICS, None)
        if (self.include_topics and topics is None) or (self.include_code and not files):
            raise ValueError(f"this Python lacks sources or topics in {root}: use data=text with files of your own")
        found = files if self.include_code else {}
        return list((found | {self._TOPICS: topics} if self.include_topics and topics else found).items())

    def fingerprint(self) -> dict[str, Any]:
        return {**self._settings("python", "include_code", "include_topics"), **listing(self._files())}

    def _documents(self, name: str, file: Path, on_read: Callable[[int], None]) -> Iterator[Document]:
        if self.include_topics and name == self._TOPICS:
            from pydoc_data.topics import topics

            yield from (Document(f"topics/{topic}", text) for topic, text in topics.items())
            on_read(file.stat().st_size)
        else:
            yield from super()._documents(name, file, on_read)
