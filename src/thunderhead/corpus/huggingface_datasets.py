"""Datasets of the Hugging Face hub, or of a local folder in the same format, read as a stream by `datasets`."""

import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from typing_extensions import override

from thunderhead.core.types import PositiveInt
from thunderhead.corpus.sources import Document, Source, _ignore
from thunderhead.corpus.text_files import cut, listing, walk

_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class HuggingFaceDataset(Source):
    """Records of a dataset, in its order. Only what is read is downloaded, and no copy is kept beside the shards.

    The fingerprint of a dataset on the hub is its name and settings, as asking the hub would need the network in every
    run: give a commit as `revision` to tell its versions apart. Each pass reads the stream anew.

    Args:
        dataset: name on the hub (HuggingFaceFW/fineweb-edu), or a folder of .parquet, .jsonl … files.
        subset: its configuration; null: the only one.
        split: the split that is read; the validation split is taken from it, by hash, as of any source.
        revision: commit, tag or branch; null: main.
        text_field: the column that holds the text.
        begins: a regular expression, for datasets whose rows are lines: a row that it matches begins a document, and
            other rows belong to the document before. null: a row is a document.
        max_bytes: stop after so many bytes of text; null: read all.
        max_document_bytes: cut longer documents at line ends; null: never.
    """

    _: KW_ONLY
    dataset: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    text_field: str = "text"
    begins: str | None = None
    max_bytes: PositiveInt | None = None
    max_document_bytes: Annotated[int, Ge(64)] | None = None

    def __post_init__(self) -> None:
        try:
            self._begins = re.compile(self.begins) if self.begins is not None else None
        except re.error as error:
            raise ValueError(f"begins={self.begins} is no regular expression ({error})") from None

    @property
    def _folder(self) -> Path | None:
        """The local folder; None for a dataset on the hub, whose name is `name` or `owner/name`."""
        path = Path(self.dataset).expanduser()
        named_as_path = self.dataset.startswith((".", "/", "~")) or self.dataset.count("/") > 1
        return path if named_as_path or path.exists() else None

    @property
    def _what(self) -> str:
        return f"{self.dataset} ({', '.join(part for part in (self.subset, self.split) if part)})"

    @override
    def fingerprint(self) -> dict[str, Any]:
        settings = {
            "source": type(self).__name__,
            "subset": self.subset,
            "split": self.split,
            "text_field": self.text_field,
            "begins": self.begins,
            "max_bytes": self.max_bytes,
            "max_document_bytes": self.max_document_bytes,
        }
        if self._folder is None:
            return {**settings, "dataset": self.dataset, "revision": self.revision}
        return {**settings, **listing(self._files(self._folder))}

    def _files(self, folder: Path) -> list[tuple[str, Path]]:
        if not folder.is_dir():
            raise ValueError(f"dataset={self.dataset} is no folder, and no name of a dataset on huggingface.co")
        if files := list(walk(folder, ("",))):
            return files
        raise ValueError(f"dataset={self.dataset} is an empty folder")

    @override
    def disk_bytes(self) -> int | None:
        return self.max_bytes

    @override
    def check(self) -> None:
        if self._folder is not None:
            self._files(self._folder)
        if importlib.util.find_spec("datasets") is None:
            raise ValueError("needs the package datasets: uv pip install -e '.[huggingface]'")

    @override
    def connect(self) -> None:
        if self._folder is None:
            self._reach_hub()
        row = next(iter(self._rows()), None)
        if row is not None and self.text_field not in row:
            raise ValueError(f"{self._what} has no column text_field={self.text_field}; there are: {', '.join(row)}")

    def _reach_hub(self) -> None:
        """Ask the hub for the dataset, before anything is downloaded."""
        needs = f"dataset={self.dataset} is read from huggingface.co, over the network"
        instead = "use data=text with files of your own, or name a folder"
        for variable in _OFFLINE:
            if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE"):
                raise ValueError(f"{needs}, and {variable} is set: unset it, {instead}")
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        size = "all of it" if self.max_bytes is None else f"{self.max_bytes / 1e9:,.3g} GB of text"
        _log.warning("Reading %s from huggingface.co: this downloads %s", self._what, size)
        try:
            HfApi(endpoint=os.environ.get("HF_ENDPOINT")).dataset_info(self.dataset, revision=self.revision, timeout=20)
        except GatedRepoError:
            raise ValueError(f"{needs}, which asks to accept its conditions there and to set HF_TOKEN") from None
        except RepositoryNotFoundError:
            raise ValueError(f"{needs}, which has none of this name (or it is private: set HF_TOKEN)") from None
        except RevisionNotFoundError:
            raise ValueError(f"{needs}, which has no revision={self.revision} of it") from None
        except Exception as error:  # whatever the HTTP library of the day raises
            raise ValueError(f"{needs}, which does not answer ({_first_line(error)}): {instead}") from None

    @cached_property
    def _stream(self) -> Any:
        import datasets

        dataset = self.dataset if self._folder is None else str(self._folder)
        try:
            return datasets.load_dataset(dataset, self.subset, split=self.split, revision=self.revision, streaming=True)
        except Exception as error:  # a ValueError or a class of datasets' own
            raise ValueError(f"{self._what} cannot be read: {_first_line(error)}") from None

    def _rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of the dataset.

        Raises:
            ValueError: it has no such subset or split, or a local file is damaged.
            ConnectionError: the network failed, beyond the retries of `datasets`: what was done is kept.
        """
        stream = self._stream
        try:
            yield from stream
        except Exception as error:
            if self._folder is not None:
                raise ValueError(f"{self._what} cannot be read: {_first_line(error)}") from error
            message = f"{self._what}: reading from huggingface.co failed ({_first_line(error)}): start again to go on"
            raise ConnectionError(message) from error

    @override
    def documents(self, on_read: Callable[[int], None] = _ignore) -> Iterator[Document]:
        read = 0
        for first_row, text in self._texts():
            size = len(text.encode())
            for part, piece in enumerate(cut([text], self.max_document_bytes)):
                yield Document(f"{self.split}:{first_row}#{part}", piece)
            read += size
            on_read(size)
            if self.max_bytes is not None and read >= self.max_bytes:
                return

    def _texts(self) -> Iterator[tuple[int, str]]:
        """Yield (number of the first row, text) of each document, without empty ones."""
        if self._begins is None:
            yield from ((row, text) for row, text in self._lines() if text)
            return
        held: list[str] = []
        begun = 0
        for row, text in self._lines():
            if self._begins.search(text):
                yield from _joined(begun, held)
                held, begun = [], row
            held.append(text)
        yield from _joined(begun, held)

    def _lines(self) -> Iterator[tuple[int, str]]:
        for number, row in enumerate(self._rows()):
            text = row.get(self.text_field)
            if text is None:
                continue
            if not isinstance(text, str):
                raise ValueError(f"{self._what}, row {number}: {self.text_field} is {type(text).__name__}, not text")
            yield number, text


def _joined(begun: int, held: Iterable[str]) -> Iterator[tuple[int, str]]:
    if text := "".join(held):
        yield begun, text


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
